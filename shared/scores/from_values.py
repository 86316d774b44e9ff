"""Every score of a checkpoint from its recorded per-picture values, with the targets and weights of the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shared.errors import SettingsError
from shared.schemas import Metric, Score, ScoringPreset
from shared.scores.formulas import combined_score, pixar_style_score, preset_total
from shared.scoring_presets import COMBINED_SCORE, terms_of


def values_of(metrics: Mapping[str, Metric]) -> dict[str, tuple[float, ...]]:
    """Return the value of every picture, by quantity; one that is not known for all pictures is left out."""
    return {
        name: tuple(value for value in metric.per_image if value is not None)
        for name, metric in metrics.items()
        if metric.status == "ok" and metric.per_image is not None and None not in metric.per_image
    }


def scores_from_values(
    values: Mapping[str, Sequence[float]], scoring: ScoringPreset, subset: Sequence[int] | None = None
) -> dict[str, Score]:
    """Compute every score from per-picture values: pure, so that a score's error can be had by leaving pictures out.

    Args:
        values: from `values_of`; brightness, contrast and saturation are always there.
        scoring: the plan's.
        subset: indices of the pictures that count, at least one; None for all.
    Raises:
        SettingsError: the preset holds something that is no number, or that this program does not know.
    """
    brightness, contrast, saturation = (
        values[name] if subset is None else [values[name][index] for index in subset]
        for name in ("brightness", "contrast", "saturation")
    )
    combined = combined_score(
        brightness,
        contrast,
        target_brightness=preset_number(scoring, "target.brightness", 0.5),
        target_contrast=preset_number(scoring, "target.contrast", 0.2),
        std_weight=preset_number(scoring, "weight.std", 0.5),
    )
    style = pixar_style_score(brightness, contrast, saturation)
    scores = {
        "brightness_score": Score(value=combined.brightness_score, direction="minimise"),
        "contrast_score": Score(value=combined.contrast_score, direction="minimise"),
        COMBINED_SCORE: Score(value=combined.combined_score, direction="minimise"),
        "pixar_style_score": Score(value=style, direction="maximise"),
    }
    if terms := terms_of(scoring):
        total = preset_total(terms, values, combined.combined_score, subset)
        scores[scoring.objective] = Score(value=total.value, direction="minimise", left_out=total.left_out)
    return scores


def preset_number(scoring: ScoringPreset, name: str, default: float) -> float:
    """Return a figure of the plan's scoring preset.

    Raises:
        SettingsError: it is no number.
    """
    value = scoring.values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SettingsError(f"scoring preset {scoring.name}: {name}", value, "write a number")
    return float(value)

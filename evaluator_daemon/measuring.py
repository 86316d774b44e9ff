"""From pictures to metrics, scores and the gate's verdict, as they are written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evaluator_daemon.metrics.base import MetricSource, RenderedSet
from evaluator_daemon.metrics.pixels import pixel_statistics, sentinel
from evaluator_daemon.scoring import CLIP_TOLERANCE, combined_score, gate, pixar_style_score, preset_total
from shared.errors import SettingsError
from shared.metric_names import CLIP_CONSISTENCY
from shared.schemas import EvaluationPlan, Gate, GateCheck, Metric, Score, ScoringPreset
from shared.scoring_presets import COMBINED_SCORE, terms_of

FEWEST_PAIRS = 4
"""With fewer pictures the interval is so wide that any collapse would pass the CLIP gate."""


def measure(sources: Sequence[MetricSource], rendered: RenderedSet) -> dict[str, Metric]:
    """Let every source measure the pictures."""
    metrics: dict[str, Metric] = {}
    for source in sources:
        metrics.update(source.measure(rendered))
    return metrics


def scores_of(metrics: Mapping[str, Metric], plan: EvaluationPlan) -> dict[str, Score]:
    """Compute the scores of a checkpoint: the seed's, always, and the preset's own, with the targets of the plan.

    Raises:
        SettingsError: the plan's preset holds something that is no number, or that this program does not know.
    """
    return scores_from_values(values_of(metrics), plan.scoring)


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


def gate_of(
    rendered: RenderedSet, metrics: Mapping[str, Metric], base: Mapping[str, Metric] | None, plan: EvaluationPlan
) -> Gate:
    """Say whether these pictures may win.

    Args:
        base: the base model's metrics for the same samples; None when these are them.
    """
    sentinels = gate([sentinel(pixel_statistics(picture)) for picture in rendered.pictures])
    checks = {
        "sentinels": GateCheck(passed=sentinels.passed, reason="; ".join(sentinels.reasons) or None),
    }
    if base is not None:
        checks[CLIP_CONSISTENCY] = _clip_check(
            metrics.get(CLIP_CONSISTENCY),
            base.get(CLIP_CONSISTENCY),
            preset_number(plan.scoring, "gate.clip_tolerance", CLIP_TOLERANCE),
        )
    return Gate(feasible=all(check.passed is not False for check in checks.values()), checks=checks)


def preset_number(scoring: ScoringPreset, name: str, default: float) -> float:
    """Return a figure of the plan's scoring preset.

    Raises:
        SettingsError: it is no number.
    """
    value = scoring.values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SettingsError(f"scoring preset {scoring.name}: {name}", value, "write a number")
    return float(value)


def _clip_check(lora: Metric | None, base: Metric | None, tolerance: float) -> GateCheck:
    if lora is None or base is None:
        return GateCheck(passed=None, limit=-tolerance, reason="not measured: the study's --metrics leaves it out")
    for metric in (lora, base):
        if metric.status != "ok":
            return GateCheck(passed=None, limit=-tolerance, reason=f"{metric.status}: {metric.reason}")
    values, base_values = _values(lora), _values(base)
    if len(values) < FEWEST_PAIRS:
        few = f"{len(values)} pictures are too few to tell; use --num-samples {FEWEST_PAIRS} or more"
        return GateCheck(passed=None, limit=-tolerance, reason=few)
    verdict = gate([], values, base_values, tolerance)
    assert verdict.clip_difference is not None
    return GateCheck(
        passed=verdict.passed,
        value=verdict.clip_difference.high,
        limit=-tolerance,
        reason="; ".join(verdict.reasons) or None,
    )


def _values(metric: Metric) -> list[float]:
    assert metric.per_image is not None, "only metrics with one value per picture are asked for"
    return [value for value in metric.per_image if value is not None]

"""What is measured and how it becomes a score; frozen in the plan, so an edited preset changes no running study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shared.errors import SettingsError, UnknownPluginError
from shared.model_folders import digest_model
from shared.schemas.base import Scalar
from shared.schemas.plan import EvaluationPlan, ScoringPreset

METRIC_SOURCES = ("clip_consistency", "pixels")
"""What a study measures unless told otherwise; the evaluator's registry holds one metric for each name."""
PIXELS = "pixels"
CLIP_CONSISTENCY = "clip_consistency"


def parse_metrics(names: str | None, clip_model: Path | None) -> tuple[str, ...]:
    """Return the metric sources that `--metrics` names, sorted; all of them for None.

    Raises:
        UnknownPluginError: there is no such metric.
        SettingsError: the pixel metrics are left out, or a CLIP is named that nothing would use.
    """
    if names is None:
        return METRIC_SOURCES
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in METRIC_SOURCES:
            raise UnknownPluginError("metric", name, METRIC_SOURCES)
    if PIXELS not in wanted:
        raise SettingsError("--metrics", names, f"the score is computed from {PIXELS}; add it")
    if CLIP_CONSISTENCY not in wanted and clip_model is not None:
        raise SettingsError(
            "--metrics", names, f"--clip-model only serves {CLIP_CONSISTENCY}; add that or leave it out"
        )
    return tuple(sorted(set(wanted)))


def metrics_of(plan: EvaluationPlan) -> tuple[str, ...]:
    """Return the metric sources the plan's study measures.

    Raises:
        UnknownPluginError: the plan was made by a program that knows more metrics.
    """
    recorded = plan.scoring.values.get("metrics")
    return METRIC_SOURCES if recorded is None else parse_metrics(str(recorded), None)


def combined_preset(clip_model: Path | None = None, metrics: Sequence[str] = METRIC_SOURCES) -> ScoringPreset:
    """The default scoring: distance to the brightness and contrast targets, behind the sentinels and the CLIP gate."""
    values: dict[str, Scalar] = {
        "target.brightness": 0.50,
        "target.contrast": 0.20,
        "weight.std": 0.5,
        "gate.clip_tolerance": 0.02,
    }
    if clip_model is not None:
        values["clip_digest"] = digest_model(clip_model, setting="--clip-model")
    if tuple(metrics) != METRIC_SOURCES:  # the default stays unwritten: the plans of earlier studies keep their hash
        values["metrics"] = ",".join(metrics)
    return ScoringPreset(name="combined", objective="combined_score", values=values)

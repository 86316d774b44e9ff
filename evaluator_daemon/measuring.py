"""From pictures to metrics, scores and the gate's verdict, as they are written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evaluator_daemon.metrics.base import MetricSource, RenderedSet
from evaluator_daemon.metrics.pixels import pixel_statistics, sentinel
from shared.metric_names import CLIP_CONSISTENCY
from shared.schemas import EvaluationPlan, Gate, GateCheck, Metric, Score
from shared.scores.formulas import CLIP_TOLERANCE, gate
from shared.scores.from_values import preset_number, scores_from_values, values_of

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

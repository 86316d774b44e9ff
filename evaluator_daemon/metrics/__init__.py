"""One file per metric. A metric that cannot be computed is unavailable with a reason, never 0."""

from __future__ import annotations

from collections.abc import Callable

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import MetricSource
from shared.registry import Registry

METRICS: Registry[Callable[[Job], MetricSource]] = Registry(
    "metric",
    MetricSource,
    {
        "pixels": "evaluator_daemon.metrics.pixels:PixelMetrics",
        "clip_consistency": "evaluator_daemon.metrics.clip_consistency:ClipConsistency",
    },
)

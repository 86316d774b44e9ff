"""One file per metric. A metric that cannot be computed is unavailable with a reason, never 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import Facts, MetricSource, require_planned, why_no_clip, why_no_dino
from shared.metric_names import Inputs
from shared.registry import Registry
from shared.scoring_presets import metrics_of


class MetricPlugin(Protocol):
    """The class of a metric: called with the job it is a `MetricSource`."""

    facts: Facts

    @staticmethod
    def why_not(inputs: Inputs) -> str: ...

    def __call__(self, job: Job) -> MetricSource: ...


METRICS: Registry[Callable[[Job], MetricSource]] = Registry(
    "metric",
    MetricSource,
    {
        "pixels": "evaluator_daemon.metrics.pixels:PixelMetrics",
        "clip_consistency": "evaluator_daemon.metrics.clip_consistency:ClipConsistency",
        "clip_image": "evaluator_daemon.metrics.clip_image:ClipImage",
        "dino_likeness": "evaluator_daemon.metrics.dino_likeness:DinoLikeness",
        "lpips_diversity": "evaluator_daemon.metrics.lpips_diversity:LpipsDiversity",
        "memorisation": "evaluator_daemon.metrics.memorisation:Memorisation",
        "style_distance": "evaluator_daemon.metrics.style_distance:StyleDistance",
    },
)


def load_metrics(job: Job) -> list[MetricSource]:
    """Return what the plan measures with, ready for use.

    Raises:
        ResourceError: a network that the plan was made with is not there any more, or cannot be loaded now.
        StudyMismatchError: a picture that is compared with is not what the study began with.
    """
    why_not = {
        "clip_digest": why_no_clip,
        "dino_digest": why_no_dino,
        "lpips_digest": plugin("lpips_diversity").why_not,
    }
    for identity, look in why_not.items():
        require_planned(job, identity, look(job))
    return [METRICS.load(name)(job) for name in metrics_of(job.plan)]


def plugin(name: str) -> MetricPlugin:
    """Return the class of a metric, for what it says about itself; no network library is imported.

    Raises:
        UnknownPluginError: there is no such metric.
    """
    return cast("MetricPlugin", METRICS.load(name))

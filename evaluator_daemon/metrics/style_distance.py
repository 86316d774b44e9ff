"""How far the look of the pictures is from the held-out pictures' look, whatever they show.

Style as channel statistics of a network's early layers, mean and standard deviation over places, as in AdaIN (Huang and
Belongie 2017, arXiv:1703.06868), the diagonal of the Gram matrices of Gatys et al. 2016. The statistics are pooled over
the whole set: of single pictures, those that show nothing lie nearest to the middle of a varied reference and would
win. The network is the vision tower of the study's own CLIP, so nothing else is needed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import (
    Facts,
    Quantity,
    RenderedSet,
    all_unavailable,
    measured,
    why_no_clip,
    why_no_held_out,
)
from evaluator_daemon.metrics.clip_consistency import ClipConsistency
from shared.metric_names import Inputs
from shared.schemas import Metric

if TYPE_CHECKING:
    from torch import Tensor

NAME = "style_distance"


class StyleDistance:
    """Unavailable without a CLIP or without held-out pictures."""

    facts = Facts(
        version="1",
        quantities={
            NAME: Quantity(
                "minimise",
                0.0,
                math.inf,
                "distance of the set's look to the held-out pictures'; per picture its contribution",
            )
        },
        source="channel statistics as in AdaIN, arXiv:1703.06868, of the first half of CLIP's vision layers",
        code_licence=ClipConsistency.facts.code_licence,
        weights=ClipConsistency.facts.weights,
        weights_licence=ClipConsistency.facts.weights_licence,
        get=ClipConsistency.facts.get,
        needs=("--clip-model", "held-out pictures"),
    )

    def __init__(self, job: Job) -> None:
        self._why_not = self.why_not(job)
        if self._why_not:
            return
        from evaluator_daemon.metrics.networks import clip_of, reference_moments

        self._clip, self._why_not = clip_of(job)
        if self._clip is not None:
            self._look = reference_moments(self._clip, job.pictures.held_out, job)

    @staticmethod
    def why_not(inputs: Inputs) -> str:
        return why_no_clip(inputs) or why_no_held_out(inputs)

    def measure(self, rendered: RenderedSet) -> dict[str, Metric]:
        if self._why_not or self._clip is None:
            return all_unavailable(self.facts, self._why_not)
        from evaluator_daemon.metrics.networks import channel_moments

        moments = channel_moments(self._clip, rendered.pictures)
        return {NAME: measured(_contributions(moments, self._look), "minimise")}


def _contributions(moments: Tensor, look: Tensor) -> list[float]:
    """Share the distance of the set out among its pictures.

    The mean of the contributions is the distance of the whole set; the mean without picture i differs from it as the
    distance without picture i does (the jackknife's pseudo-values), so that errors and paired comparisons hold.
    """
    import torch

    from evaluator_daemon.metrics.networks import moments_distance

    whole, count = moments_distance(moments, look), len(moments)
    if count == 1:
        return [whole]
    without = [moments_distance(moments[torch.arange(count) != i], look) for i in range(count)]
    middle = sum(without) / count
    return [whole + (count - 1) * (middle - left) for left in without]

"""CLIP-I: how like the held-out pictures each picture is to CLIP, the mean cosine of their embeddings.

Mean over the pairs as in Ruiz et al. 2023 (DreamBooth), arXiv:2208.12242; the maximum would reward one lucky pair.
"""

from __future__ import annotations

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

NAME = "clip_image"


class ClipImage:
    """Unavailable without a CLIP or without held-out pictures."""

    facts = Facts(
        version="1",
        quantities={NAME: Quantity("maximise", -1.0, 1.0, "mean cosine with the held-out pictures")},
        source="CLIP-I of Ruiz et al. 2023, arXiv:2208.12242",
        code_licence=ClipConsistency.facts.code_licence,
        weights=ClipConsistency.facts.weights,
        weights_licence=ClipConsistency.facts.weights_licence,
        get=ClipConsistency.facts.get,
        needs=("--clip-model", "held-out pictures"),
    )

    def __init__(self, job: Job) -> None:
        self._why_not = self.why_not(job)
        if not self._why_not:
            from evaluator_daemon.metrics.networks import clip_of, reference_embeddings

            self._clip, self._why_not = clip_of(job)
            if self._clip is not None:
                self._held_out = reference_embeddings(self._clip, job.pictures.held_out, job)

    @staticmethod
    def why_not(inputs: Inputs) -> str:
        return why_no_clip(inputs) or why_no_held_out(inputs)

    def measure(self, rendered: RenderedSet) -> dict[str, Metric]:
        if self._why_not or self._clip is None:
            return all_unavailable(self.facts, self._why_not)
        cosines = self._clip.embed(rendered.pictures).cpu() @ self._held_out.T
        return {NAME: measured(cosines.double().mean(dim=1).tolist(), "maximise")}

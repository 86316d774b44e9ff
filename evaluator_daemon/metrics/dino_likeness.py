"""How like the held-out pictures each picture is to DINOv2: the mean cosine of the class-token embeddings.

DreamBooth's DINO score (Ruiz et al. 2023, arXiv:2208.12242: the average pairwise cosine of generated and real
pictures) with DINOv2 (Oquab et al. 2023, arXiv:2304.07193) in DINO's place.
"""

from __future__ import annotations

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import (
    Facts,
    Quantity,
    RenderedSet,
    all_unavailable,
    measured,
    why_no_dino,
    why_no_held_out,
)
from shared.metric_names import Inputs
from shared.schemas import Metric

NAME = "dino_likeness"


class DinoLikeness:
    """Unavailable without a DINOv2 or without held-out pictures."""

    facts = Facts(
        version="1",
        quantities={NAME: Quantity("maximise", -1.0, 1.0, "mean cosine with the held-out pictures")},
        source="the DINO score of Ruiz et al. 2023, arXiv:2208.12242, by DINOv2, arXiv:2304.07193",
        code_licence="Apache-2.0 (transformers)",
        weights="any DINOv2 in transformers' layout, e.g. facebook/dinov2-base",
        weights_licence="Apache-2.0",
        get="download the model's folder from huggingface.co/facebook/dinov2-base and name it by --dino-model",
        needs=("--dino-model", "held-out pictures"),
    )

    def __init__(self, job: Job) -> None:
        self._why_not = self.why_not(job)
        if not self._why_not:
            from evaluator_daemon.metrics.networks import dino_of, reference_embeddings

            self._dino, self._why_not = dino_of(job)
            if self._dino is not None:
                self._held_out = reference_embeddings(self._dino, job.pictures.held_out, job)

    @staticmethod
    def why_not(inputs: Inputs) -> str:
        return why_no_dino(inputs) or why_no_held_out(inputs)

    def measure(self, rendered: RenderedSet) -> dict[str, Metric]:
        if self._why_not or self._dino is None:
            return all_unavailable(self.facts, self._why_not)
        cosines = self._dino.embed(rendered.pictures).cpu() @ self._held_out.T
        return {NAME: measured(cosines.double().mean(dim=1).tolist(), "maximise")}

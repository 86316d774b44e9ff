"""Does the LoRA copy its training pictures? An alarm, no part of any score.

For each picture the cosine to the nearest training picture, by DINOv2 where there is one, else by CLIP: copy detection
by nearest embedding as in Somepalli et al. 2023, arXiv:2212.03860. A style brings every picture nearer to the training
set, and so does the prompt alone: what the base model reaches with the same prompt and seed is subtracted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import (
    Facts,
    Quantity,
    RenderedSet,
    all_unavailable,
    measured,
    why_no_clip,
    why_no_dino,
)
from evaluator_daemon.metrics.clip_consistency import ClipConsistency
from evaluator_daemon.metrics.dino_likeness import DinoLikeness
from shared.metric_names import Inputs
from shared.schemas import Metric

if TYPE_CHECKING:
    from evaluator_daemon.metrics.networks import Embedder

NAME = "memorisation"
NEAREST = "nearest_training"
COPIES = "copies"
CLOSE_PAIRS_QUANTILE = 0.95


class Memorisation:
    """Unavailable without a network or without knowing the training pictures."""

    facts = Facts(
        version="1",
        quantities={
            NEAREST: Quantity("minimise", -1.0, 1.0, "cosine with the nearest training picture"),
            NAME: Quantity("minimise", -2.0, 2.0, "that cosine minus the base model's for the same prompt and seed"),
            COPIES: Quantity(
                "minimise",
                0.0,
                1.0,
                "1 where a picture is nearer to a training picture than 95 % of those are to one another, and nearer "
                "than the base model's",
            ),
        },
        source="nearest training picture as in Somepalli et al. 2023, arXiv:2212.03860; the difference is this "
        "program's own",
        code_licence="Apache-2.0 (transformers)",
        weights=f"{DinoLikeness.facts.weights}; else {ClipConsistency.facts.weights}",
        weights_licence=f"{DinoLikeness.facts.weights_licence}; {ClipConsistency.facts.weights_licence}",
        get=f"{DinoLikeness.facts.get}; or {ClipConsistency.facts.get}",
        needs=("--dino-model or --clip-model", "training pictures"),
    )

    def __init__(self, job: Job) -> None:
        self._why_not = self.why_not(job)
        if self._why_not:
            return
        from evaluator_daemon.metrics.networks import clip_of, dino_of, nearest_neighbours, reference_embeddings

        self._network: Embedder | None
        self._uses = "clip" if why_no_dino(job) else "dino"
        self._network, self._why_not = clip_of(job) if self._uses == "clip" else dino_of(job)
        if self._network is not None:
            self._training = reference_embeddings(self._network, job.pictures.training, job)
            self._files = [Path(picture.path).name for picture in job.pictures.training]
            # how near training pictures are to one another by nature
            self._close = float(nearest_neighbours(self._training).quantile(CLOSE_PAIRS_QUANTILE))

    @staticmethod
    def why_not(inputs: Inputs) -> str:
        if why_no_dino(inputs) and (no_clip := why_no_clip(inputs)):
            return f"{why_no_dino(inputs)}, and {no_clip}" if inputs.dino_model else no_clip
        if not inputs.pictures.training:
            return "the training pictures are not known; only a study's run.json lists them"
        return ""

    def measure(self, rendered: RenderedSet) -> dict[str, Metric]:
        if self._why_not or self._network is None:
            return all_unavailable(self.facts, self._why_not)
        version = f"{self.facts.version} ({self._uses})"
        nearest, where = (self._network.embed(rendered.pictures).cpu() @ self._training.T).max(dim=1)
        names = [self._files[index] for index in where.tolist()]
        metrics = {NEAREST: measured(nearest.tolist(), "minimise", version, names)}
        if rendered.base is not None:
            base = (self._network.embed(rendered.base).cpu() @ self._training.T).max(dim=1).values
            metrics[NAME] = measured((nearest - base).tolist(), "minimise", version, names)
            copies = (nearest > self._close) & (nearest > base)
            metrics[COPIES] = measured(copies.double().tolist(), "minimise", version)
        return metrics

"""How well each picture shows its prompt, by CLIP: the cosine between the embeddings of both, and its margin.

The cosine follows Hessel et al. 2021, arXiv:2104.08718, without its factor 2.5. The margin compares it with the
cosines of the same picture and the other prompts of the grid: what all prompts share, such as the style's name or the
level of this CLIP's cosines, cancels out.
"""

from __future__ import annotations

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import (
    Facts,
    Quantity,
    RenderedSet,
    all_unavailable,
    measured,
    unavailable,
    why_no_clip,
)
from shared.metric_names import Inputs
from shared.schemas import Metric

NAME = "clip_consistency"
MARGIN = "prompt_margin"


class ClipConsistency:
    """Unavailable where no CLIP is configured or its folder cannot be loaded."""

    facts = Facts(
        version="1",
        quantities={
            NAME: Quantity("maximise", -1.0, 1.0, "cosine of each picture with its prompt"),
            MARGIN: Quantity("maximise", -2.0, 2.0, "that cosine minus the mean over the grid's other prompts"),
        },
        source="Hessel et al. 2021, arXiv:2104.08718, without its factor 2.5; the margin is this program's own",
        code_licence="Apache-2.0 (transformers)",
        weights="any CLIP in transformers' layout, e.g. openai/clip-vit-large-patch14",
        weights_licence="MIT for OpenAI's; other CLIPs have their own",
        get="download the model's folder from huggingface.co/openai/clip-vit-large-patch14 and name it by --clip-model",
        needs=("--clip-model",),
    )

    def __init__(self, job: Job) -> None:
        self._why_not = self.why_not(job)
        if not self._why_not:
            from evaluator_daemon.metrics.networks import clip_of

            self._clip, self._why_not = clip_of(job)

    @staticmethod
    def why_not(inputs: Inputs) -> str:
        return why_no_clip(inputs)

    def measure(self, rendered: RenderedSet) -> dict[str, Metric]:
        if self._why_not or self._clip is None:
            return all_unavailable(self.facts, self._why_not)
        prompts = list(dict.fromkeys(rendered.prompts))
        cosines = (self._clip.embed(rendered.pictures) @ self._clip.embed_texts(prompts).T).cpu().double()
        own = [float(cosines[i, prompts.index(prompt)]) for i, prompt in enumerate(rendered.prompts)]
        metrics = {NAME: measured(own, "maximise")}
        if len(prompts) == 1:
            metrics[MARGIN] = unavailable("all pictures have the same prompt; give the study several", "maximise")
        else:
            sums = cosines.sum(dim=1).tolist()
            others = [(total - mine) / (len(prompts) - 1) for total, mine in zip(sums, own, strict=True)]
            metrics[MARGIN] = measured([mine - other for mine, other in zip(own, others, strict=True)], "maximise")
        return metrics

"""How well each picture shows its prompt, by CLIP: the cosine between both, and the probability of its own prompt.

The cosine follows Hessel et al. 2021, arXiv:2104.08718, without its factor 2.5; its level depends on the CLIP and on
whether that knows the style's name. The probability is CLIP's own classifier (Radford et al. 2021, arXiv:2103.00020)
over the prompts of the grid, at the temperature it was trained with: what all prompts share cancels out, and every
CLIP has the scale 0-1.
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
MATCH = "prompt_match"


class ClipConsistency:
    """Unavailable where no CLIP is configured or its folder cannot be loaded."""

    facts = Facts(
        version="1",
        quantities={
            NAME: Quantity("maximise", -1.0, 1.0, "cosine of each picture with its prompt"),
            MATCH: Quantity("maximise", 0.0, 1.0, "probability of its own among the grid's prompts"),
        },
        source="Hessel et al. 2021, arXiv:2104.08718, without its factor 2.5; prompt_match: arXiv:2103.00020",
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
            metrics[MATCH] = unavailable("all pictures have the same prompt; give the study several", "maximise")
        else:
            odds = (cosines * self._clip.temperature).softmax(dim=1)
            right = [float(odds[i, prompts.index(prompt)]) for i, prompt in enumerate(rendered.prompts)]
            metrics[MATCH] = measured(right, "maximise")
        return metrics

"""The evaluation plan: what makes two scores comparable."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field

from shared.schemas.base import Name, Pixels, Record, Scalar, Sha256, Unit


class ScoringPreset(Record):
    """How measurements become scores, copied into the plan so that an edited preset file changes nothing."""

    name: Name = Field(description="Name of the preset.")
    objective: Name = Field(description="Name of the score the study optimises.")
    values: dict[str, Scalar] = Field(
        description="Every target, weight, range and limit of the preset by its dotted name."
    )


class EvaluationPlan(Record):
    """Everything that decides the pixels and the scores of a checkpoint; equal plans give comparable scores."""

    prompts: tuple[Name, ...] = Field(min_length=1, description="Prompts; sample i renders prompt i mod P.")
    negative_prompt: str = Field(description="Negative prompt of every sample; empty for none.")
    num_samples: Annotated[int, Unit("images")] = Field(ge=1, description="Images per checkpoint.")
    base_seed: int = Field(ge=0, description="Seed; sample i uses base_seed + i div P, P being the number of prompts.")
    width: Pixels = Field(description="Image width.")
    height: Pixels = Field(description="Image height.")
    steps: int = Field(ge=1, description="Sampling steps.")
    sampler: Name = Field(description='Image sampler, e.g. "dpmpp_2m_karras".')
    cfg_scale: float = Field(ge=0, description="Classifier-free guidance scale.")
    clip_skip: int = Field(ge=1, description="Which text encoder layer from the end is used; 1 is the last.")
    base_digest: Sha256 = Field(description="Content of the base model.")
    vae_digest: Sha256 | None = Field(description="Content of a separate VAE; null for the base model's own.")
    lora_scale: float = Field(description="Strength the LoRA is applied with; 1.0 is as trained.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(description="Number format of the rendering.")
    batch_size: Annotated[int, Unit("images")] = Field(ge=1, description="Images rendered at once; it changes pixels.")
    scoring: ScoringPreset = Field(description="The scoring preset.")

    def digest(self) -> str:
        """Return the plan's identity, the SHA-256 of its compact JSON with sorted keys.

        Values at their default are left out: a field that a later version adds with a default keeps old plans equal.
        """
        plan = self.model_dump(mode="json", exclude_defaults=True)
        text = json.dumps(plan, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def sample(self, index: int) -> tuple[str, int]:
        """Return the prompt and the seed of sample `index`, counted from 0."""
        return self.prompts[index % len(self.prompts)], self.base_seed + index // len(self.prompts)

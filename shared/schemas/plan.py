"""The evaluation plan: what makes two scores comparable."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, model_validator

from shared.schemas.base import Name, Pixels, Record, Scalar, Sha256, Unit

T = TypeVar("T")

SEEDS_END = 2**63
"""Every seed is below this: random generators take no larger ones."""


class ScoringPreset(Record):
    """How measurements become scores, copied into the plan so that an edited preset file changes nothing."""

    name: Name = Field(description="Name of the preset.")
    objective: Name = Field(description="Name of the score the study optimises.")
    values: dict[str, Scalar] = Field(
        description="Every target, weight, range and limit of the preset by its dotted name."
    )


class PromptOptions(Record):
    """What the samples of one prompt have of their own; null where the plan's value holds."""

    negative_prompt: str | None = Field(default=None, description="Negative prompt; empty for none.")
    seed: int | None = Field(
        default=None, ge=0, description="Seed in place of base_seed; sample i uses seed + i div P."
    )
    width: Pixels | None = Field(default=None, description="Image width.")
    height: Pixels | None = Field(default=None, description="Image height.")
    steps: int | None = Field(default=None, ge=1, description="Sampling steps.")
    sampler: Name | None = Field(default=None, description="Image sampler.")
    cfg_scale: float | None = Field(default=None, ge=0, description="Classifier-free guidance scale.")


@dataclass(frozen=True)
class PlannedSample:
    """One picture to render, with every value that holds for it; width and height in pixels."""

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    steps: int
    sampler: str
    cfg_scale: float

    @property
    def shape_of_work(self) -> tuple[int, int, int, str, float]:
        """What samples of one batch must have in common."""
        return self.width, self.height, self.steps, self.sampler, self.cfg_scale


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
    overrides: tuple[PromptOptions, ...] = Field(
        default=(), description="Options of each prompt in the prompts' order; empty when none has any."
    )

    @model_validator(mode="after")
    def _one_for_each_prompt(self) -> Self:
        if self.overrides and len(self.overrides) != len(self.prompts):
            raise ValueError(f"there are {len(self.overrides)} overrides for {len(self.prompts)} prompts")
        return self

    def digest(self) -> str:
        """Return the plan's identity, the SHA-256 of its compact JSON with sorted keys.

        Values at their default are left out: a field that a later version adds with a default keeps old plans equal.
        """
        plan = self.model_dump(mode="json", exclude_defaults=True)
        text = json.dumps(plan, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def sample(self, index: int) -> PlannedSample:
        """Return sample `index`, counted from 0, with all its effective values."""
        turn, which = divmod(index, len(self.prompts))
        own = self.overrides[which] if self.overrides else PromptOptions()

        def either(mine: T | None, plans: T) -> T:
            return plans if mine is None else mine

        return PlannedSample(
            prompt=self.prompts[which],
            negative_prompt=either(own.negative_prompt, self.negative_prompt),
            seed=(either(own.seed, self.base_seed) + turn) % SEEDS_END,
            width=either(own.width, self.width),
            height=either(own.height, self.height),
            steps=either(own.steps, self.steps),
            sampler=either(own.sampler, self.sampler),
            cfg_scale=either(own.cfg_scale, self.cfg_scale),
        )

    def batches(self, batch_size: int) -> tuple[tuple[int, ...], ...]:
        """Divide the samples into batches of at most `batch_size`, by nothing but the plan: batching changes pixels.

        Samples of one size, sampler, number of steps and guidance go together, in the order of their indices; the
        groups come in the order of their first sample.

        Returns:
            The indices of each batch; every index occurs once.
        """
        groups: dict[tuple[int, int, int, str, float], list[int]] = {}
        for index in range(self.num_samples):
            groups.setdefault(self.sample(index).shape_of_work, []).append(index)
        return tuple(
            tuple(group[start : start + batch_size])
            for group in groups.values()
            for start in range(0, len(group), batch_size)
        )

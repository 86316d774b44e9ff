"""From a base model, prompts and a device to the evaluation plan. Both daemons make plans here, so equal input gives
equal plans; nothing here imports a network library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from shared.devices import default_dtype
from shared.metric_names import METRIC_SOURCES
from shared.model_folders import default_size, digest_model, vae_factor
from shared.prompts import MULTIPLE_PX, Prompt, require_multiple
from shared.samplers import DEFAULT_SAMPLER
from shared.schemas.plan import EvaluationPlan, PromptOptions, ScoringPreset
from shared.scoring_presets import combined_preset

STEPS = 20
SAMPLER = DEFAULT_SAMPLER
CFG_SCALE = 7.5
BASE_SEED = 42
NUM_SAMPLES = 8


def make_plan(
    *,
    base_model: Path,
    prompts: Sequence[str | Prompt],
    device: str = "auto",
    num_samples: int = NUM_SAMPLES,
    steps: int = STEPS,
    cfg_scale: float = CFG_SCALE,
    clip_skip: int = 1,
    lora_scale: float = 1.0,
    base_seed: int = BASE_SEED,
    clip_model: Path | None = None,
    metrics: Sequence[str] = METRIC_SOURCES,
    scoring: ScoringPreset | None = None,
) -> EvaluationPlan:
    """Freeze everything that decides a checkpoint's pixels and scores; settings beyond these have their defaults.

    Args:
        base_model: diffusers folder or single file.
        prompts: with options of their own where they are no plain text.
        device: decides the number format only; "auto", "cpu", "cuda" or "cuda:N".
        clip_skip: the training's, 1 for the text encoder's last layer.
        lora_scale: strength the LoRA is applied with; 1 is as trained.
        clip_model: local CLIP folder, None to do without CLIP consistency.
        metrics: what is measured, from `parse_metrics`.
        scoring: a whole scoring from `plan_scoring`; without one the default preset with `clip_model` and `metrics`.
    Raises:
        SettingsError: the base model or the CLIP is not usable, or it cannot render the size of a prompt.
    """
    width, height = default_size(base_model)
    asked = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    require_multiple(asked, math.lcm(MULTIPLE_PX, vae_factor(base_model)))
    plan = EvaluationPlan(
        prompts=tuple(prompt.text for prompt in asked),
        negative_prompt="",
        num_samples=num_samples,
        base_seed=base_seed,
        width=width,
        height=height,
        steps=steps,
        sampler=SAMPLER,
        cfg_scale=cfg_scale,
        clip_skip=clip_skip,
        base_digest=digest_model(base_model),
        vae_digest=None,
        lora_scale=lora_scale,
        dtype=default_dtype(device),
        batch_size=num_samples,
        scoring=scoring or combined_preset(clip_model, metrics),
    )
    return plan.model_copy(update={"overrides": overrides_of(asked, plan)})


def overrides_of(prompts: Sequence[Prompt], plan: EvaluationPlan) -> tuple[PromptOptions, ...]:
    """Return what the prompts have of their own beyond the plan; what the plan has anyway is no override.

    So equal pictures have equal plans, however a prompt file puts it.
    """
    usual = {name: getattr(plan, "base_seed" if name == "seed" else name) for name in PromptOptions.model_fields}
    own = tuple(
        PromptOptions(**{name: value for name, value in prompt.options if value is not None and value != usual[name]})
        for prompt in prompts
    )
    return own if any(options != PromptOptions() for options in own) else ()

"""From a base model, prompts and a device to the evaluation plan. Both daemons make plans here, so equal input gives
equal plans; nothing here imports a network library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shared.devices import default_dtype
from shared.metric_names import METRIC_SOURCES
from shared.model_folders import default_size, digest_model
from shared.schemas.plan import EvaluationPlan, ScoringPreset
from shared.scoring_presets import combined_preset

STEPS = 20
SAMPLER = "dpmpp_2m_karras"
CFG_SCALE = 7.5
BASE_SEED = 42
NUM_SAMPLES = 8


def make_plan(
    *,
    base_model: Path,
    prompts: Sequence[str],
    device: str = "auto",
    num_samples: int = NUM_SAMPLES,
    steps: int = STEPS,
    cfg_scale: float = CFG_SCALE,
    clip_skip: int = 1,
    base_seed: int = BASE_SEED,
    clip_model: Path | None = None,
    metrics: Sequence[str] = METRIC_SOURCES,
    scoring: ScoringPreset | None = None,
) -> EvaluationPlan:
    """Freeze everything that decides a checkpoint's pixels and scores; settings beyond these have their defaults.

    Args:
        base_model: diffusers folder.
        device: decides the number format only; "auto", "cpu", "cuda" or "cuda:N".
        clip_skip: the training's, 1 for the text encoder's last layer.
        clip_model: local CLIP folder, None to do without CLIP consistency.
        metrics: what is measured, from `parse_metrics`.
        scoring: a whole scoring from `plan_scoring`; without one the default preset with `clip_model` and `metrics`.
    Raises:
        SettingsError: the base model or the CLIP is not usable.
    """
    width, height = default_size(base_model)
    return EvaluationPlan(
        prompts=tuple(prompts),
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
        lora_scale=1.0,
        dtype=default_dtype(device),
        batch_size=num_samples,
        scoring=scoring or combined_preset(clip_model, metrics),
    )

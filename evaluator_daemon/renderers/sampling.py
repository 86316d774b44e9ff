"""From noise to pictures: the denoising loop of the plan's sampler."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from numpy.typing import NDArray

from evaluator_daemon.renderers.base import OnStep
from evaluator_daemon.renderers.families import StableDiffusion, TextEmbedding
from shared.errors import UnknownPluginError

# name in the plan -> diffusers scheduler and its options
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpmpp_2m_karras": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
}


def require_sampler(name: str) -> None:
    """Refuse a sampler that nobody wrote.

    Raises:
        UnknownPluginError: so it is.
    """
    if name not in SAMPLERS:
        raise UnknownPluginError("image sampler", name, SAMPLERS)


def make_scheduler(name: str, of_model: Any) -> Any:
    """Return the sampler with the noise schedule the base model was trained with."""
    scheduler, options = SAMPLERS[name]
    return scheduler.from_config(of_model.config, **options)


def noise(shape: tuple[int, int, int], seeds: Sequence[int]) -> torch.Tensor:
    """(n, channels, h, w) float32 on the CPU, one generator per picture: device and batch do not choose the noise."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def denoise(
    family: StableDiffusion,
    scheduler: Any,
    latents: torch.Tensor,
    text: TextEmbedding,
    negative: TextEmbedding,
    *,
    steps: int,
    guidance: float,
    on_step: OnStep,
) -> torch.Tensor:
    """Turn noise into latents of pictures.

    Args:
        latents: (n, channels, h, w) standard noise, on the UNet's device and in its number format.
        text: of the n prompts.
        negative: of the n negative prompts; not used up to a guidance of 1.
        guidance: classifier-free guidance scale.
        on_step: called after every step.
    """
    unet, factor = family.pipeline.unet, family.pipeline.vae_scale_factor
    guided = guidance > 1
    told = TextEmbedding.stacked([negative, text]) if guided else text
    conditions = family.conditions(told, latents.shape[-1] * factor, latents.shape[-2] * factor)
    with warnings.catch_warnings():
        # diffusers' scheduler turns tensors into arrays in a way that numpy 2 deprecates
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy", DeprecationWarning)
        scheduler.set_timesteps(steps, device=latents.device)
    if hasattr(scheduler, "set_begin_index"):  # DDIM counts without one
        scheduler.set_begin_index(0)  # else the first step waits for the device, to find itself in the list
    latents = latents * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        noisy = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, time)
        predicted = unet(
            noisy,
            time,
            encoder_hidden_states=told.states,
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
        if guided:
            without, with_text = predicted.chunk(2)
            predicted = without + guidance * (with_text - without)
        latents = scheduler.step(predicted, time, latents, return_dict=False)[0]
        on_step()
    return latents


def decode(vae: Any, latents: torch.Tensor) -> list[NDArray[np.uint8]]:
    """Return each picture as (height, width, 3) uint8 sRGB; one with a NaN is all black, which a sentinel reports."""
    mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and deviation is not None:
        shift, scale = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, deviation))
        latents = latents * scale / vae.config.scaling_factor + shift
    else:
        latents = latents / vae.config.scaling_factor
    images = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
    images = (images / 2 + 0.5).clamp(0, 1)
    images[images.isnan().flatten(1).any(1)] = 0
    return list((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy())

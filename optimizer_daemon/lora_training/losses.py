"""The diffusion objective as small pure functions.

Shapes: x stands for (batch, channels, height, width); everything else is (batch,). All of it is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process x_t = signal(t) * x_0 + sigma(t) * noise.

    Args:
        signal: (steps,) square root of the cumulative product of alphas, falling.
        sigma: (steps,) square root of 1 - signal**2.
    """

    signal: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, alphas_cumprod: Tensor, device: torch.device) -> NoiseSchedule:
        """Return the schedule of a diffusers scheduler's `alphas_cumprod`, (steps,)."""
        kept = alphas_cumprod.double()
        return cls(kept.sqrt().float().to(device), (1.0 - kept).sqrt().float().to(device))

    @property
    def steps(self) -> int:
        return len(self.signal)

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return x_t for clean latents x and noise x at integer `times`."""
        return _over(self.signal[times]) * clean + _over(self.sigma[times]) * noise

    def velocity(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return what a velocity-predicting model must say. Source: Salimans & Ho 2022, arXiv:2202.00512."""
        return _over(self.signal[times]) * noise - _over(self.sigma[times]) * clean

    def snr(self, times: Tensor) -> Tensor:
        """Return signal**2 / sigma**2, a ratio, not decibels; 0 at the last step of a zero-terminal-SNR schedule."""
        return (self.signal[times] / self.sigma[times]).square()


def draw_noise(clean: Tensor, offset: float | None) -> Tensor:
    """Return noise like `clean` from torch's global generator.

    Args:
        clean: x.
        offset: strength of noise that is constant over each channel; None and 0 draw none.
    Source: N. Guttenberg, "Diffusion with Offset Noise", 2023.
    """
    noise = torch.randn_like(clean)
    if offset:
        noise = noise + offset * torch.randn((*clean.shape[:2], 1, 1), device=clean.device, dtype=clean.dtype)
    return noise


def min_snr_weight(snr: Tensor, gamma: float, *, predicts_velocity: bool) -> Tensor:
    """Weight samples so that almost clean ones do not dominate.

    Args:
        snr: >= 0.
        gamma: > 0; the SNR above which weights fall.
    Returns:
        min(snr, gamma) / snr for noise, min(snr, gamma) / (snr + 1) for velocity.
    Source: Hang et al. 2023, arXiv:2303.09556, as sd-scripts applies it.
    """
    if predicts_velocity:
        return snr.clamp(max=gamma) / (snr + 1.0)
    return (gamma / snr).clamp(max=1.0)


def denoising_loss(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean over the batch of each sample's mean squared error times its weight; a scalar, float32."""
    per_sample = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
    return per_sample.mean() if weights is None else (per_sample * weights).mean()


def _over(per_sample: Tensor) -> Tensor:
    return per_sample[:, None, None, None]

"""The diffusion objective as small pure functions.

Shapes: x stands for (batch, channels, height, width); everything else is (batch,). All of it is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from optimizer_daemon.lora_training.objective_settings import HuberSchedule, LossType

_MOST_SNR = 1000.0  # at the first timestep of some schedules it is infinite


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


def zero_terminal(alphas_cumprod: Tensor) -> Tensor:
    """Return the schedule with its signal shifted and scaled so that the last step has none, the first as before.

    Args:
        alphas_cumprod: (steps,) falling.
    Source: Lin et al. 2023, arXiv:2305.08891, algorithm 1.
    """
    signal = alphas_cumprod.double().sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * (first / (first - last))).square()


def add_offset(noise: Tensor, clean: Tensor, offset: float | Tensor, adaptive: float | None = None) -> Tensor:
    """Return the noise x with more that is constant over each channel.

    Args:
        clean: x, the latents.
        offset: strength of the addition, a number or (1,).
        adaptive: the strength grows by this times the absolute mean of the channel, but is never below 0.
    Source: N. Guttenberg, "Diffusion with Offset Noise", 2023.
    """
    strength = offset
    if adaptive is not None:
        strength = (offset + adaptive * clean.mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0.0)
    return noise + strength * torch.randn((*clean.shape[:2], 1, 1), device=clean.device, dtype=clean.dtype)


def add_coarse_noise(noise: Tensor, iterations: int, discount: float, draw_ratio: Callable[[], float]) -> Tensor:
    """Return the noise x with noise of lower and lower resolution added, at a standard deviation of 1.

    Args:
        iterations: how many are added, fewer where one has a side of one pixel.
        discount: the i-th counts discount**i, from 0.
        draw_ratio: the i-th is smaller by this to the power of i, drawn anew for each.
    Source: J. Whitaker, "Multi-Resolution Noise for Diffusion Model Training", 2023, as sd-scripts applies it.
    """
    rows, columns = noise.shape[2:]
    for level in range(iterations):
        ratio = draw_ratio() ** level
        size = max(1, int(rows / ratio)), max(1, int(columns / ratio))
        coarse = torch.randn((*noise.shape[:2], *size)).to(noise.device)
        noise = noise + functional.interpolate(coarse, (rows, columns), mode="bilinear") * discount**level
        if 1 in size:
            break
    return noise / noise.std()


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


def noise_like_weight(snr: Tensor) -> Tensor:
    """Return snr / (snr + 1): times it, the squared error of the velocity is that of the noise."""
    limited = snr.clamp(max=_MOST_SNR)
    return limited / (limited + 1.0)


def debiased_weight(snr: Tensor, *, predicts_velocity: bool) -> Tensor:
    """Return 1 / sqrt(snr) for noise, 1 / (snr + 1) for velocity.

    Source: Yu et al. 2023, arXiv:2310.08442, as sd-scripts applies it.
    """
    limited = snr.clamp(max=_MOST_SNR)
    return 1.0 / (limited + 1.0) if predicts_velocity else limited.rsqrt()


def huber_threshold(
    times: Tensor, schedule: NoiseSchedule, course: HuberSchedule, lowest: float, scale: float
) -> Tensor:
    """Return the error at which the Huber loss turns from a square into a line, for each sample.

    Args:
        times: of the samples.
        schedule: whose sigma / signal the course "snr" goes by; `scale` does not touch that one, as in sd-scripts.
        course: "exponential" falls from `scale` at time 0 towards lowest * scale at the last.
        lowest: huber_c.
        scale: huber_scale.
    """
    match course:
        case "snr":
            ratio = schedule.sigma[times] / schedule.signal[times]
            return (1.0 - lowest) / (1.0 + ratio).square() + lowest
        case "exponential":
            return torch.exp(math.log(lowest) / schedule.steps * times) * scale
        case "constant":
            return torch.full(times.shape, lowest * scale, device=times.device)


def pixel_loss(predicted: Tensor, target: Tensor, kind: LossType, threshold: Tensor | None = None) -> Tensor:
    """Return the loss of each number, x.

    Args:
        predicted, target: x.
        threshold: of "huber" and "smooth_l1", which are the smooth (pseudo-)Huber loss times 2 * threshold and times 2.
    """
    error = predicted - target
    match kind:
        case "l2":
            return error.square()
        case "l1":
            return error.abs()
        case "huber" | "smooth_l1":
            assert threshold is not None
            bend = _over(threshold)
            smooth = 2.0 * ((error.square() + bend.square()).sqrt() - bend)
            return bend * smooth if kind == "huber" else smooth


def _over(per_sample: Tensor) -> Tensor:
    return per_sample[:, None, None, None]

"""What is asked of the UNet, and how far off its answer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optimizer_daemon.lora_training.losses import (
    NoiseSchedule,
    add_coarse_noise,
    add_offset,
    debiased_weight,
    huber_threshold,
    min_snr_weight,
    noise_like_weight,
    pixel_loss,
    zero_terminal,
)
from optimizer_daemon.lora_training.objective_settings import ObjectiveSettings


@dataclass(frozen=True)
class Question:
    """What the UNet sees of a batch and should say.

    Args:
        noisy: (batch, channels, height, width).
        times: (batch,) timesteps.
        target: as `noisy`.
    """

    noisy: Tensor
    times: Tensor
    target: Tensor


class Objective:
    """The settings' objective on a base model's noise schedule.

    Everything random is drawn from torch's global generators, in the order of sd-scripts: the noise with its offset and
    its coarser parts, the timesteps (on the CPU), the perturbation of the input.

    Args:
        settings: noise, target and loss.
        alphas_cumprod: (steps,) of the base model's scheduler.
        predicts_velocity: the target, else the noise.
        device: of the latents.
    """

    def __init__(
        self, settings: ObjectiveSettings, alphas_cumprod: Tensor, *, predicts_velocity: bool, device: torch.device
    ) -> None:
        self.predicts_velocity = predicts_velocity
        self.draw_ratio: Callable[[], float] = _drawn_ratio
        self._settings = settings
        original = NoiseSchedule.of(alphas_cumprod, device)
        # sd-scripts weighs by the SNR that the schedule had before it was made zero-terminal.
        self._snr = original.snr(torch.arange(original.steps, device=device))
        self._schedule = (
            NoiseSchedule.of(zero_terminal(alphas_cumprod), device) if settings.zero_terminal_snr else original
        )

    @property
    def timesteps(self) -> int:
        """Length of the noise schedule."""
        return self._schedule.steps

    def ask(self, clean: Tensor, times: Tensor | None = None) -> Question:
        """Return a batch with fresh noise.

        Args:
            clean: latents, (batch, channels, height, width).
            times: (batch,) timesteps; drawn if None.
        """
        settings = self._settings
        noise = torch.randn_like(clean)
        offset = _strength(settings.noise_offset, settings.noise_offset_random_strength, clean)
        if offset is not None:
            noise = add_offset(noise, clean, offset, settings.adaptive_noise_scale)
        if settings.multires_noise_iterations:
            noise = add_coarse_noise(
                noise, settings.multires_noise_iterations, settings.multires_noise_discount, self.draw_ratio
            )
        if times is None:
            times = self._draw_times(len(clean)).to(clean.device)
        seen = noise
        perturbation = _strength(settings.ip_noise_gamma, settings.ip_noise_gamma_random_strength, clean)
        if perturbation is not None:
            seen = noise + perturbation * torch.randn_like(clean)
        target = self._schedule.velocity(clean, noise, times) if self.predicts_velocity else noise
        return Question(self._schedule.noisy(clean, seen, times), times, target)

    def loss(self, predicted: Tensor, question: Question, weights: Tensor | None = None) -> Tensor:
        """Return the mean over the batch of each sample's mean loss times its weights; a scalar, float32.

        Args:
            predicted: the UNet's answer, as `question.target`.
            weights: (batch,) of the samples themselves; those of the timesteps come on top.
        """
        settings, times = self._settings, question.times
        threshold = None
        if settings.loss_type in ("huber", "smooth_l1"):
            threshold = huber_threshold(
                times, self._schedule, settings.huber_schedule, settings.huber_c, settings.huber_scale
            )
        losses = pixel_loss(predicted.float(), question.target.float(), settings.loss_type, threshold)
        per_sample = losses.mean(dim=(1, 2, 3))
        if weights is not None:
            per_sample = per_sample * weights
        return self._weighed(per_sample, times).mean()

    def _weighed(self, losses: Tensor, times: Tensor) -> Tensor:
        settings, velocity = self._settings, self.predicts_velocity
        snr = self._snr[times]
        if settings.min_snr_gamma:
            losses = losses * min_snr_weight(snr, settings.min_snr_gamma, predicts_velocity=velocity)
        if settings.scale_v_pred_loss_like_noise_pred:
            losses = losses * noise_like_weight(snr)
        if settings.v_pred_like_loss:
            losses = losses + losses / noise_like_weight(snr) * settings.v_pred_like_loss
        if settings.debiased_estimation_loss:
            losses = losses * debiased_weight(snr, predicts_velocity=velocity)
        return losses

    def _draw_times(self, count: int) -> Tensor:
        first = self._settings.min_timestep or 0
        end = min(self._settings.max_timestep or self._schedule.steps, self._schedule.steps)
        return torch.full((count,), end) if first == end else torch.randint(first, end, (count,))


def _strength(most: float | None, is_random: bool, like: Tensor) -> float | Tensor | None:
    if not most:
        return None
    return torch.rand(1, device=like.device) * most if is_random else most


def _drawn_ratio() -> float:
    """Return how much coarser the next noise is, from 2 to 4."""
    return float(torch.rand(())) * 2.0 + 2.0

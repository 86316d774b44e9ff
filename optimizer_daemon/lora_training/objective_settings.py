"""What the training minimises; kohya's names and meanings."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from optimizer_daemon.lora_training.strict_settings import StrictSettings
from shared.errors import SettingsError

LossType = Literal["l2", "l1", "huber", "smooth_l1"]
HuberSchedule = Literal["snr", "exponential", "constant"]


class ObjectiveSettings(StrictSettings):
    """Noise, target, loss and its weights."""

    clip_skip: int | None = Field(None, ge=1, description="text encoder layer counted from the end; 1 is the last")
    max_token_length: Literal[150, 225] | None = Field(
        None, description="tokens of a caption that count, 150 or 225; 75, what CLIP reads at once, if unset"
    )
    v_parameterization: bool | None = Field(None, description="predict the velocity; as the base model says if unset")
    zero_terminal_snr: bool = Field(
        False, description="rescale the noise schedule so that the last timestep is pure noise; for velocity prediction"
    )
    min_timestep: int | None = Field(None, ge=0, le=999, description="lowest timestep; 0 if unset")
    max_timestep: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="timesteps are below it; 1000 if unset; equal to min_timestep: always that one",
    )
    noise_offset: float | None = Field(None, ge=0, description="strength of the noise common to a channel")
    noise_offset_random_strength: bool = Field(False, description="a strength up to noise_offset for each batch")
    adaptive_noise_scale: float | None = Field(
        None, description="added to noise_offset, times the absolute mean of each channel of the latents"
    )
    multires_noise_iterations: int | None = Field(None, ge=0, description="coarser noises that are added; 0 adds none")
    multires_noise_discount: float = Field(0.3, ge=0, description="each coarser noise counts so much less")
    ip_noise_gamma: float | None = Field(
        None, ge=0, description="strength of noise on the input that the target does not know (input perturbation)"
    )
    ip_noise_gamma_random_strength: bool = Field(False, description="a strength up to ip_noise_gamma for each batch")
    prior_loss_weight: float = Field(1.0, ge=0, description="how much the loss of a regularisation image counts")
    loss_type: LossType = Field("l2", description="l2, l1, huber or smooth_l1")
    huber_schedule: HuberSchedule = Field(
        "snr", description="how the threshold of huber and smooth_l1 goes with the timestep: snr, exponential, constant"
    )
    huber_c: float = Field(0.1, gt=0, description="threshold of huber and smooth_l1: the lowest of its course")
    huber_scale: float = Field(1.0, gt=0, description="factor of a constant or exponential threshold")
    min_snr_gamma: float | None = Field(None, ge=0, description="limits the weight of almost clean timesteps; 0 not")
    scale_v_pred_loss_like_noise_pred: bool = Field(
        False, description="weigh the timesteps of velocity prediction as noise prediction does"
    )
    v_pred_like_loss: float | None = Field(
        None,
        ge=0,
        description="adds so much of a loss weighed as in velocity prediction to that of noise prediction",
    )
    debiased_estimation_loss: bool = Field(False, description="weigh by 1 / sqrt(SNR), with velocity by 1 / (SNR + 1)")

    @model_validator(mode="after")
    def _possible_noise(self) -> Self:
        if self.adaptive_noise_scale is not None and self.noise_offset is None:
            raise ValueError("adaptive_noise_scale needs noise_offset, which is not set; set it or take the scale out")
        lowest, end = self.min_timestep, self.max_timestep
        if lowest is not None and end is not None and lowest > end:
            raise ValueError(f"min_timestep {lowest} lies above max_timestep {end}; lower it")
        return self

    def predicts_velocity(self, base_does: bool) -> bool:
        """Return whether the network predicts the velocity, else the noise.

        Args:
            base_does: the base model was trained to.
        Raises:
            SettingsError: a setting is for the other kind of prediction.
        """
        velocity = base_does if self.v_parameterization is None else self.v_parameterization
        for name in () if velocity else ("zero_terminal_snr", "scale_v_pred_loss_like_noise_pred"):
            if value := getattr(self, name):
                raise SettingsError(name, value, "it is for velocity prediction (v_parameterization); take it out")
        if velocity and self.v_pred_like_loss:
            raise SettingsError("v_pred_like_loss", self.v_pred_like_loss, "it is for noise prediction; take it out")
        return velocity

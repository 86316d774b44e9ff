"""What the training minimises; kohya's names and meanings."""

from __future__ import annotations

from pydantic import Field

from optimizer_daemon.lora_training.strict_settings import StrictSettings


class ObjectiveSettings(StrictSettings):
    """Noise, target, loss and its weights."""

    clip_skip: int | None = Field(None, ge=1, description="text encoder layer counted from the end; 1 is the last")
    v_parameterization: bool | None = Field(None, description="predict the velocity; as the base model says if unset")
    min_snr_gamma: float | None = Field(None, gt=0, description="limits the weight of almost clean steps")
    noise_offset: float | None = Field(None, ge=0, description="strength of the noise common to a channel")

"""The LoRA network; kohya's names and meanings."""

from __future__ import annotations

from pydantic import Field

from optimizer_daemon.lora_training.strict_settings import Rate, StrictSettings


class NetworkSettings(StrictSettings):
    """Size of the LoRA layers, and what is dropped of them in training."""

    network_dim: int = Field(4, ge=1, description="rank")
    network_alpha: Rate = Field(1.0, description="scale is alpha / dim; 0 means dim")
    network_dropout: float | None = Field(None, ge=0, lt=1, description="share of rank neurons dropped at each step")

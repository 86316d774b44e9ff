"""The LoRA network; kohya's names and meanings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from optimizer_daemon.lora_training.strict_settings import Rate, StrictSettings

FilePath = Annotated[Path, BeforeValidator(lambda value: Path(value) if isinstance(value, str) and value else value)]
Share = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(gt=0)]


class NetworkArgs(StrictSettings):
    """What sd-scripts passes to networks.lora by its network_args."""

    conv_dim: int | None = Field(
        default=None,
        ge=1,
        description="rank of 3x3 convolutions, which then get a LoRA as do all layers of their blocks",
    )
    conv_alpha: Rate | None = Field(default=None, description="their alpha; 1 if unset, 0 means conv_dim")
    rank_dropout: Share | None = Field(
        default=None, description="share of ranks dropped for each sample; the rest weighs more"
    )
    module_dropout: Share | None = Field(default=None, description="share of LoRA layers left out at each batch")
    loraplus_lr_ratio: Ratio | None = Field(default=None, description="LoRA+: the up matrices learn so much faster")
    loraplus_unet_lr_ratio: Ratio | None = Field(default=None, description="the same for the UNet alone")
    loraplus_text_encoder_lr_ratio: Ratio | None = Field(default=None, description="the same for text encoders alone")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if isinstance(values, dict) and (unknown := sorted(values.keys() - cls.model_fields.keys())):
            raise ValueError(f"there is no {unknown[0]!r} here; the arguments are {', '.join(cls.model_fields)}")
        return values

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.conv_alpha is not None and self.conv_dim is None:
            raise ValueError("conv_alpha scales layers that conv_dim makes, which is not set; set it too")
        return self

    @property
    def unet_ratio(self) -> float | None:
        """How much faster the UNet's up matrices learn."""
        return self.loraplus_unet_lr_ratio or self.loraplus_lr_ratio

    @property
    def text_encoder_ratio(self) -> float | None:
        """How much faster the text encoders' up matrices learn."""
        return self.loraplus_text_encoder_lr_ratio or self.loraplus_lr_ratio


class NetworkSettings(StrictSettings):
    """Size of the LoRA layers, what is dropped of them in training, and where they begin."""

    network_dim: int = Field(4, ge=1, description="rank")
    network_alpha: Rate = Field(1.0, description="scale is alpha / dim; 0 means dim")
    network_dropout: float | None = Field(None, ge=0, lt=1, description="share of rank neurons dropped at each step")
    network_args: NetworkArgs = Field(default_factory=NetworkArgs, description="further arguments of the network")
    network_weights: FilePath | None = Field(None, description="a LoRA to begin with, of the same layers, rank, alpha")
    network_train_unet_only: bool = Field(False, description="leave the text encoders alone, whatever their rate")
    network_train_text_encoder_only: bool = Field(False, description="leave the UNet alone, whatever its rate")
    scale_weight_norms: float | None = Field(
        None, ge=0, description="after each step no layer's change of the weights has a larger norm; 0 is no limit"
    )

    @model_validator(mode="after")
    def _something_to_train(self) -> Self:
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            raise ValueError("network_train_unet_only and network_train_text_encoder_only exclude each other; keep one")
        return self

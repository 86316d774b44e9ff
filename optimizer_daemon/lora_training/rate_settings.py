"""The learning rates, their course, and the optimizer; kohya's names and meanings."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from optimizer_daemon.lora_training.optimizer_names import is_schedule_free
from optimizer_daemon.lora_training.strict_settings import Rate, Steps, StrictSettings

LrScheduler = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
    "adafactor",
]
_WITHOUT_WARMUP = ("constant", "piecewise_constant", "adafactor")


class RateSettings(StrictSettings):
    """How fast what is trained, by which rule."""

    learning_rate: float = Field(gt=0, description="rate of whatever has none of its own")
    unet_lr: Rate | None = Field(None, description="rate of the UNet's LoRA; 0 leaves the UNet alone")
    text_encoder_lr: Rate | Annotated[list[Rate], Field(min_length=1, max_length=2)] | None = Field(
        None,
        description="rate of the text encoder's LoRA, or a list with one for each of SDXL's two; 0 leaves it alone",
    )
    optimizer_type: str = Field(
        "AdamW", min_length=1, description="AdamW, AdamW8bit, Lion, ... or package.module.Class"
    )
    optimizer_args: dict[str, Any] = Field(default_factory=dict, description="further arguments of the optimizer")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0 never")
    lr_scheduler: LrScheduler = Field("constant", description="course of the learning rates")
    lr_scheduler_type: str | None = Field(
        None, min_length=1, description="class of torch.optim.lr_scheduler, or package.module.Class, for lr_scheduler"
    )
    lr_scheduler_args: dict[str, Any] = Field(default_factory=dict, description="further arguments of the course")
    lr_warmup_steps: Steps = Field(0, description="optimizer steps, or a fraction of all of them")
    lr_decay_steps: Steps = Field(
        0, description="last steps of warmup_stable_decay, in optimizer steps or as a fraction of all of them"
    )
    lr_scheduler_num_cycles: int = Field(
        1, ge=1, description="restarts of cosine_with_restarts; half waves of cosine_with_min_lr, warmup_stable_decay"
    )
    lr_scheduler_power: float = Field(1.0, gt=0, description="exponent of polynomial")
    lr_scheduler_timescale: int | None = Field(
        None, ge=1, description="steps of inverse_sqrt; its warm-up if unset, or 10,000 without one"
    )
    lr_scheduler_min_lr_ratio: float | None = Field(
        None, ge=0, le=1, description="lowest rate of cosine_with_min_lr and warmup_stable_decay, as a share"
    )

    @model_validator(mode="after")
    def _possible_course(self) -> Self:
        course = self.lr_scheduler_type or (self.lr_scheduler if self.lr_scheduler in _WITHOUT_WARMUP else None)
        if course is not None and self.lr_warmup_steps:
            setting = "lr_scheduler_type" if self.lr_scheduler_type else "lr_scheduler"
            other = "use 'constant_with_warmup' or" if course == "constant" else "use"
            raise ValueError(
                f"{setting} {course!r} has no warm-up but lr_warmup_steps is {self.lr_warmup_steps}; "
                f"{other} lr_warmup_steps = 0"
            )
        if self.lr_scheduler_type is not None:
            return self
        if self.lr_scheduler == "piecewise_constant" and not isinstance(self.lr_scheduler_args.get("step_rules"), str):
            raise ValueError(
                "lr_scheduler 'piecewise_constant' needs its rules; set lr_scheduler_args.step_rules, such as "
                "'1:100,0.1:200,0.01'"
            )
        lowest = (self.lr_scheduler_min_lr_ratio, self.lr_scheduler_args.get("min_lr"))
        if self.lr_scheduler == "cosine_with_min_lr" and sum(value is not None for value in lowest) != 1:
            raise ValueError(
                "lr_scheduler 'cosine_with_min_lr' needs one lowest rate; set either lr_scheduler_min_lr_ratio or "
                "lr_scheduler_args.min_lr"
            )
        return self

    @model_validator(mode="after")
    def _possible_optimizer(self) -> Self:
        if is_schedule_free(self.optimizer_type) and (self.lr_scheduler != "constant" or self.lr_scheduler_type):
            raise ValueError(
                f"optimizer_type {self.optimizer_type!r} needs no course of the rates, but there is "
                f"{self.lr_scheduler_type or self.lr_scheduler!r}; use lr_scheduler 'constant'"
            )
        return self

    @property
    def effective_unet_lr(self) -> float:
        return self.learning_rate if self.unet_lr is None else self.unet_lr

    @property
    def text_encoder_rates(self) -> list[float]:
        """The rates of the text encoders; a single one is for all of them."""
        if self.text_encoder_lr is None:
            return [self.learning_rate]
        return self.text_encoder_lr if isinstance(self.text_encoder_lr, list) else [self.text_encoder_lr]

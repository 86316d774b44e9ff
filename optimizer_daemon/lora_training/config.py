"""train_config.toml: everything one training is told, under kohya's names where kohya has the setting.

Relative paths start from the folder of the file. Light to import: whoever writes the file needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from optimizer_daemon.lora_training.toml_file import read_toml, unknown_key
from shared.errors import UserError
from shared.strict_json import first_fault

LrScheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
SavePrecision = Literal["fp16", "bf16", "float"]

FilePath = Annotated[Path, BeforeValidator(lambda value: Path(value) if isinstance(value, str) and value else value)]
Rate = Annotated[float, Field(ge=0)]

_PATHS = (
    "pretrained_model_name_or_path",
    "dataset_config",
    "output_dir",
    "logging_dir",
    "state_dir",
    "latent_cache_dir",
)
# What a resumed training may do differently: none of these decides its weights.
_FREE_ON_RESUME = frozenset(
    {
        "dataset_config",  # its content is compared instead
        "held_out",  # so are the pictures that it leaves
        "output_dir",
        "output_name",
        "logging_dir",
        "state_dir",
        "latent_cache_dir",
        "resume",
        "save_every_n_epochs",
        "save_precision",
        "threads",
        "device",
    }
)


class TrainConfig(BaseModel):
    """One training. Unknown keys are refused: a misspelt one would train with a default and spoil the trial."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    # The model, the data, the places
    pretrained_model_name_or_path: FilePath = Field(description="base model, a diffusers folder")
    dataset_config: FilePath = Field(description="kohya dataset TOML")
    held_out: list[str] = Field(
        default_factory=list, description="SHA-256 of the picture files that are left out of the training"
    )
    output_dir: FilePath = Field(description="where the checkpoints go")
    output_name: str = Field(pattern=r"^[^/\x00]+$", description="file name of the final checkpoint without suffix")
    logging_dir: FilePath | None = Field(None, description="TensorBoard folder; none by default")
    state_dir: FilePath | None = Field(None, description="folder of the resume state; output_dir/state by default")
    latent_cache_dir: FilePath | None = Field(
        None, description="folder of encoded images, shared by all trainings; $XDG_CACHE_HOME/lora-tuner/latents"
    )
    resume: bool = Field(False, description="go on from the state in state_dir, where there is one")

    # The network
    network_dim: int = Field(4, ge=1, description="rank")
    network_alpha: Rate = Field(1.0, description="scale is alpha / dim; 0 means dim")
    network_dropout: float | None = Field(None, ge=0, lt=1, description="share of rank neurons dropped at each step")

    # Rates and their course
    learning_rate: float = Field(gt=0, description="rate of whatever has none of its own")
    unet_lr: Rate | None = Field(None, description="rate of the UNet's LoRA; 0 leaves the UNet alone")
    text_encoder_lr: Rate | None = Field(None, description="rate of the text encoder's LoRA; 0 leaves it alone")
    optimizer_type: str = Field(
        "AdamW", min_length=1, description="AdamW, AdamW8bit, Lion, ... or package.module.Class"
    )
    optimizer_args: dict[str, Any] = Field(default_factory=dict, description="further arguments of the optimizer")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0 never")
    lr_scheduler: LrScheduler = Field("constant", description="course of the learning rates")
    lr_warmup_steps: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = Field(
        0, description="optimizer steps, or a fraction of all of them"
    )
    lr_scheduler_num_cycles: int = Field(1, ge=1, description="restarts of cosine_with_restarts")
    lr_scheduler_power: float = Field(1.0, gt=0, description="exponent of polynomial")

    # The loop
    max_train_epochs: int = Field(ge=1, description="epochs")
    train_batch_size: int = Field(1, ge=1, description="batch size where the dataset TOML sets none")
    gradient_accumulation_steps: int = Field(1, ge=1, description="batches per optimizer step")
    save_every_n_epochs: int | None = Field(
        None, ge=1, description="epochs between checkpoints; only the final if unset"
    )
    save_precision: SavePrecision = Field("fp16", description="number format of the checkpoints")
    seed: int = Field(42, ge=0, lt=2**63, description="seed of everything random")

    # The objective
    clip_skip: int | None = Field(None, ge=1, description="text encoder layer counted from the end; 1 is the last")
    v_parameterization: bool | None = Field(None, description="predict the velocity; as the base model says if unset")
    min_snr_gamma: float | None = Field(None, gt=0, description="limits the weight of almost clean steps")
    noise_offset: float | None = Field(None, ge=0, description="strength of the noise common to a channel")

    # The machine
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, ge=1, description="CPU threads; torch's choice if unset")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field(
        "auto", description="auto: no on a CPU, else bf16 where the GPU has it, else fp16"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations twice to save memory")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.trains_unet and not self.trains_text_encoder:
            raise ValueError("unet_lr and text_encoder_lr are both 0, so nothing would be trained; raise one")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError(
                f"lr_scheduler 'constant' has no warm-up but lr_warmup_steps is {self.lr_warmup_steps}; "
                "use 'constant_with_warmup' or lr_warmup_steps = 0"
            )
        return self

    @property
    def effective_unet_lr(self) -> float:
        return self.learning_rate if self.unet_lr is None else self.unet_lr

    @property
    def effective_text_encoder_lr(self) -> float:
        return self.learning_rate if self.text_encoder_lr is None else self.text_encoder_lr

    @property
    def trains_unet(self) -> bool:
        return self.effective_unet_lr > 0

    @property
    def trains_text_encoder(self) -> bool:
        return self.effective_text_encoder_lr > 0

    @property
    def state_folder(self) -> Path:
        return self.state_dir or self.output_dir / "state"

    def weight_deciding(self) -> dict[str, Any]:
        """Return the settings that decide the weights, by name; a resumed training must have the same."""
        return self.model_dump(mode="json", exclude=set(_FREE_ON_RESUME))


def load_config(path: Path) -> TrainConfig:
    """Return the training that `path` describes, its paths absolute.

    Raises:
        UserError: no such file, no TOML, an unknown key, or a value that will not do.
    """
    document = read_toml(path)
    for key in document:
        if key not in TrainConfig.model_fields:
            raise unknown_key(path, "", key, TrainConfig.model_fields)
    try:
        config = TrainConfig.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{path}: {first_fault(error, document)}") from error
    folder = path.absolute().parent
    places = {name: value for name in _PATHS if (value := getattr(config, name)) is not None}
    return config.model_copy(update={name: folder / value for name, value in places.items()})


def to_toml(config: TrainConfig) -> str:
    """Return the file that `load_config` reads as `config`; settings at their default are left out."""
    values = config.model_dump(mode="json", exclude_defaults=True)
    optimizer_args = values.pop("optimizer_args", {})
    lines = [f"{name} = {_toml_value(value)}" for name, value in values.items() if value is not None]
    if optimizer_args:
        lines += ["", "[optimizer_args]"]
        lines += [f"{_toml_string(name)} = {_toml_value(value)}" for name, value in optimizer_args.items()]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return _toml_string(value)
        case list() | tuple():
            return f"[{', '.join(map(_toml_value, value))}]"
        case dict():
            return f"{{{', '.join(f'{_toml_string(k)} = {_toml_value(v)}' for k, v in value.items())}}}"
    raise TypeError(f"TOML has no {type(value).__name__}")


def _toml_string(text: str) -> str:
    # JSON's strings are TOML's basic strings, but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

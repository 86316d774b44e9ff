"""train_config.toml: everything one training is told, under kohya's names where kohya has the setting.

Relative paths start from the folder of the file. Light to import: whoever writes the file needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from optimizer_daemon.lora_training.dataset_settings import DatasetSettings
from optimizer_daemon.lora_training.network_settings import FilePath, NetworkSettings
from optimizer_daemon.lora_training.objective_settings import ObjectiveSettings
from optimizer_daemon.lora_training.optimizer_names import has_one_rate
from optimizer_daemon.lora_training.rate_settings import RateSettings
from optimizer_daemon.lora_training.toml_file import read_toml, unknown_key
from shared.errors import UserError
from shared.strict_json import first_fault

SavePrecision = Literal["fp16", "bf16", "float"]

ARGUMENT_TABLES = ("optimizer_args", "lr_scheduler_args", "network_args")
"""Settings that are tables; a search space names what is in them as `table.name`."""

_ONLY = ("network_train_unet_only", "network_train_text_encoder_only")
_PATHS = (
    "pretrained_model_name_or_path",
    "dataset_config",
    "output_dir",
    "logging_dir",
    "state_dir",
    "latent_cache_dir",
    "network_weights",
)
# What a resumed training may do differently: none of these decides its weights, but for rounding, in which other
# devices and numbers of threads differ.
_FREE_ON_RESUME = frozenset(
    {
        "pretrained_model_name_or_path",  # its content is compared instead
        "network_weights",  # likewise
        "dataset_config",  # likewise
        "held_out",  # so are the pictures that it leaves
        "output_dir",
        "output_name",
        "logging_dir",
        "state_dir",
        "latent_cache_dir",
        "resume",
        "save_every_n_epochs",
        "save_precision",
        "validate_every_n_epochs",
        "validate_every_n_steps",
        "max_validation_steps",
        "threads",
        "device",
        "mixed_precision",  # what it comes to on the device is compared instead
        "gradient_checkpointing",  # computes the same a second time
    }
)


class TrainConfig(ObjectiveSettings, RateSettings, NetworkSettings, DatasetSettings):
    """One training."""

    # The model, the data, the places
    pretrained_model_name_or_path: FilePath = Field(
        description="base model, a diffusers folder or one .safetensors file"
    )
    dataset_config: FilePath = Field(description="kohya dataset TOML")
    held_out: list[str] = Field(
        default_factory=list, description="SHA-256 of the picture files that are left out of the training"
    )
    output_dir: FilePath = Field(description="where the checkpoints go")
    output_name: str = Field(pattern=r"^[^/\x00]+$", description="file name of the final checkpoint without suffix")
    logging_dir: FilePath | None = Field(None, description="TensorBoard folder; none by default")
    state_dir: FilePath | None = Field(None, description="folder of the resume state; output_dir/state by default")
    latent_cache_dir: FilePath | None = Field(
        None,
        description="encoded images, shared by the trainings of all studies; $XDG_CACHE_HOME/lora-tuner/latents",
    )
    resume: bool = Field(False, description="go on from the state in state_dir, where there is one")

    # The loop
    max_train_epochs: int = Field(ge=1, description="epochs")
    train_batch_size: int = Field(1, ge=1, description="batch size where the dataset TOML sets none")
    gradient_accumulation_steps: int = Field(1, ge=1, description="batches per optimizer step")
    save_every_n_epochs: int | None = Field(
        None, ge=1, description="epochs between checkpoints; only the final if unset"
    )
    validate_every_n_epochs: int | None = Field(None, ge=1, description="epochs between validations; 1 if unset")
    validate_every_n_steps: int | None = Field(
        None, ge=1, description="optimizer steps between further validations; none if unset"
    )
    max_validation_steps: int | None = Field(None, ge=1, description="most batches of a validation; all if unset")
    save_precision: SavePrecision = Field("fp16", description="number format of the checkpoints")
    seed: int = Field(42, ge=0, lt=2**63, description="seed of everything random")

    # The machine
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, ge=1, description="CPU threads; torch's choice if unset")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field(
        "auto", description="auto: no on a CPU, else bf16 where the GPU has it, else fp16"
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        False, description="compute activations twice to save memory; auto: once the memory has run out, from there on"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.trains_unet and not self.trains_text_encoder:
            only = next((name for name in _ONLY if getattr(self, name)), None)
            if only is not None:
                raise ValueError(f"{only} leaves only what has rate 0, so nothing would be trained; take it out")
            raise ValueError("unet_lr and text_encoder_lr are both 0, so nothing would be trained; raise one")
        rates = {rate for rate in self.text_encoder_rates if rate and self.trains_text_encoder}
        rates |= {self.effective_unet_lr} if self.trains_unet else set()
        if has_one_rate(self.optimizer_type) and len(rates) > 1:
            raise ValueError(
                f"optimizer_type {self.optimizer_type!r} has one rate for all it trains, but the rates are "
                f"{', '.join(map(repr, sorted(rates)))}; make unet_lr and text_encoder_lr equal, or 0"
            )
        if has_one_rate(self.optimizer_type) and (self.network_args.unet_ratio or self.network_args.text_encoder_ratio):
            raise ValueError(
                f"optimizer_type {self.optimizer_type!r} has one rate for all it trains, but network_args ask for "
                "LoRA+; take the loraplus ratios out"
            )
        return self

    def require_precision(self, device: str) -> None:
        """Refuse half precision on a CPU.

        Args:
            device: "cpu", "cuda" or "cuda:N".
        Raises:
            UserError: it is asked for.
        """
        if device == "cpu" and self.mixed_precision in ("fp16", "bf16"):
            raise UserError(f"mixed_precision: {self.mixed_precision!r} needs a GPU; use 'auto' or 'no' on a CPU")

    @property
    def trains_unet(self) -> bool:
        return self.effective_unet_lr > 0 and not self.network_train_text_encoder_only

    @property
    def trains_text_encoder(self) -> bool:
        """Whether any of them is."""
        return any(rate > 0 for rate in self.text_encoder_rates) and not self.network_train_unet_only

    def untrained(self, text_encoders: Sequence[str]) -> frozenset[str]:
        """Return which parts of the base model get no LoRA: those with rate 0, and those that are to be left alone."""
        rates = self.text_encoder_rates if self.trains_text_encoder else [0.0]
        frozen = {part for part, rate in zip(text_encoders, rates * len(text_encoders), strict=False) if not rate}
        return frozenset(frozen if self.trains_unet else {*frozen, "unet"})

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
    tables = {name: values.pop(name) for name in ARGUMENT_TABLES if name in values}
    lines = [f"{name} = {_toml_value(value)}" for name, value in values.items() if value is not None]
    for table, arguments in tables.items():
        lines += ["", f"[{table}]"]
        lines += [f"{_toml_string(name)} = {_toml_value(value)}" for name, value in arguments.items()]
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

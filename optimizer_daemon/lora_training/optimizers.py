"""The torch optimizer and the course of its learning rates, by the names users know from sd-scripts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.lora_training.lora import LoraNetwork
from optimizer_daemon.lora_training.optimizer_names import NAMED, class_path
from shared.errors import SettingsError

# Adafactor's own defaults would replace the learning rates by a relative step and refuse a warm-up.
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "adafactor": {"scale_parameter": False, "relative_step": False, "warmup_init": False},
}


@dataclass(frozen=True)
class TorchOptimizer:
    """A torch optimizer over the LoRA's weights.

    Args:
        optimizer: its groups are the text encoder's weights, then the UNet's, where these are trained.
        groups: their names in TensorBoard.
        description: class and arguments, as kohya's ss_optimizer has them.
    """

    optimizer: Optimizer
    groups: tuple[str, ...]
    description: str


def create_optimizer(config: TrainConfig, network: LoraNetwork) -> TorchOptimizer:
    """Return the optimizer `optimizer_type` names.

    Raises:
        SettingsError: it cannot be imported, is no torch optimizer, or does not take `optimizer_args`.
    """
    kind, name = _resolve(config.optimizer_type)
    arguments = _arguments(config, config.optimizer_type.lower())
    named_groups = [
        ("textencoder", network.text_encoder_names, config.effective_text_encoder_lr),
        ("unet", network.unet_names, config.effective_unet_lr),
    ]
    groups = [
        (label, {"params": network.parameters_of(names), "lr": rate}) for label, names, rate in named_groups if names
    ]
    # One kernel for all tensors instead of several per tensor; the arithmetic is the same.
    speed: dict[str, Any] = (
        {"fused": True} if kind is torch.optim.AdamW and not arguments.keys() & {"foreach", "fused"} else {}
    )
    try:
        build: Callable[..., Optimizer] = kind
        optimizer = build([group for _, group in groups], lr=config.learning_rate, **arguments, **speed)
    except (TypeError, ValueError) as error:
        raise SettingsError("optimizer_args", config.optimizer_args, f"{name} refuses them: {error}") from error
    shown = ",".join(f"{key}={value}" for key, value in arguments.items())
    return TorchOptimizer(optimizer, tuple(label for label, _ in groups), f"{name}({shown})" if shown else name)


def create_lr_scheduler(config: TrainConfig, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Return diffusers' schedule over `total_steps` optimizer steps; warm-up is counted in optimizer steps, too.

    Raises:
        SettingsError: the schedule cannot be had with this learning rate or warm-up.
    """
    warmup = warmup_steps(config, total_steps)
    if config.lr_scheduler == "polynomial" and warmup == total_steps:
        raise SettingsError("lr_warmup_steps", warmup, f"polynomial needs fewer than all {total_steps} optimizer steps")
    try:
        return get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            num_cycles=config.lr_scheduler_num_cycles,
            power=config.lr_scheduler_power,
        )
    except ValueError as error:
        raise SettingsError("lr_scheduler", config.lr_scheduler, str(error)) from error


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Return the warm-up in optimizer steps; a fraction is one of `total_steps`."""
    warmup = config.lr_warmup_steps
    return int(warmup * total_steps) if isinstance(warmup, float) else warmup


def _resolve(optimizer_type: str) -> tuple[type[Optimizer], str]:
    """Return the class and its full name."""
    target = class_path(optimizer_type)
    module_name, _, class_name = target.rpartition(".")
    module_name = module_name or "torch.optim"
    where = "optimizer_type"
    try:
        kind = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise SettingsError(
            where, optimizer_type, f"{module_name} cannot be imported ({error}); install it or correct the name"
        ) from error
    if not isinstance(kind, type) or not issubclass(kind, Optimizer):
        names = ", ".join(sorted(NAMED))
        raise SettingsError(
            where, optimizer_type, f"{target} is no torch optimizer; use one of {names}, or package.module.Class"
        )
    return kind, f"{kind.__module__}.{kind.__name__}"


def _arguments(config: TrainConfig, name: str) -> dict[str, Any]:
    fixed = _FIXED.get(name, {})
    for key, value in fixed.items():
        if config.optimizer_args.get(key, value) != value:
            raise SettingsError(
                f"optimizer_args.{key}", config.optimizer_args[key], f"with {name} it is always {value}; take it out"
            )
    # TOML has lists where torch wants tuples, such as betas.
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in config.optimizer_args.items()}
    return {**given, **fixed}

"""The torch optimizer, by the names users know from sd-scripts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.lora_training.optimizer_names import NAMED, class_path, has_one_rate
from shared.errors import SettingsError

# Adafactor's own defaults would replace the learning rates by a relative step and refuse a warm-up. Those of SGD are
# sd-scripts'.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "adafactor": {"scale_parameter": False, "relative_step": False, "warmup_init": False},
    "sgdnesterov": {"momentum": 0.9, "nesterov": True},
    "sgdnesterov8bit": {"momentum": 0.9, "nesterov": True},
}


class TrainedLayers(Protocol):
    """What an optimizer asks of a LoraNetwork: the names of the layers and their weights."""

    @property
    def encoder_names(self) -> Sequence[list[str]]: ...
    @property
    def text_encoder_names(self) -> list[str]: ...
    @property
    def unet_names(self) -> list[str]: ...
    def parameters_of(self, names: list[str], ending: str = "") -> list[nn.Parameter]: ...


@dataclass(frozen=True)
class TorchOptimizer:
    """A torch optimizer over the LoRA's weights.

    Args:
        optimizer: its groups are the text encoders' weights, one group for each where they have rates of their own,
            then the UNet's, where these are trained; with LoRA+ each is followed by its up matrices.
        groups: their names in TensorBoard.
        description: class and arguments, as kohya's ss_optimizer has them.
        finds_rate: every group has a factor "d" of its learning rate, which the optimizer finds.
    """

    optimizer: Optimizer
    groups: tuple[str, ...]
    description: str
    finds_rate: bool = False

    @property
    def tags(self) -> tuple[str, ...]:
        """The names of `rates` in TensorBoard, below lr/; kohya's."""
        return (*self.groups, *(f"d*lr/{group}" for group in self.groups if self.finds_rate))

    def rates(self, learning_rates: Sequence[float | Tensor]) -> list[float]:
        """Return the learning rates of the groups, then those that the optimizer makes of them where it does."""
        found = [
            group["d"] * rate
            for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True)
            if self.finds_rate
        ]
        return [float(rate) for rate in (*learning_rates, *found)]

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Hold the weights that are the result so far: a schedule-free optimizer trains others than it ends with."""
        leave, come_back = getattr(self.optimizer, "eval", None), getattr(self.optimizer, "train", None)
        if leave is None or come_back is None:
            yield
            return
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        trained = [weight.detach().clone() for weight in weights]
        leave()
        try:
            yield
        finally:
            come_back()
            with torch.no_grad():  # it rounds, so its own way back ends beside the weights it left
                for weight, before in zip(weights, trained, strict=True):
                    weight.copy_(before)


def create_optimizer(config: TrainConfig, network: TrainedLayers) -> TorchOptimizer:
    """Return the optimizer `optimizer_type` names.

    Raises:
        SettingsError: it cannot be imported, is no torch optimizer, or does not take `optimizer_args`.
    """
    kind, name = _resolve(config.optimizer_type)
    arguments = _arguments(config, config.optimizer_type.lower())
    groups = _groups(config, network)
    rate: float | None = config.learning_rate
    if kind is Adafactor and arguments.get("relative_step", True):
        _require_own_course(config)
        rate = None  # it chooses the steps itself
        for _, group in groups:
            group["lr"] = None
    # One kernel for all tensors instead of several per tensor; the arithmetic is the same.
    speed: dict[str, Any] = (
        {"fused": True} if kind is torch.optim.AdamW and not arguments.keys() & {"foreach", "fused"} else {}
    )
    try:
        build: Callable[..., Optimizer] = kind
        optimizer = build([group for _, group in groups], lr=rate, **arguments, **speed)
    except (TypeError, ValueError) as error:
        raise SettingsError("optimizer_args", config.optimizer_args, f"{name} refuses them: {error}") from error
    if begin := getattr(optimizer, "train", None):
        begin()
    shown = ",".join(f"{key}={value}" for key, value in arguments.items())
    finds_rate = has_one_rate(config.optimizer_type) and all("d" in group for group in optimizer.param_groups)
    labels = tuple(label for label, _ in groups)
    return TorchOptimizer(optimizer, labels, f"{name}({shown})" if shown else name, finds_rate)


def _groups(config: TrainConfig, network: TrainedLayers) -> list[tuple[str, dict[str, Any]]]:
    """Return kohya's names of the groups, each with weights and rate; with LoRA+ the up matrices are apart."""
    rates, args = config.text_encoder_rates, config.network_args
    if len(rates) == 1:
        parts = [("textencoder", network.text_encoder_names, rates[0], args.text_encoder_ratio)]
    else:
        parts = [
            (f"textencoder {number}", names, rate, args.text_encoder_ratio)
            for number, (names, rate) in enumerate(zip(network.encoder_names, rates, strict=True), 1)
        ]
    parts.append(("unet", network.unet_names, config.effective_unet_lr, args.unet_ratio))
    groups = []
    for label, names, rate, ratio in parts:
        if names and ratio is None:
            groups.append((label, {"params": network.parameters_of(names), "lr": rate}))
        elif names and ratio is not None:
            groups.append((label, {"params": network.parameters_of(names, "lora_down.weight"), "lr": rate}))
            ups = network.parameters_of(names, "lora_up.weight")
            groups.append((f"{label} plus", {"params": ups, "lr": rate * ratio}))
    return groups


def _require_own_course(config: TrainConfig) -> None:
    if config.lr_scheduler != "adafactor" or config.lr_scheduler_type is not None:
        why = "Adafactor then chooses its own steps; set lr_scheduler = 'adafactor', or relative_step = false"
        raise SettingsError("optimizer_args.relative_step", True, why)


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
    # TOML has lists where torch wants tuples, such as betas.
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in config.optimizer_args.items()}
    return {**_DEFAULTS.get(name, {}), **given}

"""The course of the learning rates, by the names users know from sd-scripts and with its meaning."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from diffusers.optimization import get_piecewise_constant_schedule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import (
    Adafactor,
    AdafactorSchedule,
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from optimizer_daemon.lora_training.rate_settings import RateSettings
from optimizer_daemon.lora_training.strict_settings import count_steps
from shared.errors import SettingsError


def create_lr_scheduler(config: RateSettings, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Return the course over `total_steps` optimizer steps; everything in it is counted in optimizer steps.

    Raises:
        SettingsError: there is no such course, or it cannot be had with these settings.
    """
    if config.lr_scheduler_type is not None:
        setting, name = "lr_scheduler_type", config.lr_scheduler_type
        build: Callable[..., LRScheduler] = _class_named(name)
        arguments: dict[str, Any] = {}
    else:
        setting, name = "lr_scheduler", config.lr_scheduler
        build, arguments = _known(config, optimizer, total_steps)
    try:
        return build(optimizer, **arguments, **config.lr_scheduler_args)
    except (TypeError, ValueError, AttributeError) as error:
        if config.lr_scheduler_args:
            why = f"{name} refuses them: {error}"
            raise SettingsError("lr_scheduler_args", config.lr_scheduler_args, why) from error
        raise SettingsError(setting, name, str(error)) from error


def _known(
    config: RateSettings, optimizer: Optimizer, total_steps: int
) -> tuple[Callable[..., LRScheduler], dict[str, Any]]:
    warmup = count_steps(config.lr_warmup_steps, total_steps)
    course: dict[str, Any] = {"num_warmup_steps": warmup, "num_training_steps": total_steps}
    half_waves = config.lr_scheduler_num_cycles / 2
    match config.lr_scheduler:
        case "constant":
            return get_constant_schedule, {}
        case "piecewise_constant":
            return get_piecewise_constant_schedule, {}
        case "adafactor":
            return AdafactorSchedule, {"initial_lr": _rate_of_adafactor(config, optimizer)}
        case "constant_with_warmup":
            return get_constant_schedule_with_warmup, {"num_warmup_steps": warmup}
        case "inverse_sqrt":
            return get_inverse_sqrt_schedule, {"num_warmup_steps": warmup, "timescale": config.lr_scheduler_timescale}
        case "linear":
            return get_linear_schedule_with_warmup, course
        case "cosine":
            return get_cosine_schedule_with_warmup, course
        case "cosine_with_restarts":
            return get_cosine_with_hard_restarts_schedule_with_warmup, {
                **course,
                "num_cycles": config.lr_scheduler_num_cycles,
            }
        case "polynomial":
            if warmup == total_steps:
                why = f"polynomial needs fewer than all {total_steps} optimizer steps"
                raise SettingsError("lr_warmup_steps", warmup, why)
            return get_polynomial_decay_schedule_with_warmup, {**course, "power": config.lr_scheduler_power}
        case "cosine_with_min_lr":
            lowest = {"num_cycles": half_waves, "min_lr_rate": config.lr_scheduler_min_lr_ratio}
            return get_cosine_with_min_lr_schedule_with_warmup, course | lowest
        case "warmup_stable_decay":
            decay = count_steps(config.lr_decay_steps, total_steps)
            if warmup + decay > total_steps:
                why = f"with {warmup} steps of warm-up it is more than all {total_steps} optimizer steps"
                raise SettingsError("lr_decay_steps", decay, why)
            return get_wsd_schedule, {
                "num_warmup_steps": warmup,
                "num_stable_steps": total_steps - warmup - decay,
                "num_decay_steps": decay,
                "num_cycles": half_waves,
                "min_lr_ratio": config.lr_scheduler_min_lr_ratio or 0.0,
            }


def _rate_of_adafactor(config: RateSettings, optimizer: Optimizer) -> float:
    if not isinstance(optimizer, Adafactor) or not optimizer.defaults["relative_step"]:
        raise SettingsError(
            "lr_scheduler",
            config.lr_scheduler,
            "it shows the steps that Adafactor chooses; use optimizer_type 'Adafactor' with "
            "optimizer_args.relative_step = true",
        )
    return config.learning_rate


def _class_named(name: str) -> Callable[..., LRScheduler]:
    module_name, _, class_name = name.rpartition(".")
    module_name = module_name or "torch.optim.lr_scheduler"
    try:
        kind = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        why = f"{module_name} cannot be imported ({error}); install it or correct the name"
        raise SettingsError("lr_scheduler_type", name, why) from error
    if not isinstance(kind, type) or not issubclass(kind, LRScheduler):
        why = f"{module_name} has no learning-rate scheduler of that name; correct it"
        raise SettingsError("lr_scheduler_type", name, why)
    needed = [
        parameter.name
        for parameter in list(inspect.signature(kind.step).parameters.values())[1:]
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if needed:
        why = f"each of its steps wants {', '.join(needed)}; use one that goes by the step alone"
        raise SettingsError("lr_scheduler_type", name, why)
    return kind

"""Settings that another one makes meaningless: the training says so once, for a value that does nothing misleads."""

from __future__ import annotations

from collections.abc import Iterator

from optimizer_daemon.lora_training.base_model import BaseModel
from optimizer_daemon.lora_training.config import TrainConfig

# Setting -> the courses of the rates that heed it.
_OF_COURSES = {
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_num_cycles": ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
}
# Setting -> another, without which it does nothing.
_PARTS = {
    "noise_offset_random_strength": "noise_offset",
    "adaptive_noise_scale": "noise_offset",
    "multires_noise_discount": "multires_noise_iterations",
    "ip_noise_gamma_random_strength": "ip_noise_gamma",
}
_OF_HUBER = ("huber_schedule", "huber_c", "huber_scale")
_OF_VALIDATION = ("validate_every_n_epochs", "validate_every_n_steps", "max_validation_steps")


def ignored_settings(config: TrainConfig, base: BaseModel, *, validates: bool) -> list[str]:
    """Return a sentence for each setting that was given another value than its default and does nothing.

    Args:
        config: the settings.
        base: the base model.
        validates: whether there are images to validate with.
    """
    said = {name: value for name in TrainConfig.model_fields if (value := getattr(config, name)) != _default(name)}
    found = [
        f"{name} = {said[name]} is ignored{why}" for name, why in _reasons(config, base, validates) if name in said
    ]
    if (rank := config.network_args.conv_dim) and not config.trains_unet:
        found.append(f"network_args.conv_dim = {rank} is ignored: only the UNet has such convolutions")
    return found


def _reasons(config: TrainConfig, base: BaseModel, validates: bool) -> Iterator[tuple[str, str]]:
    if base.family == "sdxl":
        yield "clip_skip", ", as in sd-scripts: SDXL takes the last layer but one of both text encoders"
    for name, courses in _OF_COURSES.items():
        if config.lr_scheduler_type or config.lr_scheduler not in courses:
            yield name, f": it belongs to lr_scheduler {' or '.join(map(repr, courses))}"
    for name, whole in _PARTS.items():
        if not getattr(config, whole):
            yield name, f" without {whole}"
    if config.loss_type not in ("huber", "smooth_l1"):
        yield from ((name, ": it belongs to loss_type 'huber' or 'smooth_l1'") for name in _OF_HUBER)
    if not validates:
        yield from ((name, ": no image is held back for validation (validation_split)") for name in _OF_VALIDATION)


def _default(name: str) -> object:
    return TrainConfig.model_fields[name].get_default(call_default_factory=True)

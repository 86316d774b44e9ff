"""Whether the native trainer can train what a search space may draw, asked before the first trial."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from optimizer_daemon.lora_training.base_model import BaseModel
from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.lora_training.families import require_encoder_rates
from optimizer_daemon.lora_training.optimizer_names import class_path
from shared.devices import resolve_device
from shared.errors import SettingsError, UserError

# torch's own optimizers and these courses, without further arguments, cannot fail at any number of steps.
_SAFE_COURSES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "inverse_sqrt")
_SECONDS = 300.0  # importing torch from a cold disk may take a minute


def require_possible(config: TrainConfig, base: BaseModel) -> None:
    """Refuse a training that its settings, the base model, its files or the device make impossible.

    Raises:
        UserError: it is.
    """
    try:
        config.predicts_velocity(base.predicts_velocity)
        require_encoder_rates(config.text_encoder_lr, base)
        config.require_precision(resolve_device(config.device))
        if config.network_weights is not None:
            _require_weights(config.network_weights)
    except UserError as error:
        raise _of_trial(str(error)) from error


def require_optimizers(
    trainings: Sequence[tuple[TrainConfig, int]], python: str, root: Path, env: Mapping[str, str]
) -> None:
    """Build the optimizer and the course of each training in one process of its own, for that imports torch.

    Args:
        trainings: settings, with the number of optimizer steps.
        python: who runs the trainings.
        root: folder of this program's packages.
        env: all variables of the process.
    Raises:
        UserError: one cannot be built.
    """
    doubtful = [(config, steps) for config, steps in trainings if _may_fail(config)]
    if not doubtful:
        return
    try:
        done = subprocess.run(
            [python, "-m", "optimizer_daemon.lora_training.choices"],
            input=asked_of(doubtful),
            env=dict(env),
            cwd=root,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _of_trial(f"optimizer_type: could not be tried with {python} ({error})") from error
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise _of_trial(f"optimizer_type: building the optimizers failed ({last})")
    if fault := done.stdout.strip():
        raise _of_trial(fault)


def asked_of(trainings: Sequence[tuple[TrainConfig, int]]) -> str:
    """Return what that process reads."""
    return json.dumps([{"config": config.model_dump(mode="json"), "steps": steps} for config, steps in trainings])


def _of_trial(fault: str) -> UserError:
    """Return the error of a trial that cannot be trained."""
    return UserError(f"trial parameters: {fault}; correct the search space or [trainer.native]")


def _may_fail(config: TrainConfig) -> bool:
    safe = (
        "." not in config.optimizer_type
        and class_path(config.optimizer_type).startswith("torch.optim.")
        and config.lr_scheduler in _SAFE_COURSES
        and not (config.optimizer_args or config.lr_scheduler_type or config.lr_scheduler_args)
    )
    return not safe


def _require_weights(path: Path) -> None:
    if not path.is_absolute():
        raise SettingsError("network_weights", str(path), "write its whole path, from / on")
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        why = f"it could not be read ({error.strerror}); correct the path"
        raise SettingsError("network_weights", str(path), why) from error

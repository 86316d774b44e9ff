"""The native trainer: `python -m optimizer_daemon.lora_training` on the trial's own train_config.toml."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from optimizer_daemon.lora_training.base_model import inspect_base_model
from optimizer_daemon.lora_training.config import ARGUMENT_TABLES, TrainConfig, to_toml
from optimizer_daemon.lora_training.dataset_config import BatchShape, batch_shape, load_dataset_config
from optimizer_daemon.lora_training.dataset_settings import of_options
from optimizer_daemon.lora_training.families import require_encoder_rates, require_family
from optimizer_daemon.lora_training.optimizer_names import require_optimizer
from optimizer_daemon.lora_training.toml_file import closest
from optimizer_daemon.trainers.base import LaunchPlan, ResumePoint, TrainerInput
from optimizer_daemon.trainers.diagnosis import explain
from optimizer_daemon.trainers.native_checks import require_optimizers, require_possible
from shared.devices import resolve_device
from shared.errors import SettingsError, UserError
from shared.layout import TrialLayout
from shared.model_folders import require_base_model
from shared.preloaded import Preload
from shared.progress_bar import Progress, parse_bar, parse_preparation
from shared.schemas import Run, Trainer, TrainerExit, TrialParams
from shared.strict_json import first_fault

TRAIN_CONFIG = "train_config.toml"

# Settings that say what is trained and where; they belong to the study, so [trainer.native] must not have them.
_OWN = frozenset(
    {
        "pretrained_model_name_or_path",
        "dataset_config",
        "held_out",
        "output_dir",
        "output_name",
        "logging_dir",
        "state_dir",
        "resume",
        "save_every_n_epochs",
        "seed",
        "device",
        "threads",
    }
)
_SOURCE_ROOT = Path(__file__).resolve().parents[2]


class NativeTrainer:
    """LoRA training on Stable Diffusion 1.x, 2.x and SDXL in a process of its own."""

    holds_out = True  # by their SHA-256, in train_config.toml

    def check_input(self, given: TrainerInput) -> str:
        """See that the base model is one to train and whole, that every picture decodes and has its caption, and that
        each choice of the search space can be trained on them.

        Returns:
            This program's version.
        Raises:
            UserError: something of it will not do.
        """
        require_base_model(given.base_model)
        base = inspect_base_model(given.base_model, setting="--base-model")
        require_family(base, given.family)
        options = given.trainer.options
        require_encoder_rates(options.get("text_encoder_lr"), base, setting="[trainer.native] text_encoder_lr")
        # By name: only this check needs the imaging library, the plans do not.
        dataset: Any = importlib.import_module("optimizer_daemon.lora_training.dataset")
        configs = configs_of(given)
        for config in configs:
            require_possible(config, base)
        commands = [_command(config) for config in configs] or [(1, of_options(options))]
        distinct = {repr(command): command for command in commands}
        found = dataset.check_data(given.dataset_config, multiple_of=base.vae_factor, commands=list(distinct.values()))
        batches = dict(zip(distinct, found, strict=True))
        python = given.trainer.python or sys.executable
        trainings = [
            (
                config,
                -(-batches[repr(_command(config))] // config.gradient_accumulation_steps) * config.max_train_epochs,
            )
            for config in configs
        ]
        require_optimizers(trainings, python, _SOURCE_ROOT, os.environ | _environment(threads=1))
        return metadata.version("lora-tuner")

    def clip_skip(self, given: TrainerInput) -> int:
        """Return the layer that [trainer.native] names, the last one without; SDXL has one of its own."""
        asked = given.trainer.options.get("clip_skip")
        if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
            return 1  # nothing, or what the plan refuses with the other settings
        return 1 if inspect_base_model(given.base_model, setting="--base-model").family == "sdxl" else asked

    def plan(
        self,
        params: TrialParams,
        trial: TrialLayout,
        run: Run,
        gpu: str | None = None,
        resume: ResumePoint | None = None,
    ) -> LaunchPlan:
        """Return the plan; a parameter may be any setting of train_config.toml, or one in a table of it,
        such as `optimizer_args.weight_decay` or `optimizer_args__weight_decay`.

        The training itself looks for its state, so that the same command goes on from there.

        Raises:
            UserError: a parameter is no setting of this trainer, or has a value it cannot use.
        """
        folder = trial.folder.absolute()
        trial = TrialLayout(folder)
        values = _of_study(run, trial)
        if gpu:
            values["device"] = "cuda"  # the only card it sees
        config = _config(values, run.trainer, params)
        env = _environment(run.threads_per_process)
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = gpu
        python = run.trainer.python or sys.executable
        return LaunchPlan(
            argv=(python, "-m", "optimizer_daemon.lora_training", "--config", str(folder / TRAIN_CONFIG)),
            env=env,
            files={TRAIN_CONFIG: to_toml(config)},
            cwd=_SOURCE_ROOT,  # python -m finds the package there, installed or not; all paths are absolute
        )

    def preload(self, run: Run) -> Preload | None:
        """Return the imports and the frozen networks, which take longer than all else before the first step."""
        if run.trainer.python is not None or run.base_model is None:
            return None
        env = _environment(run.threads_per_process)
        return preload_of(Path(run.base_model).absolute(), env, _batch_shape_on_cpu(run))

    def resume_point(self, trial: TrialLayout) -> ResumePoint | None:
        """Return the state, which is one file and whole or absent."""
        return ResumePoint(trial.training_state) if trial.training_state.exists() else None

    def parse_progress(self, line: str) -> Progress | None:
        """Read the progress bar, and what is said before there is one."""
        return parse_bar(line) or parse_preparation(line)

    def diagnose(self, record: TrainerExit | None, last_lines: Sequence[str]) -> str:
        """Return the training's own error line, or what its end and its last lines mean."""
        return explain(record, last_lines)


TRAINER = NativeTrainer()


def preload_of(base_model: Path, env: Mapping[str, str], batch_shape: BatchShape | None = None) -> Preload:
    """Return what trainings on a base model have in common.

    Args:
        base_model: a folder or a file.
        env: theirs.
        batch_shape: of all their batches where they train on the CPU; None where there are several.
    """
    # Threads would not survive the fork, so a training sets its own number. Nor may the driver be touched before it,
    # not even to count GPUs.
    env = {**env, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    what = json.dumps({"base_model": str(base_model), "batch_shape": batch_shape})
    call = ("optimizer_daemon.lora_training.resident:keep_networks", what)
    return Preload(("optimizer_daemon.lora_training.train",), env, _SOURCE_ROOT, call)


def _batch_shape_on_cpu(run: Run) -> BatchShape | None:
    """Return the shape of all batches of a study on the CPU, unless a trial's parameters may change it."""
    toml, device = run.settings.get("dataset-config"), run.settings.get("device")
    if not isinstance(toml, str) or resolve_device(str(device)) != "cpu" or run.base_model is None:
        return None
    options = run.trainer.options
    try:
        factor = inspect_base_model(Path(run.base_model), setting="--base-model").vae_factor
        size, command = int(options.get("train_batch_size", 1)), of_options(options)
        return batch_shape(load_dataset_config(Path(toml), batch_size=size, multiple_of=factor, command=command))
    except (UserError, TypeError, ValueError):
        return None  # the check of the inputs says what is wrong


def _environment(threads: int) -> dict[str, str]:
    return {
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "240",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }


def _of_study(run: Run, trial: TrialLayout) -> dict[str, Any]:
    """What every trial of the study has in common."""
    clip_skip = run.plan.clip_skip if run.plan is not None else 1
    return {
        "pretrained_model_name_or_path": _needed(run.base_model, "--base-model", "name the base model's folder"),
        "dataset_config": _needed(
            run.settings.get("dataset-config"), "--dataset-config", "name the data set's TOML file"
        ),
        "held_out": sorted({picture.sha256 for picture in run.pictures.held_out}) if run.pictures is not None else [],
        "output_dir": str(trial.folder),
        "output_name": trial.output_name,
        "logging_dir": str(trial.tensorboard),
        "state_dir": str(trial.training_state),
        "resume": True,  # from the trial's own state, where an interrupted attempt has left one
        "validation_seed": run.settings.get("seed"),  # the same pictures validate all trials, whatever their own seeds
        "save_every_n_epochs": run.settings.get("save-every-n-epochs") or 2,
        "clip_skip": clip_skip if clip_skip > 1 else None,
        "gradient_checkpointing": "auto",  # a share of the speed is paid only where the memory asks for it
        "device": run.settings.get("device") or "auto",
        "threads": run.threads_per_process,
    }


def _config(of_study: Mapping[str, Any], trainer: Trainer, params: TrialParams) -> TrainConfig:
    """Return what a trial trains with.

    Raises:
        UserError: a parameter or an option is no setting, or has a value that cannot be used.
    """
    values = {**of_study, **_of_options(trainer)}
    for name, value in _of_trial(params).items():
        # What a space draws is added to a table of the study's, setting by setting.
        both = name in ARGUMENT_TABLES and isinstance(values.get(name), dict)
        values[name] = {**values[name], **value} if both else value
    try:
        config = TrainConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"trial parameters: {first_fault(error, values)}; correct the search space") from error
    require_optimizer(config.optimizer_type)
    return config


def configs_of(given: TrainerInput) -> list[TrainConfig]:
    """Return what the trials would train with; those that the plan refuses, with its own words, are left out."""
    of_study = {
        "pretrained_model_name_or_path": str(given.base_model),
        "dataset_config": str(given.dataset_config),
        "output_dir": ".",
        "output_name": "lora",
        "device": given.device,
    }
    found = []
    for params in given.trials:
        with suppress(UserError):
            found.append(_config(of_study, given.trainer, params))
    return found


def _command(config: TrainConfig) -> tuple[int, dict[str, Any]]:
    """What a training says of data sets that say nothing themselves: the batch size and further keys."""
    return config.train_batch_size, config.of_datasets


def _of_options(trainer: Trainer) -> dict[str, Any]:
    """What the study file's [trainer.native] table says, for every trial."""
    for name in trainer.options:
        if name in _OWN or name not in TrainConfig.model_fields:
            why = "the study itself decides it" if name in _OWN else "the native trainer has no such setting"
            known = set(TrainConfig.model_fields) - _OWN
            raise UserError(f"[trainer.native] {name}: {why}{closest(name, known)}; take it out")
    return trainer.options


def _of_trial(params: TrialParams) -> dict[str, Any]:
    values: dict[str, Any] = {"seed": params.training_seed}
    for name, value in params.parameters.items():
        table, _, argument = name.replace("__", ".", 1).partition(".")  # a search space's names have no dots
        if argument and table in ARGUMENT_TABLES:
            values.setdefault(table, {})[argument] = value
        elif name in TrainConfig.model_fields:
            values[name] = value
        elif not _has_done_its_work(name, params):
            raise UserError(
                f"trial parameters: {name}: the native trainer has no such setting"
                f"{closest(name, TrainConfig.model_fields)}; correct the search space"
            )
    return values


def _has_done_its_work(name: str, params: TrialParams) -> bool:
    """Whether `name` only served to compute another parameter, as network_alpha_ratio does for network_alpha."""
    return name.endswith("_ratio") and name.removesuffix("_ratio") in params.derived


def _needed(value: object, flag: str, remedy: str) -> object:
    if value is None:
        raise SettingsError(flag, value, f"{remedy}; the native trainer cannot do without")
    return value

"""Whether kohya's sd-scripts can train what a study asks for: found out once, before the first trial."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimizer_daemon.lora_training.base_model import inspect_base_model
from optimizer_daemon.lora_training.toml_file import closest, line_of_key
from optimizer_daemon.trainers import kohya_inspect
from optimizer_daemon.trainers.base import TrainerInput
from optimizer_daemon.trainers.kohya_config import PYTHON_PATH, SCRIPTS, STUDY_KEYS
from optimizer_daemon.trainers.kohya_data import Subset, list_subsets, read_dataset, settings_of_subset
from shared.errors import CheckpointError, SettingsError, UserError
from shared.model_folders import require_base_model
from shared.process import child_environment
from shared.safetensors_file import read_header
from shared.schemas import Trainer
from shared.single_file import config_folder

PINS = "transformers 4.54.1, diffusers 0.32.1, accelerate 1.6.0, safetensors 0.4.5"
"""What sd-scripts' requirements.txt pins, of which other versions are known to go wrong."""

_DIRECTORY, _PYTHON, _BASE_MODEL = "--sd-scripts-dir", "--trainer-python", "--base-model"
_BUCKET_STEPS: Mapping[str, int] = {"sd15": 64, "sdxl": 32}  # pixels
_ANSWER_TIMEOUT_S = 300.0  # torch, diffusers and transformers are imported, maybe from a cold disk
_LAUNCHERS = ("accelerate", "torchrun", "deepspeed", "conda", "mamba", "micromamba", "poetry", "pipenv", "uv")
_LAUNCHES = ("accelerate launch", "accelerate-launch", "accelerate.commands", "torchrun", "conda run", "mamba run")
_NOT_DIRECTLY = (
    "it starts the training through a launcher, and a stop would reach that and leave the training alive on the GPU; "
    "name the Python itself, such as venv/bin/python"
)


def require_directory(trainer: Trainer, family: str) -> Path:
    """Return the checkout, which holds the script that trains this family.

    Raises:
        SettingsError: it does not.
    """
    if trainer.directory is None:
        raise SettingsError(_DIRECTORY, None, "name the checkout of kohya-ss/sd-scripts, or set SD_SCRIPTS_DIR")
    directory = Path(trainer.directory)
    if not (directory / SCRIPTS[family]).is_file():
        raise SettingsError(
            _DIRECTORY, str(directory), f"it holds no {SCRIPTS[family]}; name a checkout of kohya-ss/sd-scripts"
        )
    return directory


def python_of(trainer: Trainer) -> str:
    """Return the Python of kohya's own environment: --trainer-python, or that of the checkout's venv."""
    return trainer.python or f"{trainer.directory}/venv/bin/python"


def require_python(trainer: Trainer) -> str:
    """Return the Python that trains, once it is seen to be one and no launcher.

    Raises:
        SettingsError: it will not do.
    """
    python = Path(python_of(trainer))
    if not python.is_file() or not os.access(python, os.X_OK):
        where = "there is no such program" if trainer.python else "sd-scripts need an environment of their own"
        raise SettingsError(_PYTHON, str(python), f"{where}; name the Python of one that has their pins ({PINS})")
    name = python.name.partition("-")[0]
    if name in _LAUNCHERS or any(word in _head(python) for word in _LAUNCHES):
        raise SettingsError(_PYTHON, str(python), _NOT_DIRECTLY)
    return str(python)


def version_of(directory: Path) -> str:
    """Return what git calls the checkout; "unknown" for a folder that is none."""
    try:
        told = subprocess.run(
            ("git", "-C", str(directory), "describe", "--tags", "--always", "--dirty"),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.stdout.strip() or "unknown"


def require_kohya_base_model(base_model: Path, options: Mapping[str, Any]) -> None:
    """Refuse a base model that kohya would load otherwise than it is.

    Args:
        options: the [trainer.kohya] table.
    Raises:
        UserError: it is not whole, has configurations of its own, was saved by transformers 5, or needs an option that
            is not set.
    """
    require_base_model(base_model)
    if base_model.is_file() and config_folder(base_model).exists():
        raise SettingsError(
            _BASE_MODEL,
            str(base_model),
            f"kohya never reads {config_folder(base_model).name} beside it and would train another model than is "
            "rendered; name a diffusers folder, or take that folder away where the model needs none",
        )
    base = inspect_base_model(base_model, setting=_BASE_MODEL)
    needed = {"v_parameterization": base.predicts_velocity, "v2": base.version == "sd_v2"}
    for name, is_needed in needed.items():
        if is_needed and options.get(name) is not True:
            what = "predicts the velocity" if name == "v_parameterization" else "is a Stable Diffusion 2"
            raise SettingsError(
                _BASE_MODEL,
                str(base_model),
                f"it {what}, which kohya must be told: set {name} = true in [trainer.kohya]",
            )
    for part in ("text_encoder", "text_encoder_2"):
        folder = base_model / part
        for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
            real = file.resolve()
            try:
                tensors = read_header(real, real.parent).tensors
            except CheckpointError as error:
                raise SettingsError(_BASE_MODEL, str(file), f"{error.reason}; copy that file again") from error
            if tensors and not any(name.startswith("text_model.") for name in tensors):
                raise SettingsError(
                    _BASE_MODEL,
                    str(base_model),
                    f"transformers 5 saved its {part} under other names (no text_model.), so kohya's transformers "
                    "would draw its weights at random; name a single-file checkpoint, or a folder that transformers 4 "
                    "saved",
                )


def require_dataset(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data set's document, once every picture of it decodes and has a caption.

    Raises:
        UserError: something of it will not do.
    """
    document = read_dataset(path)
    for number, dataset in enumerate(document["datasets"]):
        for index, subset in enumerate(dataset.get("subsets", [])):
            for key in ("validation_split", "validation_seed"):
                if isinstance(subset, dict) and key in subset:
                    raise UserError(
                        f"{path}{_line(path, key)}: datasets[{number}].subsets[{index}].{key}: kohya's reader of data "
                        "sets refuses it in a subset, whatever its documentation shows; move it up into [[datasets]]"
                    )
    pictures = []
    for settings, subset in _subsets(path, document, options):
        for source in subset.sources:
            pictures.append(source.picture)
            if source.caption is None and not settings.get("class_tokens"):
                raise UserError(
                    f"{source.picture}: it has no caption file ({subset.caption_extension}) and {subset.place} no "
                    "class_tokens, so kohya would train it on an empty caption; write one, or set caption_extension"
                )
            if source.caption is not None and source.caption.stat().st_size == 0:
                raise UserError(f"{source.caption}: the caption file is empty, at which kohya stops; write a caption")
    # By name: only this check needs the imaging library, the plans do not.
    dataset_module: Any = importlib.import_module("optimizer_daemon.lora_training.dataset")
    dataset_module.check_pictures(pictures)
    return document


def require_fixed_pictures(given: TrainerInput, document: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """See that no latents are cached of pictures that change in every epoch; kohya looks only when it trains.

    Args:
        config: of a training.
    Raises:
        UserError: they are.
    """
    if not config.get("cache_latents") and not config.get("cache_latents_to_disk"):
        return
    path = given.dataset_config
    for settings in _settings(document, config):
        for key in ("color_aug", "random_crop"):
            if not settings.get(key):
                continue
            line = _line(path, key)
            where = f"{path}{line}: {key}" if line else _where(key, given, config)
            raise UserError(
                f"{where}: it changes each picture anew, so no latents can be cached; take it out, or set "
                "cache_latents = false in [trainer.kohya]"
            )


def require_bucket_steps(path: Path, document: Mapping[str, Any], options: Mapping[str, Any], family: str) -> None:
    """See that buckets are stepped as kohya's script for this family wants them; it looks only when it trains.

    Raises:
        UserError: they are not.
    """
    wanted = _BUCKET_STEPS[family]
    for number, dataset in enumerate(document["datasets"]):
        told = {**options, **document.get("general", {}), **dataset}
        steps = told.get("bucket_reso_steps", wanted)
        if told.get("enable_bucket") and (not isinstance(steps, int) or steps % wanted):
            raise UserError(
                f"{path}{_line(path, 'bucket_reso_steps')}: datasets[{number}].bucket_reso_steps: {steps!r} will not "
                f"do; kohya trains {family} at multiples of {wanted} pixels"
            )


def ask(
    directory: Path,
    python: str,
    script: str,
    configs: Sequence[Mapping[str, Any]],
    dataset: Mapping[str, Any],
    *,
    python_path: Sequence[str],
) -> Any:
    """Return kohya_inspect's answer.

    Args:
        python_path: folders of optimizers that are not kohya's.
    Raises:
        SettingsError: the Python gives none, is no direct one, or its environment will not do.
    """
    question = {"directory": str(directory), "script": script, "configs": list(configs), "dataset": dataset}
    environment = child_environment() | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(python_path), "COLUMNS": "240"}
    try:
        with subprocess.Popen(
            (python, str(Path(kohya_inspect.__file__))),
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            try:
                said, complaints = process.communicate(json.dumps(question, default=str), timeout=_ANSWER_TIMEOUT_S)
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise SettingsError(
                    _PYTHON, python, f"it imported {script} for {_ANSWER_TIMEOUT_S:.0f} s without end; try it by hand"
                ) from error
    except OSError as error:
        raise SettingsError(_PYTHON, python, f"name a Python that can be started ({error.strerror})") from error
    answers = [line.removeprefix(kohya_inspect.MARK) for line in said.splitlines() if kohya_inspect.MARK in line]
    if not answers:
        last = (complaints.strip() or said.strip() or "nothing").splitlines()[-1]
        raise SettingsError(_PYTHON, python, f"it cannot run {script}.py, it said: {last}; name kohya's Python")
    answer = json.loads(answers[-1])
    if answer["pid"] != process.pid:
        raise SettingsError(_PYTHON, python, _NOT_DIRECTLY)
    _require_environment(python, answer, script)
    return answer


def require_known(given: TrainerInput, config: Mapping[str, Any], answer: Mapping[str, Any], version: str) -> None:
    """See that every setting of a training is one of the script's, with a value it takes.

    sd-scripts leave out a key of the file that they do not know, and check no value of it.

    Raises:
        UserError: one is not.
    """
    options = answer["options"]
    for name, value in config.items():
        where = _where(name, given, config)
        if name not in options:
            if name in given.trainer.options or name in _drawn(given):
                hint = closest(name, set(options) - set(STUDY_KEYS))
                raise UserError(f"{where}: sd-scripts {version} have no such option{hint}; take it out")
            raise SettingsError(
                _DIRECTORY, given.trainer.directory, f"its version {version} has no option {name}; use a newer checkout"
            )
        if (expected := _fault(value, options[name])) is not None:
            raise UserError(f"{where}: {value!r} will not do; {expected} is expected")


def require_accepted(dataset_config: Path, answer: Mapping[str, Any]) -> None:
    """See that sd-scripts' own functions have refused nothing.

    Raises:
        UserError: they have.
    """
    if (refused := answer.get("refused")) is not None:
        raise UserError(
            f"sd-scripts refuse {refused['what']}: {_english(refused['error'])}; correct the search space or "
            "[trainer.kohya], or install what is missing in kohya's environment"
        )
    if "dataset_error" in answer:
        raise UserError(f"{dataset_config}: sd-scripts refuse it: {_english(answer['dataset_error'])}; correct that")


def _english(message: str) -> str:
    """Return a message of sd-scripts without its Japanese half."""
    return message.partition(" / ")[0].strip()


def _subsets(
    path: Path, document: Mapping[str, Any], options: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], Subset]]:
    return zip(_settings(document, options), list_subsets(path, document, options), strict=True)


def _settings(document: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what kohya takes for each subset."""
    for dataset in document["datasets"]:
        for subset in dataset.get("subsets", []):
            if isinstance(subset, dict):
                yield settings_of_subset(options, document, dataset, subset)


def _require_environment(python: str, answer: Mapping[str, Any], script: str) -> None:
    versions = answer["versions"]
    transformers = versions.get("transformers")
    if transformers is not None and int(transformers.partition(".")[0]) >= 5:
        raise SettingsError(
            _PYTHON,
            python,
            f"it has transformers {transformers}, with which sd-scripts fail or write text-encoder keys that nothing "
            f"else reads; name the Python of an environment with their pins ({PINS})",
        )
    if "import_error" in answer:
        raise SettingsError(
            _PYTHON,
            python,
            f"it cannot import {script}.py ({answer['import_error']}); install sd-scripts' pins ({PINS})",
        )


def _fault(value: object, option: Mapping[str, Any]) -> str | None:
    """Return what is expected where `value` is nothing the option takes."""
    if option["switch"]:
        return None if isinstance(value, bool) else "true or false"
    if option["list"]:
        if not isinstance(value, list):
            return "a list"
        faults = (_fault(entry, {**option, "list": False}) for entry in value)
        fault = next((fault for fault in faults if fault is not None), None)
        return fault and f"a list, each entry {fault}"
    if option["choices"] is not None:
        return None if value in option["choices"] else f"one of {', '.join(map(str, option['choices']))}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    match option["type"]:
        case "int":
            return None if is_number and isinstance(value, int) else "a whole number"
        case "float":
            return None if is_number else "a number"
        case "int_or_float":
            return None if is_number else "a number"
        case _:
            return None if isinstance(value, str) else "a text"


def _where(name: str, given: TrainerInput, config: Mapping[str, Any]) -> str:
    """Say where a setting comes from; a trial's parameter wins over the table."""
    if name in _drawn(given):
        return f"--search-space: {name}"
    return f"[trainer.kohya] {name}" if name in given.trainer.options and name != PYTHON_PATH else name


def _drawn(given: TrainerInput) -> set[str]:
    return {name.partition(".")[0] for params in given.trials for name in params.parameters}


def _line(path: Path, key: str) -> str:
    number = line_of_key(path, key)
    return f" line {number}" if number is not None else ""


def _head(program: Path) -> str:
    """Return the beginning of a script; nothing of a binary."""
    with program.open("rb") as file:
        head = file.read(4096)
    return head.decode(errors="replace") if head.startswith(b"#!") else ""

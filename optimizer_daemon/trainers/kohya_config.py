"""From a trial's parameters to the train_config.toml that kohya's sd-scripts read. Pure."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from shared.errors import UserError
from shared.layout import TrialLayout
from shared.schemas import TrialParams

SCRIPTS: Mapping[str, str] = MappingProxyType({"sd15": "train_network.py", "sdxl": "sdxl_train_network.py"})
"""--model-family -> the script that trains it."""

PYTHON_PATH = "python_path"
"""The one key of [trainer.kohya] that is ours: folders of a user's own optimizer classes, for PYTHONPATH."""

MOST_SEED = 2**32 - 1  # numpy's
CLIP_SKIP = 2  # what Stable Diffusion 1.5 users of sd-scripts pass

ARGUMENT_LISTS = ("optimizer_args", "lr_scheduler_args", "network_args")
_LITERALS = ("optimizer_args", "lr_scheduler_args")  # their values are read by ast.literal_eval

_BELONGS_TO_STUDY = "the study itself decides it"
_EVERY_EPOCH = "checkpoints are counted in epochs; pass --save-every-n-epochs"
_ONE_DATA_SET = "the data set is --dataset-config"
_OWN_STATE = "the study saves states and goes on from them itself"
_TRIALS_LENGTH = "the search space or --max-epochs says how long a trial trains"
_OF_LAUNCHER = "it belongs to accelerate launch, which leaves the training alive when it is stopped"
STUDY_KEYS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("output_dir", "output_name", "logging_dir", "log_prefix", "save_model_as"), _BELONGS_TO_STUDY)
    | dict.fromkeys(("config_file", "output_config", "debug_dataset"), _BELONGS_TO_STUDY)
    | {"pretrained_model_name_or_path": "the base model is --base-model", "seed": "the seed is --seed"}
    | dict.fromkeys(("dataset_config", "dataset_class", "train_data_dir", "reg_data_dir", "in_json"), _ONE_DATA_SET)
    | dict.fromkeys(("save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio"), _EVERY_EPOCH)
    | dict.fromkeys(("save_last_n_epochs", "save_last_n_steps"), "it would delete checkpoints before they are scored")
    | dict.fromkeys(("save_state", "save_state_on_train_end", "save_last_n_epochs_state", "resume"), _OWN_STATE)
    | dict.fromkeys(("save_last_n_steps_state", "initial_epoch", "initial_step"), _OWN_STATE)
    | {"skip_until_initial_step": _OWN_STATE, "max_train_steps": _TRIALS_LENGTH}
    | {"caption_extention": "its other spelling, caption_extension, is the one that counts"}
    | dict.fromkeys(("num_processes", "num_machines", "num_cpu_threads_per_process", "multi_gpu"), _OF_LAUNCHER)
    | dict.fromkeys(("gpu_ids", "main_process_port", "machine_rank", "extra_accelerate_launch_args"), _OF_LAUNCHER)
    | dict.fromkeys(("accelerate", "accelerate_launch", "accelerate-launch", "launcher"), _OF_LAUNCHER)
)
"""Keys that [trainer.kohya] must not have -> why, or what to use instead."""

DATA_KEYS = frozenset(
    {
        "resolution",
        "enable_bucket",
        "min_bucket_reso",
        "max_bucket_reso",
        "bucket_reso_steps",
        "bucket_no_upscale",
        "resize_interpolation",
        "vae",
        "v2",
        "caption_extension",
    }
)
"""Keys that decide which captions are linked and what the cached latents are; kohya names those without them."""


@dataclass(frozen=True)
class StudySettings:
    """What all trials of a study have in common.

    Args:
        family: a key of SCRIPTS.
        base_model: a single file or a diffusers folder, absolute.
        dataset_config: what kohya reads the data set from, absolute.
        tokenizers: folder for tokenizer_cache_dir; without one kohya would look for them in the network.
        half: trains in 16 bits; a CPU cannot.
        clip_skip: layer of the text encoder, counted from the end.
        save_every_n_epochs: 1 or more.
        seed: of the study, for whatever has to be equal in all trials.
        options: the [trainer.kohya] table.
    """

    family: str
    base_model: str
    dataset_config: str
    tokenizers: str
    half: bool
    clip_skip: int
    save_every_n_epochs: int
    seed: int
    options: Mapping[str, Any]


def training_config(params: TrialParams, trial: TrialLayout, study: StudySettings) -> dict[str, Any]:
    """Return train_config.toml as a flat table: defaults, below [trainer.kohya], below the trial's parameters.

    Raises:
        UserError: an option or a parameter is nothing that can be written.
    """
    require_options(study)
    if max(params.training_seed, study.seed) > MOST_SEED:
        raise UserError(f"--seed: kohya's generators take at most {MOST_SEED}; pass a smaller one")
    drawn, arguments = _of_trial(params)
    options = {name: value for name, value in study.options.items() if name != PYTHON_PATH}
    config: dict[str, Any] = {
        **_of_study(study, trial),
        **_defaults(study),
        **{name: value for name, value in options.items() if name not in ARGUMENT_LISTS},
        **drawn,
        "seed": params.training_seed,
    }
    rate = config.get("text_encoder_lr")
    if rate is not None:  # a list for kohya, and of one kind of number for its TOML reader
        config["text_encoder_lr"] = [float(part) for part in (rate if isinstance(rate, list) else [rate])]
    for name in ARGUMENT_LISTS:
        merged = {**table_of(name, options.get(name)), **arguments[name]}
        if name == "optimizer_args" and str(config.get("optimizer_type")).lower() == "adafactor":
            # Its relative steps would put their own rate in the place of both learning rates, and refuse a warm-up.
            merged = {"scale_parameter": False, "relative_step": False, "warmup_init": False} | merged
        if merged:
            config[name] = [_pair(name, key, value) for key, value in merged.items()]
    _require_schedule(config)
    return config


def to_toml(config: Mapping[str, Any]) -> str:
    """Return the file; what is None is left out."""
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in config.items() if value is not None)


def require_options(study: StudySettings) -> None:
    """See that [trainer.kohya] leaves to the study what is the study's.

    Raises:
        UserError: it does not.
    """
    for name, value in study.options.items():
        if name == "save_every_n_epochs" and value == 0:
            raise UserError(
                "[trainer.kohya] save_every_n_epochs: 0 will not do, for sd-scripts divide by it at the end of the "
                "first epoch; take it out and pass --save-every-n-epochs 1 or more"
            )
        if name in STUDY_KEYS:
            raise UserError(f"[trainer.kohya] {name}: {STUDY_KEYS[name]}; take it out")
    if "clip_skip" in study.options and study.family == "sdxl":
        raise UserError("[trainer.kohya] clip_skip: kohya's SDXL training pays no heed to it; take it out")


def _of_study(study: StudySettings, trial: TrialLayout) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": study.base_model,
        "dataset_config": study.dataset_config,
        "output_dir": str(trial.folder),
        "output_name": trial.output_name,
        "logging_dir": str(trial.tensorboard),
        "save_every_n_epochs": study.save_every_n_epochs,
        "save_model_as": "safetensors",
        "save_state": True,
        "save_last_n_epochs_state": 1,  # one is about six times the weights
    }


def _defaults(study: StudySettings) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "network_module": "networks.lora",
        "save_precision": "fp16",
        "mixed_precision": "fp16" if study.half else "no",
        "gradient_checkpointing": True,
        "sdpa": True,
        "cache_latents": True,
        "cache_latents_to_disk": True,
        "max_data_loader_n_workers": 8,
        "tokenizer_cache_dir": study.tokenizers,
        # Without one kohya shuffles anew for the validation set, and some pictures are in both sets.
        "validation_seed": study.seed,
    }
    if study.options.get("cache_latents") is False:
        defaults["cache_latents_to_disk"] = False  # kohya would cache after all
    if study.family == "sdxl":
        defaults["no_half_vae"] = True  # SDXL's VAE overflows in 16 bits
    elif study.clip_skip > 1:
        defaults["clip_skip"] = study.clip_skip
    return defaults


def _of_trial(params: TrialParams) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return what the trial sets, and what it adds to each list of arguments."""
    values: dict[str, Any] = {}
    arguments: dict[str, dict[str, Any]] = {name: {} for name in ARGUMENT_LISTS}
    for name, value in params.parameters.items():
        head, dot, tail = name.partition(".")
        if dot and head in ARGUMENT_LISTS:
            arguments[head][tail] = value
        elif name in STUDY_KEYS:
            raise UserError(f"trial parameters: {name}: {STUDY_KEYS[name]}; take it out of the search space")
        elif name in DATA_KEYS:
            raise UserError(
                f"trial parameters: {name}: all trials share the linked captions and cached latents, which depend on "
                "it; set it in the data-set TOML or in [trainer.kohya]"
            )
        elif not (name.endswith("_ratio") and name.removesuffix("_ratio") in params.derived):  # it has done its work
            values[name] = value
    return values, arguments


def table_of(name: str, given: object) -> dict[str, Any]:
    """Return the arguments that [trainer.kohya] sets, from a table or from kohya's own list of k=v."""
    where = f"[trainer.kohya] {name}"
    if given is None:
        return {}
    if isinstance(given, dict):
        return given
    if not isinstance(given, list) or not all(isinstance(entry, str) and "=" in entry for entry in given):
        raise UserError(f"{where}: {given!r} will not do; write a table, or a list such as ['name=value']")
    pairs = (entry.partition("=") for entry in given)
    return {key.strip(): _literal(where, key, text) if name in _LITERALS else text for key, _, text in pairs}


def _literal(where: str, key: str, text: str) -> object:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError) as error:
        raise UserError(
            f"{where}: {key}={text} will not do; kohya reads the value as a Python literal, so a text needs quotes"
        ) from error


def _pair(name: str, key: str, value: object) -> str:
    """Return k=v as kohya splits it: at every `=` of a literal, at the first one of a network argument."""
    if not re.fullmatch(r"\w+", key):
        raise UserError(f"{name}.{key}: that is no name of an argument")
    text = repr(value) if name in _LITERALS else str(value)
    if name in _LITERALS and "=" in text:
        raise UserError(f"{name}.{key}: {value!r} will not do, for kohya splits at every '='; use a value without one")
    if any(isinstance(part, float) and not math.isfinite(part) for part in (value,)):
        raise UserError(f"{name}.{key}: {value!r} will not do; write a finite number")
    return f"{key}={text}"


def _require_schedule(config: Mapping[str, Any]) -> None:
    warmup, scheduler = config.get("lr_warmup_steps"), config.get("lr_scheduler", "constant")
    if scheduler == "constant" and warmup and not config.get("lr_scheduler_type"):
        raise UserError(
            f"lr_scheduler 'constant' has no warm-up but lr_warmup_steps is {warmup}; use constant_with_warmup, or 0"
        )
    if isinstance(warmup, float) and warmup >= 1:
        raise UserError(
            f"lr_warmup_steps: {warmup} will not do, for kohya takes a number with a point for a share of all steps; "
            "write a whole number, or a share below 1"
        )


def _toml_value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return f'"{_UNSAFE.sub(_escaped, value)}"'
        case list() | tuple():
            return f"[{', '.join(map(_toml_value, value))}]"
    raise UserError(f"[trainer.kohya]: {value!r} will not do; sd-scripts take texts, numbers, true, false and lists")


_UNSAFE = re.compile(r'[\x00-\x1f\x7f"\\]')


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    return f"\\{character}" if character in '"\\' else f"\\u{ord(character):04x}"

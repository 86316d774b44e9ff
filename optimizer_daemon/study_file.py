"""run.json: what a study is, frozen at its first start and only compared afterwards."""

from __future__ import annotations

import importlib
import logging
import os
import platform
import secrets
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from optimizer_daemon.database import Database, default_url, require_local
from optimizer_daemon.dataset_files import caption_extension, dataset_files, require_same_files
from optimizer_daemon.settings import OptimizerSettings
from optimizer_daemon.slots import slot_count
from shared.errors import LabError, SettingsError, StudyMismatchError
from shared.files import read_kept, write_model
from shared.held_out import require_unchanged, study_pictures, with_held_out
from shared.layout import StudyLayout
from shared.logs import log_change
from shared.metric_names import MetricInputs, needs_held_out, parse_metrics, uses_pictures
from shared.model_folders import digest_model, family_of
from shared.planning import make_plan
from shared.prompts import draw_prompts, read_prompt_file
from shared.schemas import Run, Scalar, ScoringPreset, Trainer
from shared.schemas.optimizer import RunStatus
from shared.schemas.pictures import Picture, StudyPictures
from shared.scoring_presets import load_preset, plan_scoring, require_networks

Shown = dict[str, Scalar | tuple[Scalar, ...] | None]
"""Settings by flag name, without the dashes."""

WORKLOAD = "sd-lora"
MOST_PROMPTS = 8

_FREE = {
    "baseline",  # run.json keeps those it has
    "n_trials",
    "max_epochs",
    "stages",
    "timeout",
    "device",
    "gpus",
    "jobs",
    "gpu_policy",
    "finalists",
    "pruner",
    "pruner_warmup_epochs",
    "sd_scripts_dir",
    "trainer_python",
}
"""Settings that may differ from one start to the next; with any other changed, scores could not be compared."""

_log = logging.getLogger(__name__)

_LIBRARIES = ("lora-tuner", "torch", "diffusers", "transformers", "peft", "optuna")


def find_run(
    settings: OptimizerSettings,
    study: StudyLayout,
    now: datetime,
    *,
    trainer_version: str | None = None,
    clip_skip: int = 1,
) -> Run:
    """Return what the study's run.json has to say from now on; nothing is written.

    It is made from the settings at the first start and compared with them later.

    Args:
        trainer_version: of the program that trains, where it has one.
        clip_skip: the layer of the text encoder that is trained and rendered with, counted from the end.
    Raises:
        SettingsError: a setting is missing or names nothing usable.
        StudyMismatchError: the folder was made with other settings, the base model's files or the data set have
            changed, or a part of the study is missing.
        UnreadableFileError: run.json is damaged.
    """
    shown = _shown(settings)
    require_local(settings.storage)
    try:
        run = read_kept(study.run, Run)
    except FileNotFoundError:
        if study.database.exists() or study.list_trials():
            raise StudyMismatchError(
                f"{study.root} holds a study but no run.json; put run.json back, or choose another --output-dir"
            ) from None
        run = _made(settings, study, shown, now, trainer_version, clip_skip)
    else:
        _refuse_changes(run, settings, shown)
        if run.storage == default_url(study) and not Database.of(run, study).is_there and study.list_trials():
            raise StudyMismatchError(
                f"{study.root} holds trials but no {study.database.name}; put its database back, or choose another "
                "--output-dir"
            )
        run = _with_same_data_set(run, settings)
        if trainer_version not in (None, run.trainer.version):
            # A program is updated for good reasons; whoever compares its trials has to know.
            log_change(
                _log,
                "the trainer's program has changed; trials before and after may not be comparable",
                level=logging.WARNING,
                before=run.trainer.version,
                now=trainer_version,
            )
    free = {_flag(name): shown[_flag(name)] for name in _FREE}
    here = trainer_of(settings)
    version = trainer_version or run.trainer.version
    trainer = run.trainer.model_copy(
        update={"python": here.python, "directory": here.directory, "family": here.family, "version": version}
    )
    run = run.model_copy(
        update={"status": "running", "updated": now, "settings": {**run.settings, **free}, "trainer": trainer}
    )
    slots = slot_count(settings)
    if slots == run.slots:
        return run  # with as many threads as before
    return run.model_copy(update={"slots": slots, "threads_per_process": threads_per_process(slots)})


def trainer_of(settings: OptimizerSettings, version: str | None = None) -> Trainer:
    """Return what run.json says of the trainer.

    Args:
        version: of its program, where that is known by now.
    """
    directory = settings.sd_scripts_dir
    return Trainer(
        name=settings.trainer_name,
        version=version,
        python=None if settings.trainer_python is None else str(settings.trainer_python.absolute()),
        directory=None if directory is None else str(directory.absolute()),
        family=settings.model_family or (None if settings.base_model is None else family_of(settings.base_model)),
        options=dict(settings.trainer_options),
    )


def require_inputs(settings: OptimizerSettings) -> tuple[Path, Path]:
    """Return the base model and the data set.

    Raises:
        SettingsError: one of them is not named.
    """
    return (
        _required(settings.base_model, "base_model", "name the base model's file or diffusers folder"),
        _required(settings.dataset_config, "dataset_config", "name the kohya TOML of the training pictures"),
    )


@contextmanager
def begun(run: Run, study: StudyLayout, database: Database) -> Iterator[None]:
    """Write run.json around the opening of the database; a first start that fails there leaves nothing of either.

    run.json comes before a new database, for a database without it is refused; but it only says that an older study
    runs again once its database has opened.
    """
    first = not study.run.exists()
    if first:
        write_model(study.run, run)
    try:
        yield
    except LabError:
        if first:
            database.discard(study)
            study.run.unlink()
        raise
    if not first:
        write_model(study.run, run)


def rewritten(run: Run, study: StudyLayout, status: RunStatus, now: datetime) -> Run:
    """Write run.json with another status and return it."""
    changed = run.model_copy(update={"status": status, "updated": now})
    write_model(study.run, changed)
    return changed


def captions(dataset_config: Path, options: Mapping[str, Any]) -> list[str]:
    """Return the first line of every caption file of a kohya dataset TOML, or class_tokens where a folder has none.

    It reads what any trainer's file may hold; image_dir counts from the file's folder.

    Args:
        options: the study file's table of the trainer.
    Raises:
        SettingsError: the file is no such TOML.
    """
    try:
        document = tomllib.loads(dataset_config.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            "--dataset-config", str(dataset_config), f"name a readable kohya dataset TOML ({error})"
        ) from error
    try:
        return [
            caption
            for dataset in document.get("datasets", [])
            for subset in dataset.get("subsets", [])
            for caption in _captions_of(
                {**options, **document.get("general", {}), **dataset, **subset}, dataset_config.parent
            )
        ]
    except (AttributeError, TypeError, ValueError) as error:  # a list where a table belongs, and the like
        raise SettingsError(
            "--dataset-config", str(dataset_config), f"write its tables as kohya's dataset TOML has them ({error})"
        ) from error
    except OSError as error:
        raise SettingsError(
            "--dataset-config", str(dataset_config), f"make {error.filename} readable ({error.strerror})"
        ) from error


def _captions_of(subset: Mapping[str, Any], beside: Path) -> list[str]:
    if subset.get("is_reg") or "image_dir" not in subset:
        return []
    files = sorted((beside / subset["image_dir"]).glob(f"*{caption_extension(subset)}"))
    texts = [file.read_text(encoding="utf-8-sig", errors="replace") for file in files]
    return [text.partition("\n")[0].strip() for text in texts or [subset.get("class_tokens", "")]]


def threads_per_process(slots: int) -> int:
    """Return how many CPU threads each trainer and the evaluator get when all run."""
    return max(1, len(os.sched_getaffinity(0)) // (slots + 1))


def _made(
    settings: OptimizerSettings,
    study: StudyLayout,
    shown: Shown,
    now: datetime,
    version: str | None,
    clip_skip: int,
) -> Run:
    slots = slot_count(settings)
    base_model, dataset_config = require_inputs(settings)
    scoring, pictures = _measuring(settings, dataset_config)
    prompts = (
        read_prompt_file(settings.prompts)
        if settings.prompts is not None
        else draw_prompts(captions(dataset_config, settings.trainer_options), MOST_PROMPTS, settings.seed)
    )
    plan = make_plan(
        base_model=base_model,
        prompts=prompts,
        device=settings.device,
        num_samples=settings.num_samples,
        lora_scale=settings.lora_scale,
        steps=settings.render_steps,
        cfg_scale=settings.cfg_scale,
        clip_skip=clip_skip,
        scoring=scoring,
    )
    return Run(
        folder_id=secrets.token_hex(8),
        study_name=settings.study_name,
        storage=settings.storage or default_url(study),
        workload=WORKLOAD,
        score_source="evaluator",
        status="running",
        created=now,
        updated=now,
        base_model=str(base_model.absolute()),
        plan=plan,
        plan_hash=plan.digest(),
        pictures=pictures,
        dataset_files=dataset_files(dataset_config, settings.trainer_options),
        trainer=trainer_of(settings, version),
        settings=shown,
        slots=slots,
        threads_per_process=threads_per_process(slots),
        versions={"python": platform.python_version()}
        | {name: version for name in _LIBRARIES if (version := _version(name)) is not None},
    )


def _measuring(settings: OptimizerSettings, dataset_config: Path) -> tuple[ScoringPreset, StudyPictures | None]:
    """Return what is measured and scored, and the pictures where something looks at them.

    Raises:
        SettingsError: the preset, a metric or a network will not do, or there are too few pictures.
    """
    preset = load_preset(settings.scoring)
    inputs = MetricInputs(settings.clip_model, settings.dino_model, settings.lpips_weights)
    require_networks(inputs)
    named = parse_metrics(settings.metrics, inputs, preset.needed_metrics)
    pictures = StudyPictures()
    if preset.targets == "dataset" or any(uses_pictures(name) for name in named):
        pictures = study_pictures(dataset_config)
    elif settings.metrics is None and (settings.clip_model or settings.dino_model):
        # The memorisation alarm comes by itself; not where a trainer of one's own reads another kind of data set.
        with suppress(SettingsError):
            pictures = study_pictures(dataset_config)
    inputs = replace(inputs, pictures=pictures)
    metrics = parse_metrics(settings.metrics, inputs, preset.needed_metrics)
    if needs_held_out(metrics):
        inputs = replace(inputs, pictures=with_held_out(pictures, settings.seed))
    scoring = plan_scoring(preset, metrics, inputs, _measure_targets)
    return scoring, inputs.pictures if any(uses_pictures(name) for name in metrics) else None


def _measure_targets(pictures: Sequence[Picture]) -> Mapping[str, float]:
    # By name: only this needs the imaging library, and only for targets = "dataset".
    module: Any = importlib.import_module("optimizer_daemon.dataset_targets")
    found: Mapping[str, float] = module.measure_targets(pictures)
    return found


def _refuse_changes(run: Run, settings: OptimizerSettings, shown: Shown) -> None:
    # A setting that is younger than the study had its default there.
    defaults = {_flag(name): info.default for name, info in OptimizerSettings.model_fields.items()}
    before = defaults | run.settings
    changed = [
        f"--{flag}: {before[flag]} -> {value}"
        for flag, value in shown.items()
        if flag.replace("-", "_") not in _FREE and before[flag] != value
    ]
    options = dict(settings.trainer_options)
    changed += [
        f"[trainer.{settings.trainer_name}] {name}: {run.trainer.options.get(name)} -> {options.get(name)}"
        for name in sorted({*options, *run.trainer.options})
        if run.trainer.options.get(name) != options.get(name)
    ]
    if changed:
        raise StudyMismatchError(
            f"this study was made with other settings ({'; '.join(changed)}); use those again, or another --output-dir "
            "and --study-name"
        )
    base_model, _ = require_inputs(settings)
    if run.plan is not None and digest_model(base_model) != run.plan.base_digest:
        raise StudyMismatchError(
            f"the files of --base-model {base_model} have changed since the study began, so new scores could not be "
            "compared with the old ones; put them back, or use another --output-dir and --study-name"
        )


def _with_same_data_set(run: Run, settings: OptimizerSettings) -> Run:
    _, dataset_config = require_inputs(settings)
    files = dataset_files(dataset_config, settings.trainer_options)
    if run.dataset_files is not None:
        require_same_files(run.dataset_files, files)
    elif run.pictures is not None:  # all that an earlier version recorded
        require_unchanged(run.pictures.held_out, "held-out")
        require_unchanged(run.pictures.training, "training")
    return run.model_copy(update={"dataset_files": files})


def _shown(settings: OptimizerSettings) -> Shown:
    """Return the settings by flag name, paths absolute: they mean the same from wherever the next start comes."""
    values: Shown = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        values[_flag(name)] = str(value.absolute()) if isinstance(value, Path) else value
    return values


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _required(value: Path | None, field: str, remedy: str) -> Path:
    if value is None:
        raise SettingsError(f"--{_flag(field)}", value, f"{remedy}, or set {field} in [optimizer] of the --config file")
    return value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

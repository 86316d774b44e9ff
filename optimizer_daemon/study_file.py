"""run.json: what a study is, frozen at its first start and only compared afterwards."""

from __future__ import annotations

import os
import platform
import secrets
import sys
import tomllib
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from optimizer_daemon.settings import OptimizerSettings
from shared.errors import SettingsError, StudyMismatchError
from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.planning import digest_model, draw_prompts, make_plan, read_prompt_file
from shared.schemas import Run, Scalar, Trainer
from shared.schemas.optimizer import RunStatus

Shown = dict[str, Scalar | tuple[Scalar, ...] | None]
"""Settings by flag name, without the dashes."""

WORKLOAD = "sd-lora"
CAPTION_EXTENSION = ".caption"  # sd-scripts' default
MOST_PROMPTS = 8

_FREE = {"n_trials", "max_epochs", "timeout", "device"}
"""Settings that may differ from one start to the next; with any other changed, scores could not be compared."""

_LIBRARIES = ("lora-tuner", "torch", "diffusers", "transformers", "peft", "optuna")


def open_run(settings: OptimizerSettings, study: StudyLayout, now: datetime) -> Run:
    """Return the study's run.json with status running: made at the first start, compared with the settings later.

    Raises:
        SettingsError: a setting is missing or names nothing usable.
        StudyMismatchError: the folder was made with other settings, or the base model's files have changed.
    """
    shown = _shown(settings)
    try:
        run = read_model(study.run, Run)
    except FileNotFoundError:
        if study.database.exists():
            raise StudyMismatchError(
                f"{study.root} holds a study but no run.json; put run.json back, or choose another --output-dir"
            ) from None
        run = _made(settings, study, shown, now)
    else:
        _refuse_changes(run, settings, shown)
    return rewritten(
        run, study, "running", now, {**run.settings, **{_flag(name): shown[_flag(name)] for name in _FREE}}
    )


def rewritten(
    run: Run, study: StudyLayout, status: RunStatus, now: datetime, settings: Mapping[str, Any] | None = None
) -> Run:
    """Write run.json with another status and return it."""
    update: dict[str, Any] = {"status": status, "updated": now}
    if settings is not None:
        update["settings"] = dict(settings)
    changed = run.model_copy(update=update)
    write_model(study.run, changed)
    return changed


def captions(dataset_config: Path) -> list[str]:
    """Return the first line of every caption file of a kohya dataset TOML, or class_tokens where a folder has none.

    It reads what any trainer's file may hold; image_dir counts from the file's folder.

    Raises:
        SettingsError: the file is no such TOML.
    """
    try:
        document = tomllib.loads(dataset_config.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            "--dataset-config", str(dataset_config), f"name a readable kohya dataset TOML ({error})"
        ) from error
    general = document.get("general", {})
    found = []
    for dataset in document.get("datasets", []):
        for subset in dataset.get("subsets", []):
            known = {**general, **dataset, **subset}
            if known.get("is_reg") or "image_dir" not in subset:
                continue
            folder = dataset_config.parent / subset["image_dir"]
            files = sorted(folder.glob(f"*{known.get('caption_extension', CAPTION_EXTENSION)}"))
            texts = [file.read_text(encoding="utf-8-sig", errors="replace") for file in files]
            found += [text.partition("\n")[0].strip() for text in texts or [known.get("class_tokens", "")]]
    return found


def threads_per_process() -> int:
    """Return how many CPU threads a trainer and an evaluator get when both run."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def _made(settings: OptimizerSettings, study: StudyLayout, shown: Shown, now: datetime) -> Run:
    dataset_config = _required(
        settings.dataset_config, "dataset_config", "name the kohya TOML of the training pictures"
    )
    base_model = _required(settings.base_model, "base_model", "name the diffusers folder of the base model")
    prompts = (
        read_prompt_file(settings.prompts)
        if settings.prompts is not None
        else draw_prompts(captions(dataset_config), MOST_PROMPTS, settings.seed)
    )
    plan = make_plan(
        base_model=base_model,
        prompts=prompts,
        device=settings.device,
        num_samples=settings.num_samples,
        steps=settings.render_steps,
        cfg_scale=settings.cfg_scale,
        clip_model=settings.clip_model,
    )
    return Run(
        folder_id=secrets.token_hex(8),
        study_name=settings.study_name,
        storage=settings.storage or f"sqlite:///{study.database.absolute()}",
        workload=WORKLOAD,
        score_source="evaluator",
        status="running",
        created=now,
        updated=now,
        base_model=str(base_model.absolute()),
        plan=plan,
        plan_hash=plan.digest(),
        trainer=Trainer(name=settings.trainer, version=_version("lora-tuner"), python=sys.executable),
        settings=shown,
        threads_per_process=threads_per_process(),
        versions={"python": platform.python_version()}
        | {name: version for name in _LIBRARIES if (version := _version(name)) is not None},
    )


def _refuse_changes(run: Run, settings: OptimizerSettings, shown: Shown) -> None:
    changed = [
        f"--{flag}: {run.settings.get(flag)} -> {value}"
        for flag, value in shown.items()
        if flag.replace("-", "_") not in _FREE and run.settings.get(flag) != value
    ]
    if changed:
        raise StudyMismatchError(
            f"this study was made with other settings ({'; '.join(changed)}); use those again, or another --output-dir "
            "and --study-name"
        )
    base_model = _required(settings.base_model, "base_model", "name the diffusers folder of the base model")
    if run.plan is not None and digest_model(base_model) != run.plan.base_digest:
        raise StudyMismatchError(
            f"the files of --base-model {base_model} have changed since the study began, so new scores could not be "
            "compared with the old ones; put them back, or use another --output-dir and --study-name"
        )


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

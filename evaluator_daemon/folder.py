"""One look at a trial's folder. Reading only: whoever finds a damaged file of another writer leaves it to that one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel

from evaluator_daemon.sweep import TrialView, WeightFile
from shared.errors import UnreadableFileError
from shared.files import read_model
from shared.layout import EvaluationsLayout, StudyLayout, TrialLayout, checkpoint_epoch
from shared.locks import FileLock
from shared.schemas import TERMINAL_STATES, CheckpointRecord, Metrics, TrialParams, TrialState

Model = TypeVar("Model", bound=BaseModel)

_WEIGHTS = ".safetensors"
_OURS = "realtime_evaluation"  # what evaluators write begins with it


class Reader(Protocol):
    """Reads another writer's document; None when it is missing or damaged."""

    def __call__(self, path: Path, model: type[Model], /) -> Model | None: ...


def read_or_none(path: Path, model: type[Model], /) -> Model | None:
    """Return another writer's document; None when it is missing or damaged."""
    try:
        return read_model(path, model)
    except (FileNotFoundError, UnreadableFileError):
        return None


def look_at(
    trial: TrialLayout,
    records: Iterable[CheckpointRecord],
    plan_hash: str,
    now_s: float,
    *,
    read: Reader = read_or_none,
    optimizer_lives: bool | None = None,
) -> TrialView:
    """Return the trial as it is on disk.

    State and locks are read before the files: what a trainer wrote before it ended is never missed.

    Args:
        now_s: wall-clock time in seconds since 1970, as file times are.
        read: how to read a document; a cache's, to look often.
        optimizer_lives: whether the optimizer's lock is held, where the caller knows; else it is tried.
    Raises:
        FileNotFoundError: somebody moved the folder away.
    """
    state = read(trial.state, TrialState)
    params = read(trial.params, TrialParams)
    trainer_lives = FileLock.is_held(trial.trainer_lock)
    if optimizer_lives is None:
        optimizer_lives = FileLock.is_held(StudyLayout(trial.folder.parent).optimizer_lock)
    entries = list_folder(trial.folder)
    changes = [status.st_mtime for name, status in entries.items() if not name.startswith(_OURS)]
    changes.append(trial.folder.stat().st_mtime)
    epochs = params.max_train_epochs if params is not None else None
    return TrialView(
        name=trial.name,
        state=state.state if state is not None else None,
        owner_lives=trainer_lives or optimizer_lives,
        trainer_lives=trainer_lives,
        idle_s=max(0.0, now_s - max(changes)),
        plan_hash=plan_hash,
        files=tuple(_weight_file(trial, name, entries[name], epochs, now_s) for name in sorted(weights(entries))),
        records=tuple(record for record in records if _is_kept(record, trial, state, read)),
    )


def list_folder(folder: Path | str) -> dict[str, os.stat_result]:
    """Return what lies in a folder, links not followed.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                found[entry.name] = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
    return found


def file_stamp(path: Path | str) -> tuple[int, ...] | None:
    """Return what changes with a file's content: inode, size, modification and change time (ns); None without one."""
    try:
        status = os.stat(path)  # noqa: PTH116  paths cost more than the call, thousands of times
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def weights(names: Iterable[str]) -> list[str]:
    """Return the names that are weight files', as `TrialLayout.list_checkpoints` does."""
    return [name for name in names if name.endswith(_WEIGHTS) and not name.startswith(".tmp") and name != _WEIGHTS]


def has_results(record: CheckpointRecord, evaluations: EvaluationsLayout, read: Reader = read_or_none) -> bool:
    """Whether what a record is about is there: metrics.json of that content and plan, and its pictures."""
    render = evaluations.checkpoint(record.checkpoint)
    metrics = read(render.metrics, Metrics)
    if metrics is None or (metrics.checkpoint_sha256, metrics.plan_hash) != (
        record.checkpoint_sha256,
        record.plan_hash,
    ):
        return False
    return all((render.folder / sample.file).exists() for sample in metrics.samples)


def max_train_epochs(trial: TrialLayout) -> int | None:
    """How many epochs the trial trains, where its params.json says so."""
    params = read_or_none(trial.params, TrialParams)
    return params.max_train_epochs if params is not None else None


def _is_kept(record: CheckpointRecord, trial: TrialLayout, state: TrialState | None, read: Reader) -> bool:
    """A record whose results are lost counts for nothing while the optimizer still waits for them."""
    if record.status != "recorded" or state is None or state.state in TERMINAL_STATES:
        return True
    return has_results(record, trial.evaluations, read)


def _weight_file(trial: TrialLayout, name: str, status: os.stat_result, epochs: int | None, now_s: float) -> WeightFile:
    return WeightFile(
        name=name.removesuffix(_WEIGHTS),
        epoch=checkpoint_epoch(name, None, epochs, trial.output_name),
        is_final=name == trial.final_checkpoint.name,
        size=status.st_size,
        modified_ns=status.st_mtime_ns,
        # a clock that ran ahead may have written the modification time
        age_s=max(0.0, now_s - (status.st_mtime if status.st_mtime <= now_s else status.st_ctime)),
        changed_s=status.st_ctime,
    )

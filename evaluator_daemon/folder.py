"""One look at a trial's folder. Reading only: whoever finds a damaged file of another writer leaves it to that one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from evaluator_daemon.sweep import TrialView, WeightFile
from shared.errors import UnreadableFileError
from shared.files import read_model
from shared.layout import EvaluationsLayout, StudyLayout, TrialLayout, checkpoint_epoch
from shared.locks import FileLock
from shared.schemas import TERMINAL_STATES, CheckpointRecord, Metrics, TrialParams, TrialState

Model = TypeVar("Model", bound=BaseModel)


def look_at(trial: TrialLayout, records: Iterable[CheckpointRecord], plan_hash: str, now_s: float) -> TrialView:
    """Return the trial as it is on disk.

    Args:
        now_s: wall-clock time in seconds since 1970, as file times are.
    Raises:
        FileNotFoundError: somebody moved the folder away.
    """
    state = read_or_none(trial.state, TrialState)
    epochs = max_train_epochs(trial)
    trainer_lives = FileLock.is_held(trial.trainer_lock)
    return TrialView(
        name=trial.name,
        state=state.state if state is not None else None,
        owner_lives=trainer_lives or FileLock.is_held(StudyLayout(trial.folder.parent).optimizer_lock),
        trainer_lives=trainer_lives,
        idle_s=max(0.0, now_s - _last_change_s(trial)),
        plan_hash=plan_hash,
        files=tuple(_weight_files(trial, epochs, now_s)),
        records=tuple(record for record in records if _is_kept(record, trial, state)),
    )


def has_results(record: CheckpointRecord, evaluations: EvaluationsLayout) -> bool:
    """Whether what a record is about is there: metrics.json of that content and plan, and its pictures."""
    render = evaluations.checkpoint(record.checkpoint)
    metrics = read_or_none(render.metrics, Metrics)
    if metrics is None or (metrics.checkpoint_sha256, metrics.plan_hash) != (
        record.checkpoint_sha256,
        record.plan_hash,
    ):
        return False
    return all((render.folder / sample.file).exists() for sample in metrics.samples)


def _is_kept(record: CheckpointRecord, trial: TrialLayout, state: TrialState | None) -> bool:
    """A record whose results are lost counts for nothing while the optimizer still waits for them."""
    if record.status != "recorded" or state is None or state.state in TERMINAL_STATES:
        return True
    return has_results(record, trial.evaluations)


def max_train_epochs(trial: TrialLayout) -> int | None:
    """How many epochs the trial trains, where its params.json says so."""
    params = read_or_none(trial.params, TrialParams)
    return params.max_train_epochs if params is not None else None


def read_or_none(path: Path, model: type[Model]) -> Model | None:
    """Return another writer's document; None when it is missing or damaged."""
    try:
        return read_model(path, model)
    except (FileNotFoundError, UnreadableFileError):
        return None


def _weight_files(trial: TrialLayout, epochs: int | None, now_s: float) -> Iterable[WeightFile]:
    for path in trial.list_checkpoints():
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        yield WeightFile(
            name=path.stem,
            epoch=checkpoint_epoch(path.name, None, epochs, trial.output_name),
            is_final=path == trial.final_checkpoint,
            size=status.st_size,
            modified_ns=status.st_mtime_ns,
            # a clock that ran ahead may have written the modification time
            age_s=max(0.0, now_s - (status.st_mtime if status.st_mtime <= now_s else status.st_ctime)),
            changed_s=status.st_ctime,
        )


def _last_change_s(trial: TrialLayout) -> float:
    """When anybody but the evaluator last wrote into the folder."""
    times = []
    for path in [trial.folder, *trial.folder.iterdir()]:
        if not path.name.startswith("realtime_evaluation"):
            try:
                times.append(path.lstat().st_mtime)
            except FileNotFoundError:
                continue
    return max(times)

"""What trainings leave that nobody needs again: set aside before a redo, removed once nobody goes on from it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from shared.errors import DiskError
from shared.failpoints import reach
from shared.files import sweep_temp_files
from shared.layout import TrialLayout, writer_of
from shared.logs import log_change

_log = logging.getLogger(__name__)


def set_aside(trial: TrialLayout) -> None:
    """Move everything the trainer wrote to attempts/NN/, so that a redo starts on a clean folder; remove its states.

    Raises:
        DiskError: something could not be moved or removed.
    """
    drop_training_state(trial)
    kept = _first_free_attempt(trial)
    try:
        kept.folder.mkdir(parents=True)
        for entry in sorted(trial.folder.iterdir()):
            if entry != trial.trainer_lock and _is_trainers(entry.name, is_folder=entry.is_dir()):
                shutil.move(entry, kept.folder / entry.name)
                reach("optimizer.remains_moved")
    except OSError as error:
        raise DiskError(kept.folder, error) from error
    log_change(_log, "remains set aside", trial=trial.number, folder=kept.folder.relative_to(trial.folder))


def drop_training_state(trial: TrialLayout) -> None:
    """Remove the state from which a training could go on, where nobody will; it may be larger than the weights.

    The trainer does so itself, unless it is killed at that very moment or never comes to its end.

    Raises:
        DiskError: it could not be removed.
    """
    sweep_temp_files(trial.folder)
    _remove(trial.list_training_states())


def drop_set_aside(trial: TrialLayout) -> None:
    """Remove what weighs most of the attempts set aside: states, and the folder another program wrote its own into.

    Raises:
        DiskError: it could not be removed.
    """
    for attempt in trial.list_attempts():
        _remove([*attempt.list_training_states(), *([attempt.output] if attempt.output.exists() else [])])


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise DiskError(folder, error) from error


def _first_free_attempt(trial: TrialLayout) -> TrialLayout:
    number = 1
    while trial.attempt(number).exists():
        number += 1
    return TrialLayout(trial.attempt(number))


def _is_trainers(name: str, *, is_folder: bool) -> bool:
    try:
        return writer_of(PurePosixPath("trial_0001", name, *(["x"] if is_folder else []))) == "trainer"
    except (KeyError, ValueError):  # ValueError: a name such as .tmp-x, of which nothing is left
        return True  # no part of the contract, so the trainer's own affair

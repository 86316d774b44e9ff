"""What ties the manager to its study folder: the lock in it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.errors import DiskError, ResourceError, UserError
from shared.files import sweep_temp_files
from shared.layout import TEMPORARY_MARK, StudyLayout
from shared.locks import FileLock
from shared.logs import log_change
from shared.requests import RequestFolder

_log = logging.getLogger(__name__)


class Home:
    """Holds the manager's lock, in whatever folder stands at the study's path.

    Raises:
        AlreadyRunningError: on entry or return, another manager watches this folder.
    """

    def __init__(self, study: StudyLayout) -> None:
        self._study = study
        self._lock = FileLock(study.manager_lock)
        self._said_gone: str | None = None  # why

    def __enter__(self) -> Self:
        self._move_in()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def is_ours(self) -> bool:
        """Whether the folder at the path is the one whose lock we hold. Its inode cannot be used again meanwhile."""
        if not self._lock.held:
            return False
        try:
            there = os.stat(self._study.manager_lock)  # noqa: PTH116
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(self._lock.fileno()))

    def come_back(self, *, is_needed: bool) -> bool:
        """Move into the folder that stands at the path now; False while there is none, or none to move into.

        Raises:
            ResourceError: there is none, or none to move into, and it is needed now.
        """
        why = "it is not there"
        if self._study.root.is_dir():
            self._lock.release()
            try:
                self._move_in()
            except ResourceError as error:  # it went just now, or is not ours to write in
                if is_needed:
                    raise
                why = str(error)
            else:
                return True
        if is_needed:
            raise ResourceError(f"{self._study.root}: the study folder is gone; put it back and start again")
        if self._said_gone != why:
            self._said_gone = why
            log_change(
                _log, "study folder gone, waiting for it", level=logging.WARNING, folder=self._study.root, why=why
            )
        return False

    def _move_in(self) -> None:
        self._lock.acquire()
        self._said_gone = None
        with _or_untidy(self._study.root):
            RequestFolder(self._study, "evaluator").tidy(datetime.now().astimezone())
        with _or_untidy(self._study.root):
            sweep_temp_files(self._study.root)
            for folder in self._left_behind():
                with _or_untidy(folder):
                    sweep_temp_files(folder)

    def _left_behind(self) -> list[Path]:
        """Folders of evaluations with temporary files; an evaluator sweeps its own only when it has work there."""
        folders = [trial.evaluations.folder for trial in self._study.list_trials()]
        folders += self._study.root.glob("evaluations/*/")
        found = []
        for folder in folders:
            # most of thousands hold none, and listing is all it costs; what cannot be read is said by the sweep
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                if any(TEMPORARY_MARK in entry.name for entry in entries):
                    found.append(folder)
        return found


@contextlib.contextmanager
def _or_untidy(folder: Path) -> Iterator[None]:
    """The work can be done in a folder that cannot be tidied."""
    try:
        yield
    except (UserError, DiskError, OSError) as error:
        log_change(_log, "not tidied", level=logging.WARNING, folder=folder, why=error)

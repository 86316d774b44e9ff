"""What ties the manager to its study folder: the lock in it."""

from __future__ import annotations

import logging
import os
from datetime import datetime
from types import TracebackType
from typing import Self

from shared.errors import ResourceError
from shared.files import sweep_temp_files
from shared.layout import StudyLayout
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
        self._said_gone = False

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
        """Move into the folder that stands at the path now; False while there is none.

        Raises:
            ResourceError: there is none, and it is needed now.
        """
        if not self._study.root.is_dir():
            if is_needed:
                raise ResourceError(f"{self._study.root}: the study folder is gone; put it back and start again")
            if not self._said_gone:
                self._said_gone = True
                log_change(_log, "study folder gone, waiting for it", level=logging.WARNING, folder=self._study.root)
            return False
        self._lock.release()
        self._move_in()
        return True

    def _move_in(self) -> None:
        self._lock.acquire()
        self._said_gone = False
        sweep_temp_files(self._study.root)
        RequestFolder(self._study, "evaluator").tidy(datetime.now().astimezone())

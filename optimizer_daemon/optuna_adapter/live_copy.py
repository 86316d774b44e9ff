"""A study's database on a local disk, and the whole copy of it that its study folder holds.

The copy is replaced after every change and before anything outside tells of the change. So it never lacks what the
study folder's other files say, and the live database is at most one change ahead of it, after a crash in between. A
copy that is ahead of the live database comes from another machine.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import shutil
import sqlite3
from pathlib import Path
from typing import NamedTuple, Self

from shared.errors import DiskError, ResourceError, StudyMismatchError
from shared.failpoints import reach
from shared.files import write_bytes
from shared.logs import log_change

# Places in the header of a SQLite file, see https://www.sqlite.org/fileformat.html
_HEADER_BYTES = 100
_WRITE_VERSION, _READ_VERSION = 18, 19
_USER_VERSION = slice(60, 64)
_ROLLBACK = 1  # how a file is marked that has no log of writes beside it

_BESIDE = ("-wal", "-shm", "-journal")

OWNER = "owner"
"""User attribute of a study: identity of the study folder it belongs to."""

_TRIALS = """SELECT count(*), sum(state NOT IN ('RUNNING', 'WAITING'))
    FROM trials JOIN studies USING (study_id) WHERE study_name = ?"""
_SCORES = """SELECT count(*) FROM trial_intermediate_values JOIN trials USING (trial_id) JOIN studies USING (study_id)
    WHERE study_name = ?"""
_OWNER = """SELECT value_json FROM study_user_attributes JOIN studies USING (study_id)
    WHERE study_name = ? AND key = ?"""

_log = logging.getLogger(__name__)


class LiveCopy:
    """Keeps the copy of a live database.

    Args:
        live: the SQLite file on a local disk.
        copy: its place in the study folder.
    """

    def __init__(self, live: Path, copy: Path) -> None:
        self._live = live
        self._copy = copy
        self._mark = secrets.token_bytes(4)  # in the header of every copy that this process writes
        self._seen_version: int | None = None
        self._watch: sqlite3.Connection | None = None

    @classmethod
    def prepared(cls, live: Path, copy: Path, study_name: str, folder_id: str) -> Self:
        """Find out which of the two is the later state of the study, and have the live database be that.

        Raises:
            StudyMismatchError: the copy belongs to another study folder.
            ResourceError: the disk failed, or the copy is damaged and there is no live database.
        """
        kept = cls(live, copy)
        try:
            live.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            kept._choose(study_name, folder_id)
        except OSError as error:
            raise DiskError(live, error) from error
        except sqlite3.Error as error:
            raise ResourceError(
                f"{live}: {error}; free space or repair the disk, then the same command goes on"
            ) from error
        return kept

    def publish(self) -> None:
        """Replace the copy, if the live database has changed since.

        Raises:
            StudyMismatchError: somebody else has replaced the copy meanwhile.
            ResourceError: the live database cannot be read.
            DiskError: the copy cannot be written.
        """
        try:
            if self._watch is None:
                self._watch = sqlite3.connect(self._live, isolation_level=None)
            (version,) = self._watch.execute("PRAGMA data_version").fetchone()
            if version == self._seen_version:
                return
            content = _whole(self._watch, self._mark)
        except sqlite3.Error as error:
            raise ResourceError(f"{self._live}: {error}; free space or repair the disk") from error
        if self._seen_version is not None and _mark_of(self._copy) != self._mark:
            raise StudyMismatchError(
                f"{self._copy} was replaced by somebody else, perhaps a daemon on another machine; stop that one, then "
                "the same command goes on from the later of the two"
            )
        reach("database.changed")
        write_bytes(self._copy, content)
        self._seen_version = version

    def close(self) -> None:
        """Let go of the live database."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _choose(self, study_name: str, folder_id: str) -> None:
        theirs = _NOTHING
        incoming = self._live.with_name("incoming.db")
        if self._copy.exists():
            _fetch(self._copy, incoming)
            theirs = _look_into(incoming, study_name)
        if theirs.owner not in (None, folder_id):
            raise StudyMismatchError(
                f"{self._copy} belongs to folder {theirs.owner}, not to {folder_id}; put this study's own database "
                "there, or use another --output-dir"
            )
        ours = _look_into(self._live, study_name) if self._live.exists() else _NOTHING
        usable = ours.fault is None and ours.owner in (None, folder_id)
        if theirs.fault is not None and not (usable and ours.has_study):
            raise ResourceError(
                f"{self._copy}: {theirs.fault}, and this machine has no database of the study; put a copy of it back"
            )
        if usable and (theirs.fault is not None or ours.progress >= theirs.progress):
            if self._copy.exists() and (theirs.fault is not None or ours.progress > theirs.progress):
                log_change(_log, "copy of the database is behind", copy=theirs, here=ours)
        else:
            aside = _set_aside(self._live) if self._live.exists() else "nothing"
            log_change(_log, "begun from the copy of the database", copy=theirs, here=ours, set_aside=aside)
            if theirs.has_study:
                incoming.replace(self._live)
        incoming.unlink(missing_ok=True)
        _remove_beside(self._copy)  # what a database that was once written there itself has left


class _Found(NamedTuple):
    """What a database file holds of a study."""

    progress: tuple[int, int, int] = (-1, 0, 0)  # trials, ended ones, scores; a later state of one study is larger
    owner: str | None = None
    fault: str | None = None

    @property
    def has_study(self) -> bool:
        return self.progress >= (0, 0, 0)

    def __str__(self) -> str:
        return self.fault or (f"{self.progress[0]} trials" if self.has_study else "nothing")


_NOTHING = _Found()


def _look_into(file: Path, study_name: str) -> _Found:
    try:
        with contextlib.closing(sqlite3.connect(file)) as connection:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                return _Found(fault=verdict)
            asked = (
                "SELECT count(*) FROM sqlite_master WHERE name IN ('studies', 'trials', 'trial_intermediate_values')"
            )
            if connection.execute(asked).fetchone() != (3,):
                return _NOTHING
            trials, ended = connection.execute(_TRIALS, (study_name,)).fetchone()
            (scores,) = connection.execute(_SCORES, (study_name,)).fetchone()
            owner = connection.execute(_OWNER, (study_name, OWNER)).fetchone()
    except sqlite3.DatabaseError as error:
        return _Found(fault=str(error))
    return _Found((trials, ended or 0, scores), None if owner is None else json.loads(owner[0]))


def _fetch(copy: Path, target: Path) -> None:
    """Copy a database, and fold what stands in its log of writes into it."""
    target.unlink(missing_ok=True)
    _remove_beside(target)
    for suffix in ("", "-wal"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(f"{copy}{suffix}", f"{target}{suffix}")
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(target)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")


def _whole(connection: sqlite3.Connection, mark: bytes) -> bytes:
    """Return a database as one file, consistent whatever others write meanwhile."""
    with contextlib.closing(sqlite3.connect(":memory:")) as memory:
        connection.backup(memory)
        content = bytearray(memory.serialize())
    content[_WRITE_VERSION] = content[_READ_VERSION] = _ROLLBACK
    content[_USER_VERSION] = mark
    return bytes(content)


def _mark_of(copy: Path) -> bytes | None:
    try:
        with copy.open("rb") as file:
            return file.read(_HEADER_BYTES)[_USER_VERSION]
    except FileNotFoundError:
        return None


def _set_aside(file: Path) -> Path:
    """Rename a database, so that nothing of it is lost; return its new name."""
    count = 1
    while (aside := file.with_name(f"{file.name}.set-aside-{count}")).exists():
        count += 1
    for suffix in ("", *_BESIDE):
        with contextlib.suppress(FileNotFoundError):
            Path(f"{file}{suffix}").rename(f"{aside}{suffix}")
    return aside


def _remove_beside(file: Path) -> None:
    for suffix in _BESIDE:
        Path(f"{file}{suffix}").unlink(missing_ok=True)

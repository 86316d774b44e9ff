"""Where a study's database lies: in the study folder, unless SQLite cannot work on the file system there.

SQLite wants shared memory and locks that every reader and writer sees. A network file system or a host's folder in a
virtual machine does not give them, so the database of a study folder there is kept on a local disk, and a whole copy
of it stands in the study folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ResourceError, SettingsError
from shared.layout import StudyLayout
from shared.logs import log_change
from shared.mounts import MOUNT_TABLE, network_type
from shared.schemas import Run

_FALLBACK = Path("/var/tmp")  # where the home is on the network as well; unlike /tmp it outlives a restart

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Database:
    """Where the database of a study is.

    Args:
        url: SQLAlchemy URL of what is written.
        copy: where a whole copy of it is kept for readers and other machines; None where the database itself is there.
    """

    url: str
    copy: Path | None = None

    @classmethod
    def of(cls, run: Run, study: StudyLayout, table: Path = MOUNT_TABLE) -> Database:
        """Return it; no file of it need exist.

        Args:
            run: what the study is.
            study: its folder.
            table: of mounts.
        """
        if run.storage != default_url(study) or network_type(study.root, table) is None:
            return cls(run.storage)
        name = re.sub(r"[^\w.-]", "_", run.study_name)[:100]
        live = _local_folder(table) / f"{name}-{run.folder_id}" / study.database.name
        return cls(f"sqlite:///{live}", study.database)

    @property
    def is_there(self) -> bool:
        """Whether a file of it stands anywhere; a server's database counts as there."""
        files = [file for file in (sqlite_file(self.url), self.copy) if file is not None]
        return not files or any(file.exists() for file in files)

    @property
    def readable_url(self) -> str:
        """The URL for who only reads: the database itself where it is on this machine, else its copy."""
        live = sqlite_file(self.url)
        return self.url if self.copy is None or (live is not None and live.exists()) else f"sqlite:///{self.copy}"

    def announce(self) -> None:
        """Log where it is, when that is not the study folder."""
        live = sqlite_file(self.url)
        if self.copy is None or live is None:
            return
        kind = network_type(self.copy)
        log_change(_log, "database kept outside the study folder", database=live, copy=self.copy, file_system=kind)
        if (kind := network_type(live)) is not None:
            remedy = "set XDG_STATE_HOME to a folder on a local disk"
            said = "no local disk was found for the database"
            log_change(_log, said, level=logging.WARNING, file_system=kind, remedy=remedy)

    def discard(self, study: StudyLayout) -> None:
        """Remove what the first start of a study has made of it; a database that somebody named stays."""
        live = sqlite_file(self.url) if self.copy is not None else None
        for file in (study.database, *([] if live is None else [live])):
            for suffix in ("", "-wal", "-shm", "-journal"):
                Path(f"{file}{suffix}").unlink(missing_ok=True)
        if live is not None:
            with contextlib.suppress(OSError):
                live.parent.rmdir()


def default_url(study: StudyLayout) -> str:
    """Return the URL of the database in a study folder."""
    return f"sqlite:///{study.database.absolute()}"


def require_local(storage: str | None, table: Path = MOUNT_TABLE) -> None:
    """See that a database somebody named is no SQLite file on a network file system.

    Raises:
        SettingsError: it is one.
    """
    file = None if storage is None else sqlite_file(storage)
    kind = None if file is None else network_type(file, table)
    if kind is not None:
        raise SettingsError(
            "--storage",
            storage,
            f"it lies on {kind}, where SQLite loses data; name a file on a local disk or a database server, or leave "
            "--storage out: the database is then kept on a local disk and copied to the study folder",
        )


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite URL; None for other databases and one in memory."""
    named = re.fullmatch(r"sqlite(?:\+\w+)?:///(?:file:)?([^?]+)(?:\?.*)?", url)
    return Path(named[1]).absolute() if named is not None and named[1] != ":memory:" else None


def _local_folder(table: Path) -> Path:
    """Return a folder of this user that a database can be kept in, made when missing.

    Raises:
        ResourceError: there is none.
    """
    state = Path(os.environ.get("XDG_STATE_HOME") or "")
    homes = [
        (state if state.is_absolute() else Path.home() / ".local" / "state") / "lora-tuner",
        _FALLBACK / f"lora-tuner-{os.getuid()}",
    ]
    usable = [home for home in homes if _is_ours(home)]
    for home in usable:
        if network_type(home, table) is None:
            return home
    if not usable:
        raise ResourceError(
            f"no folder to keep the study's database in: neither {homes[0]} nor {homes[1]} can be made or belongs to "
            "you; set XDG_STATE_HOME to a folder of yours on a local disk"
        )
    return usable[0]


def _is_ours(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder.lstat().st_uid == os.getuid() and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False

"""The database of a study: opened so that nothing of a refused one is changed, and every failure says what to do."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from shared.errors import LabError, ResourceError, SettingsError, StudyMismatchError

BUSY_TIMEOUT_S = 60  # another reader of the database may hold it that long


def open_storage(storage_url: str) -> RDBStorage:
    """Open the storage behind a SQLAlchemy URL; SQLite gets a log of writes and a long patience with other readers.

    Raises:
        StudyMismatchError: another version of Optuna made it.
        SettingsError: it cannot be opened.
        ResourceError: the disk is full, or its file system does not offer what SQLite needs.
    """
    try:
        url = make_url(storage_url)
        sqlite = url.get_backend_name() == "sqlite"
        # A server may have been restarted since its connection was last used.
        options: dict[str, Any] = {"connect_args": {"timeout": BUSY_TIMEOUT_S}} if sqlite else {"pool_pre_ping": True}
        if sqlite and url.database:
            file = Path(url.database)
            if _has_tables(file):  # asked before anything of an older database is changed
                RDBStorage(storage_url, engine_kwargs=options, skip_table_creation=True).engine.dispose()
            _use_write_ahead_log(file)
        return RDBStorage(storage_url, engine_kwargs=options)
    except RuntimeError as error:  # Optuna's word for a database of another version
        raise StudyMismatchError(
            f"{storage_url} was made by another version of Optuna ({error}); copy the database, then run `optuna "
            f"storage upgrade --storage {storage_url}`"
        ) from error
    except (ValueError, ImportError, sqlite3.Error, SQLAlchemyError) as error:
        raise not_opened(storage_url, error) from error


def file_of(storage_url: str) -> Path:
    """Return the file of a SQLite URL."""
    file = make_url(storage_url).database
    assert file is not None, f"{storage_url} names no file"
    return Path(file)


def not_opened(storage_url: str, error: Exception) -> LabError:
    """Return what to do about a database that does not open."""
    cause = error
    while not isinstance(cause, sqlite3.Error) and isinstance(inner := _inner(cause), Exception):
        cause = inner
    said = " ".join(str(cause).split())
    name = getattr(cause, "sqlite_errorname", "")
    if name == "SQLITE_FULL" or name.startswith("SQLITE_IOERR"):  # the latter where not even its index fits
        remedy = "free space or repair the disk, then the same command goes on"
        return ResourceError(f"--storage {storage_url}: {said}; {remedy}")
    if name in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
        remedy = "that file is damaged or no SQLite database; put a copy of it back, or name another"
    else:
        remedy = "name a database that opens, such as sqlite:////data/study.db"
    return SettingsError("--storage", storage_url, f"{remedy} ({said})")


def _inner(error: Exception) -> BaseException | None:
    return getattr(error, "orig", None) or error.__cause__


def _has_tables(file: Path) -> bool:
    """Tell whether an Optuna database stands there, without changing a byte of it."""
    if not file.exists() or file.stat().st_size == 0:
        return False
    # Even a reader makes files beside a database with a log of writes; it must not where nothing is left in the log.
    look = "mode=ro" if file.with_name(f"{file.name}-wal").exists() else "immutable=1"
    with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?{look}", uri=True)) as connection:
        asked = "SELECT count(*) FROM sqlite_master WHERE name IN ('studies', 'version_info', 'alembic_version')"
        (found,) = connection.execute(asked).fetchone()
    return int(found) == 3


def _use_write_ahead_log(file: Path) -> None:
    """Let readers such as optuna-dashboard and our writes not wait for each other; the mode stays with the file."""
    with contextlib.closing(sqlite3.connect(file, timeout=BUSY_TIMEOUT_S)) as connection:
        (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
    if mode != "wal":
        raise ResourceError(f"{file}: SQLite offers only the journal mode {mode!r} there; put it on a local disk")

"""Durable files: every write survives a crash whole or not at all, every read refuses what is not exactly as written.

A state file is JSON for people, and its last field is the checksum of all lines before it:

    {
      "schema_version": 1,
      ...
      "checksum": "sha256:<64 hexadecimal digits>"
    }

`head -n -2 FILE | sha256sum` prints the same digits. Any other byte, one more or one less anywhere in the file, is
refused. After an edit by hand `python -m shared.seal FILE` renews the checksum, provided that every field is valid.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from shared.errors import DiskError, ResourceError, SchemaVersionError, UnreadableFileError
from shared.failpoints import reach
from shared.layout import CORRUPT_MARK, TEMPORARY_MARK
from shared.process import ProcessIdentity, boot_id
from shared.schemas.base import SCHEMA_VERSION, checksum_required
from shared.strict_json import first_fault, parse_object

Model = TypeVar("Model", bound=BaseModel)

_TEMPORARY_NAME = re.compile(rf"\..+{re.escape(TEMPORARY_MARK)}([0-9]{{1,9}})-([0-9]+)-[0-9a-f]{{8}}")


class Reading(NamedTuple, Generic[Model]):
    """What `read_or_set_aside` found.

    Args:
        content: the document; None when the file was missing or unreadable.
        set_aside: where the unreadable file is kept now; None when it was not unreadable.
        reason: what was wrong with it; empty when nothing was.
    """

    content: Model | None
    set_aside: Path | None
    reason: str


class Lines(NamedTuple):
    """What an append-only file holds.

    Args:
        records: the whole lines in order.
        torn: the bytes of a last line whose writing was cut short; empty when the file ends as it should.
    """

    records: list[dict[str, Any]]
    torn: bytes


# ---------------------------------------------------------------------------------------------------- whole files


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, durably and all at once; the mode is that of any new file under the umask.

    A failed call leaves nothing behind, and calling again writes everything again from memory: after a failed fsync
    the kernel may have dropped the pages, so a second fsync of the same file would prove nothing.

    Raises:
        DiskError: the old content still stands; or, when only the folder's own fsync failed, the new content stands
            but may not survive a loss of power.
    """
    writer = ProcessIdentity.current()
    temporary = path.with_name(f".{path.name}{TEMPORARY_MARK}{writer.pid}-{writer.start_ticks}-{secrets.token_hex(4)}")
    try:
        _write_new(temporary, content)
        reach("files.written")
        temporary.replace(path)
        reach("files.replaced")
        _sync_folder(path.parent)
    except OSError as error:
        raise DiskError(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # what cannot be removed now is left to sweep_temp_files
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_model(path: Path, model: BaseModel, *, elements: Mapping[str, Sequence[str]] = MappingProxyType({})) -> None:
    """Replace `path` by `model` with its checksum; see `write_bytes`.

    Args:
        elements: by name, lists that are empty in `model`, each element written out by `element_text`: so a long list
            of which one element has changed costs no more than that one.

    Raises:
        ValueError: `model` holds what `read_model` would refuse, as model_copy(update=...) may.
        DiskError: see `write_bytes`.
    """
    content = to_bytes(model)
    try:
        parse_model(content, path, type(model))
    except UnreadableFileError as error:
        raise ValueError(f"refused to write what could not be read again: {error}") from error
    write_bytes(path, to_bytes(model, elements) if elements else content)


def to_bytes(model: BaseModel, elements: Mapping[str, Sequence[str]] = MappingProxyType({})) -> bytes:
    """Return the file `write_model` writes: fields as declared, two spaces of indent, UTF-8, the checksum last."""
    text, separator = _text_of(model), ",\n    "
    for name, texts in elements.items():
        if texts:
            empty = f'\n  "{name}": []'
            assert empty in text, f"{name} is a list of {type(model).__name__} and empty"
            text = text.replace(empty, f"{empty[:-1]}\n    {separator.join(texts)}\n  ]", 1)
    body = (text.removesuffix("\n}") + ",\n").encode()
    return body + _checksum_lines(body)


def element_text(record: BaseModel) -> str:
    """Return a record as it stands in a list of a file.

    Raises:
        ValueError: it holds what could not be read again.
    """
    text = _text_of(record)
    type(record).model_validate_json(json.dumps(parse_object(text.encode())))
    return text.replace("\n", "\n    ")  # within a text a line feed is escaped


def _text_of(model: BaseModel) -> str:
    payload = model.model_dump(mode="json", warnings="error")
    return json.dumps(payload, ensure_ascii=False, indent=2, allow_nan=False)


def sweep_temp_files(directory: Path) -> list[Path]:
    """Remove the temporary files that writers left in `directory` when they were killed; return them.

    Files of living writers and of anybody else stay. A missing directory has none.

    Raises:
        DiskError: one could not be removed.
    """
    removed = []
    for path in sorted(directory.glob(".*")):
        named = _TEMPORARY_NAME.fullmatch(path.name)
        if named and not ProcessIdentity(int(named[1]), int(named[2]), boot_id()).is_alive:
            _remove(path)
            removed.append(path)
    return removed


# ------------------------------------------------------------------------------------------------- strict reading


def read_model(path: Path, model: type[Model], *, edited: bool = False) -> Model:
    """Return the document in `path`.

    Args:
        path: a JSON file.
        model: what it must hold.
        edited: take it without a checksum or with a wrong one; for files by people and for `python -m shared.seal`.

    Raises:
        FileNotFoundError: there is no such file; what that means is the caller's to know.
        UnreadableFileError: it is damaged, incomplete or breaks the schema; the message names field and value.
        SchemaVersionError: it is whole but of another schema version.
        ResourceError: the disk or the permissions do not let it be read.
    """
    return parse_model(_read_bytes(path), path, model, edited=edited)


def read_kept(path: Path, model: type[Model]) -> Model:
    """Return a document of which there is no second source, such as run.json; see `read_model`.

    Raises:
        UnreadableFileError: as `read_model`, with what to do where the file cannot be made again.
    """
    try:
        return read_model(path, model)
    except SchemaVersionError:
        raise
    except UnreadableFileError as error:
        remedy = "it is never written anew, so else put a copy of it back"
        raise UnreadableFileError(path, f"{error.reason}; {remedy}") from error


def parse_model(content: bytes, path: Path, model: type[Model], *, edited: bool = False) -> Model:
    """Return the document in `content`, read from `path`; see `read_model`."""
    payload = _strict_json(content, path)
    if not edited and ("checksum" in payload or checksum_required(model)):
        check_checksum(content, path, present="checksum" in payload)
    payload.pop("checksum", None)
    _check_version(payload, path)
    try:
        # As JSON again: strict models take text for a time and a list for a tuple only there.
        return model.model_validate_json(json.dumps(payload))
    except ValidationError as error:
        raise UnreadableFileError(path, first_fault(error, payload)) from error


def set_aside(path: Path, now: datetime) -> Path:
    """Rename an unreadable file to <name>.corrupt-<time>, never over an earlier one; return the new path.

    Only the file's writer may do this.

    Raises:
        DiskError: it could not be renamed.
    """
    kept = path.with_name(f"{path.name}{CORRUPT_MARK}{now.strftime('%Y%m%dT%H%M%S%z')}")
    candidate, count = kept, 1
    try:
        while os.path.lexists(candidate):
            count += 1
            candidate = kept.with_name(f"{kept.name}-{count}")
        path.rename(candidate)
        _sync_folder(path.parent)
    except OSError as error:
        raise DiskError(path, error) from error
    return candidate


def read_or_set_aside(path: Path, model: type[Model], now: datetime) -> Reading[Model]:
    """Return the document in `path`, or set an unreadable file aside so that its writer can rebuild it.

    Raises:
        SchemaVersionError: the file is whole but of another schema version; it stays where it is.
        ResourceError, DiskError: see `read_model` and `set_aside`.
    """
    try:
        return Reading(read_model(path, model), None, "")
    except FileNotFoundError:
        return Reading(None, None, "")
    except SchemaVersionError:
        raise
    except UnreadableFileError as error:
        return Reading(None, set_aside(path, now), error.reason)


# ------------------------------------------------------------------------------------------------- appended lines


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append `record` as one line of JSON, durably; a file has one writer.

    A last line without its line feed was never acknowledged: it is cut off first, so that it cannot merge with this.

    Raises:
        DiskError: nothing was appended.
    """
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            length = _length_of_whole_lines(descriptor)
            os.ftruncate(descriptor, length)
            _append_or_restore(descriptor, line, length)
        finally:
            os.close(descriptor)
        if length == 0:
            _sync_folder(path.parent)
    except OSError as error:
        raise DiskError(path, error) from error


def read_lines(path: Path) -> Lines:
    """Return the records of an append-only file; a missing file has none.

    Raises:
        UnreadableFileError: a whole line is no JSON object.
        ResourceError: the disk or the permissions do not let it be read.
    """
    try:
        *whole, torn = _read_bytes(path).split(b"\n")
    except FileNotFoundError:
        return Lines([], b"")
    return Lines([_strict_json(line, path, f"line {number}: ") for number, line in enumerate(whole, 1)], torn)


# --------------------------------------------------------------------------------------------------------- helpers


def _write_new(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the kernel applies the umask
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(path, error) from error


def _append_or_restore(descriptor: int, line: bytes, length: int) -> None:
    try:
        _write_once(descriptor, line)
        os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):  # the next append would cut the rest off as well
            os.ftruncate(descriptor, length)
        raise


def _write_once(descriptor: int, line: bytes) -> None:
    if os.write(descriptor, line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _length_of_whole_lines(descriptor: int) -> int:
    """Return the number of bytes up to the last line feed."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 65536)
        if (line_feed := os.pread(descriptor, end - start, start).rfind(b"\n")) >= 0:
            return start + line_feed + 1
        end = start
    return 0


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # 9p and some network mounts cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ResourceError(
            f"{path}: could not be read ({error.strerror or error}); check its permissions and the disk"
        ) from error


def _checksum_lines(body: bytes) -> bytes:
    return f'  "checksum": "sha256:{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def check_checksum(content: bytes, path: Path, *, present: bool = True) -> None:
    """See that a file is as it was written.

    Args:
        present: it has a checksum, right or wrong.

    Raises:
        UnreadableFileError: it is not.
    """
    body = content[: -len(_checksum_lines(b""))]
    if content != body + _checksum_lines(body):
        fault = "its checksum does not fit its content" if present else "it has no checksum"
        raise UnreadableFileError(
            path,
            f"{fault}: damaged or edited by hand; if the edit is yours, accept it with `python -m shared.seal {path}`",
        )


def _check_version(payload: dict[str, Any], path: Path) -> None:
    version = payload.get("schema_version", SCHEMA_VERSION)
    if type(version) is not int:  # bool is an int, and True == 1
        raise UnreadableFileError(path, f"schema_version: {version!r} will not do; it is the number {SCHEMA_VERSION}")
    if version > SCHEMA_VERSION:
        raise SchemaVersionError(
            path, f"written by a newer program: schema_version {version}, this one reads {SCHEMA_VERSION}; upgrade it"
        )
    if version < SCHEMA_VERSION:
        raise SchemaVersionError(
            path,
            f"written by an older program: schema_version {version}, this one reads {SCHEMA_VERSION}; "
            "open the folder with the program that wrote it",
        )


def _strict_json(content: bytes, path: Path, where: str = "") -> dict[str, Any]:
    try:
        return parse_object(content)
    except ValueError as error:
        raise UnreadableFileError(path, f"{where}{error}") from error

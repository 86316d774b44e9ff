"""Reading the two TOML files of a training, with errors that name file, table, key, value and remedy."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.errors import UserError


def read_toml(path: Path) -> dict[str, Any]:
    """Return the document.

    Raises:
        UserError: missing, unreadable, not UTF-8, or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror}); correct the path or its permissions") from error


def line_of_key(path: Path, key: str) -> int | None:
    """Return the number of the first line that sets `key`; None when none does."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.partition("=")[0].strip() == key:
            return number
    return None


def closest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for a misspelt name, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {found[0]!r}?" if found else ""


def unknown_key(path: Path, where: str, key: str, known: Iterable[str]) -> UserError:
    """Return the error for a key nobody reads; `where` is its table, "" for the top."""
    place = f"{where}.{key}" if where else key
    return UserError(
        f"{path}{_at_line(path, key)}: {place}: there is no such key{closest(key, known) or '; take it out'}"
    )


def _at_line(path: Path, key: str) -> str:
    """Return " line N" of the first line that sets `key` or opens the table of that name, or nothing."""
    pattern = re.compile(rf"\s*(\[\[?\s*)?[\"']?{re.escape(key)}[\"']?\s*[=.\]]")
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return next((f" line {number}" for number, line in enumerate(lines, 1) if pattern.match(line)), "")

"""Follows training.log while somebody else writes it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

_FIRST_LOOK_BYTES = 65536  # of a log that an earlier daemon has already followed


class TrainingLog:
    """The lines of a log as they come; a progress bar's carriage returns end a line too.

    Args:
        path: the log; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset: int | None = None
        self._rest = b""

    def skip_to_end(self) -> None:
        """Begin behind what is there now."""
        with contextlib.suppress(FileNotFoundError):
            self._offset = self._path.stat().st_size
        self._offset = self._offset or 0

    def new_lines(self) -> list[str]:
        """Return the whole lines since the last call."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                if self._offset is None:
                    self._offset = max(0, size - _FIRST_LOOK_BYTES)
                if size < self._offset:  # another file under that name
                    self._offset, self._rest = 0, b""
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(content)
        *whole, self._rest = re.split(rb"[\r\n]", self._rest + content)
        return [line.decode(errors="replace") for line in whole if line.strip()]


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last `count` lines that say something; of a bar that redraws itself only what it showed last."""
    with contextlib.suppress(FileNotFoundError):
        lines = [
            line.rpartition("\r")[2] for line in path.read_text(errors="replace").replace("\r\n", "\n").split("\n")
        ]
        return [line for line in lines if line.strip()][-count:]
    return []

"""Follows training.log while somebody else writes it, however much that is."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_FIRST_LOOK_BYTES = 65536  # of a log that an earlier daemon has already followed
_BLOCK_BYTES = 65536
MOST_BYTES = 8 << 20  # read at one look; of a flood only the end is read
LONGEST_LINE_BYTES = 65536  # of a longer one only the end is kept
LAST_LINES_BYTES = 262144
SHOWN_CHARACTERS = 300  # of a quoted line

# Colours and cursor movements, the zeros of a hole, and whatever else would disturb a terminal.
_UNPRINTABLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class TrainingLog:
    """The lines of a log as they come; a progress bar's carriage returns end a line too.

    Args:
        path: the log; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset: int | None = None
        self._begin = 0
        self._rest = b""

    def skip_to_end(self) -> None:
        """Begin behind what an earlier start of the training has said."""
        with contextlib.suppress(FileNotFoundError):
            self._begin = self._path.stat().st_size
        self._offset = self._begin

    def new_lines(self) -> Iterator[str]:
        """Yield the whole lines since the last call; at most about MOST_BYTES, the latest."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            size = file.seek(0, os.SEEK_END)
            if self._offset is None:
                self._offset = max(0, size - _FIRST_LOOK_BYTES)
            if size < self._offset:  # another file under that name
                self._offset, self._rest = 0, b""
            if size - self._offset > MOST_BYTES:
                self._offset, self._rest = size - MOST_BYTES, b""
            file.seek(self._offset)
            while self._offset < size and (block := file.read(min(_BLOCK_BYTES, size - self._offset))):
                self._offset += len(block)
                *whole, rest = re.split(rb"[\r\n]", self._rest + block)
                self._rest = rest[-LONGEST_LINE_BYTES:]
                yield from (line.decode(errors="replace") for line in whole if line.strip())

    @property
    def unfinished(self) -> str:
        """What stands behind the last line, as the latest state of a bar does until it is redrawn."""
        return self._rest.decode(errors="replace")

    def last_lines(self, count: int) -> list[str]:
        """Return the last `count` lines that say something, fit to be shown; of a redrawn bar its last state."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                begin = self._begin if self._begin <= size else 0  # another file under that name
                file.seek(max(begin, size - LAST_LINES_BYTES))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return []
        redrawn = text.replace("\r\n", "\n").split("\n")
        shown = (_UNPRINTABLE.sub("", line.rstrip("\r").rpartition("\r")[2]).strip() for line in redrawn)
        return [_shortened(line) for line in [line for line in shown if line][-count:]]


def _shortened(line: str) -> str:
    if len(line) <= SHOWN_CHARACTERS:
        return line
    half = SHOWN_CHARACTERS // 2
    return f"{line[:half]} ... {line[-half:]}"

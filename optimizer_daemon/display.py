"""The live line of a terminal; where stdout is none, the log's lines have to do."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TextIO


class LiveLine:
    """One line that is drawn over again; the log's lines scroll by above it.

    Args:
        stream: where to draw; nothing is drawn unless it is a terminal.
    """

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self._on = stream.isatty()
        self._drawn = False

    def clear(self) -> None:
        """Take the line away, so that others can be printed."""
        if self._drawn:
            self._write("\r\x1b[K")
            self._drawn = False

    def draw(self, parts: Sequence[str]) -> None:
        """Draw the line, cut to the terminal's width."""
        if self._on and parts:
            with contextlib.suppress(OSError):  # the terminal was closed
                width = os.get_terminal_size(self._stream.fileno()).columns
                self._drawn = True
                self._write("\r\x1b[K" + "  ".join(parts)[: width - 1])

    def say(self, text: str) -> None:
        """Print lines that stay."""
        self.clear()
        self._write(f"{text}\n")

    def _write(self, text: str) -> None:
        """Write; where the terminal was closed, or nobody reads any longer, there is nobody left to tell."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._on = self._drawn = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # else the interpreter's last flush fails

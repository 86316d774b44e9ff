"""Real pseudo-terminals for commands that draw."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

PATIENCE_S = 120.0  # of a machine with much else to do


class Terminal:
    """A command as the leader of its own session on its own terminal; stderr goes to a file.

    Args:
        command: program and arguments.
        environment: all of its variables.
        stderr: where it complains.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        stderr: Path,
        *,
        columns: int = 120,
        lines: int = 40,
    ) -> None:
        self._leader, self._follower = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self._follower)
        self.shown = ""
        self._stderr = stderr
        with stderr.open("wb") as complaints:
            self.process = subprocess.Popen(
                command, stdin=self._follower, stdout=self._follower, stderr=complaints, env=dict(environment),
                start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )  # fmt: skip

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        os.write(self._leader, keys)

    def wait_for(self, text: str) -> str:
        """Return everything shown up to and with `text` since the last call."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} is not shown but {self.shown!r}; {self.said}"
            self._read(0.1)
        begin, found, self.shown = self.shown.partition(text)
        return begin + found

    def wait(self) -> int:
        """Return the exit status; what is shown meanwhile is kept in `shown`."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.said
            self._read(0.05)
        while self._read(0.05):
            pass
        return self.process.returncode

    @property
    def after(self) -> list:
        """The terminal's attributes now."""
        return termios.tcgetattr(self._follower)

    @property
    def said(self) -> str:
        return self._stderr.read_text(errors="replace")

    def hang_up(self) -> None:
        """Close the window."""
        for descriptor in (self._leader, self._follower):
            os.close(descriptor)
        self._leader = -1

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._leader], [], [], timeout_s)[0]:
            return False
        self.shown += os.read(self._leader, 65536).decode(errors="replace")
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._leader >= 0:
            self.hang_up()

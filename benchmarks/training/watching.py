"""A training seen from outside: its progress bar with the time of each step, its CPU time, its memory; and a pause."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

PATIENCE_S = 900.0
_LOOK_EVERY_S = 0.005
_BAR = re.compile(rb"[Ss]teps:[^\r\n]*?(\d+)/\d+ \[([^\]\r\n]*)\]")
_LOSS = re.compile(rb"loss=([\d.]+(?:e[-+]?\d+)?)")
_CLOCK_TICK = os.sysconf("SC_CLK_TCK")


class HasPid(Protocol):
    """A process."""

    @property
    def pid(self) -> int: ...


class Training:
    """One training under way; time counts from its making.

    Args:
        log: what it says.
    """

    process: HasPid
    end: Callable[[], Any]

    def __init__(self, log: Path) -> None:
        self.log = log
        self.step = 0
        self.losses: dict[int, float] = {}
        self.begin = time.monotonic()
        self._read = 0
        self._tail = b""

    def wait_for_step(self, step: int) -> None:
        """Wait until the bar says so many steps.

        Raises:
            RuntimeError: it ended, or said nothing for long; its last lines are told.
        """
        deadline = time.monotonic() + PATIENCE_S
        while self.step < step:
            self._look()
            if time.monotonic() > deadline or not self._lives():
                raise RuntimeError(f"no step {step}: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(_LOOK_EVERY_S)

    def pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    @property
    def cpu_s(self) -> float:
        """Seconds of all its threads so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _CLOCK_TICK

    @property
    def peak_bytes(self) -> int:
        """The most host memory it had, what it shares with others included."""
        (line,) = (x for x in Path(f"/proc/{self.process.pid}/status").read_text().splitlines() if "VmHWM" in x)
        return int(line.split()[1]) * 1024

    def _look(self) -> None:
        if not self.log.exists():
            return
        with self.log.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        self._tail = (self._tail + new)[-4000:]
        for bar in _BAR.finditer(self._tail):
            self.step = max(self.step, int(bar[1]))
            if loss := _LOSS.search(bar[2]):
                self.losses[int(bar[1])] = float(loss[1])

    def _lives(self) -> bool:
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except (OSError, IndexError):
            return False

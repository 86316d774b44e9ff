"""The daemon's side of `python -m shared.preload`: start it once, have it fork a training's supervisor in a moment."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.logs import log_change
from shared.preload import MOST_BYTES, READY
from shared.process import child_environment, spawn

PATIENCE_S = 300.0  # on a busy machine with a cold disk
_FORK_PATIENCE_S = 10.0  # milliseconds, but for a machine out of memory

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preload:
    """What trainings of one kind have in common, to be done once for all of them.

    Args:
        modules: what they import.
        env: variables that libraries read when they are imported, on top of the daemon's own.
        cwd: where the trainings run.
        call: a function "module:name" and its argument, called when all is imported. Neither it nor an import may leave
            a thread or touch a GPU.
    """

    modules: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path
    call: tuple[str, str] | None = None


class Preloaded:
    """A server that forks trainings; where it fails they are started without it. Main thread only.

    Args:
        preload: what it imports.
        clock: monotonic time in seconds.
    """

    def __init__(self, preload: Preload, clock: Callable[[], float] = time.monotonic) -> None:
        self._preload = preload
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._ready = self._given_up = False
        self._begin = 0.0

    def settled(self) -> bool:
        """Start it when it does not run; return False while it prepares, as any training now would have to."""
        if self._given_up or (self._ready and self._lives):
            return True
        if self._ready:
            log_change(_log, "the preloaded trainer process has ended; another is started", level=logging.WARNING)
            self.close()
        if self._process is None:
            self._start()
        said = self._receive(0.0)
        if said == READY:
            self._ready = True
            log_change(_log, "trainer preloaded", took=f"{self._clock() - self._begin:.1f}s")
            return True
        if said is None and self._lives and self._clock() - self._begin < PATIENCE_S:
            return False
        reason = said.decode(errors="replace") if said else "it ended" if said == b"" else "it takes too long"
        log_change(_log, "trainer not preloaded; each training loads for itself", level=logging.WARNING, reason=reason)
        self.close()
        self._given_up = True
        return True

    def fork(self, words: Sequence[str], argv: Sequence[str], descriptors: Sequence[int]) -> int | None:
        """Have a supervisor forked and return its pid; None when there is no server, or none that answers.

        That one is ended. It may have forked all the same: then the supervisor holds the trainer's lock.

        Args:
            words: the supervisor's options, but for --lock-fd and --env-fd.
            argv: its command, `python -m MODULE ...`.
            descriptors: of the log, the lock, the environment, then what the whole tree is to inherit.
        """
        message = json.dumps([*words, "--", *argv]).encode()
        if not self._ready or self._socket is None or tuple(argv[:2]) != (sys.executable, "-m"):
            return None
        answer = None
        if len(message) <= MOST_BYTES:
            try:
                socket.send_fds(self._socket, [message], descriptors)
                answer = self._receive(_FORK_PATIENCE_S)
            except OSError:
                answer = None
        if not answer:
            why = "the preloaded trainer process does not answer; the training is started without it"
            log_change(_log, why, level=logging.WARNING)
            self.close()
            return None
        return int(answer)

    def close(self) -> None:
        """End the server; what it has forked lives on."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._socket = None
        self._ready = False

    @property
    def _lives(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        variables = child_environment() | dict(self._preload.env)
        # `shared` must be importable even when we run from a source tree
        places = (str(Path(__file__).parents[1]), variables.get("PYTHONPATH", ""))
        options = ["--socket-fd", str(theirs.fileno()), "--parent", str(os.getpid())]
        if self._preload.call is not None:
            options += ["--call", *self._preload.call]
        with theirs:
            self._process = spawn(
                [sys.executable, "-m", "shared.preload", *options, "--import", *self._preload.modules],
                cwd=self._preload.cwd,
                env=variables | {"PYTHONPATH": os.pathsep.join(filter(None, places))},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        self._begin = self._clock()

    def _receive(self, timeout_s: float) -> bytes | None:
        """Return what the server says, empty at its end; None when it says nothing in time."""
        assert self._socket is not None, "only a started server is asked"
        self._socket.settimeout(timeout_s)
        try:
            return self._socket.recv(MOST_BYTES)
        except (BlockingIOError, TimeoutError):
            return None
        except ConnectionError:
            return b""

"""A small parent for every trainer: keeps the trainer's lock, outlives the daemon, records how the training ended.

    python -m shared.supervise --directory trial_0005 -- accelerate launch train.py

The command and all it starts inherit the lock on two descriptors: an ordinary one, which forked workers keep, and
stdin, which survives a child that closes all others. So the lock is held if and only if something of the trainer
lives, even after `kill -9` of this process; shared.supervised tells how such a tree is found and stopped.

While it lives this process is the parent of every orphan of the tree. When the command itself has ended, what it left
behind gets `--leftover-timeout` seconds, then SIGTERM, and as long again before SIGKILL. SIGTERM and SIGINT are passed
on to the whole tree (SIGHUP as SIGTERM); what is left after `--stop-timeout` seconds is killed. When nothing is left
the exit file is written, and only then is the lock given up: a free lock without an exit file means that this process
was killed. A log that outgrows the disk's share of it loses its middle, see shared.bounded_log.

Exit status: the command's own, 128 + n when signal n ended it, 127 when it was not found, 126 when it could not start.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from shared.bounded_log import bound
from shared.errors import DiskError, LabError, UserError
from shared.gpu_lease import gpus_of_evaluators
from shared.layout import TrialLayout
from shared.locks import FileLock
from shared.process import (
    ProcessIdentity,
    adopt_orphans,
    child_environment,
    descendants,
    die_with_parent,
    send_signal,
)

STOP_TIMEOUT_S = 60.0
LEFTOVER_TIMEOUT_S = 10.0

_KILL_AGAIN_S = 0.2  # a process may fork between our look and our signal
_RECORD_PATIENCE_S = 30.0  # a full disk may have ended the training, and its clean-up may free some of it
_NOT_FOUND, _CANNOT_START = 127, 126  # as shells have it
_LOOK_EVERY_S = 0.5  # at the log's size and at who uses the GPUs
_LAST_SECONDS = 10.0  # a training that ran out of memory may take that long to end
# Ours are ignored or handled by Python; the command starts with the system's defaults.
_RESTORED = (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ)


Spawn = Callable[[Sequence[str], Mapping[str, str], int, int], int]
"""(argv, environment, descriptor of the lock, of the log) -> pid of the command, which leads a group of its own."""


class _CommandNotFoundError(FileNotFoundError):
    pass


class _Command:
    """The command, from its start to the end of everything it started.

    Args:
        stop_timeout_s: how long the tree may take to end after a signal to stop.
        leftover_timeout_s: how long processes may outlive the command before they are told to end.
        spawn: how it is started.
    """

    def __init__(self, argv: Sequence[str], stop_timeout_s: float, leftover_timeout_s: float, spawn: Spawn) -> None:
        self.argv = argv
        self._spawn = spawn
        self.pid = os.getpid()  # until the command has its own
        self.identity: ProcessIdentity | None = None
        self.wait_status: int | None = None  # as waitpid(2) gives it
        self.started = self.ended = datetime.now().astimezone()
        self.seconds = 0.0
        self._begin = time.monotonic()
        self._oom_kills = _oom_kills()
        self._seen_on: dict[str, float] = {}  # GPU -> when an evaluator last held it
        self._stop_timeout_s = stop_timeout_s
        self._leftover_timeout_s = leftover_timeout_s
        self._steps: list[tuple[float, signal.Signals]] = []  # (when, by the monotonic clock; what whoever lives gets)

    def start(self, *, cwd: Path, log: Path, env: Mapping[str, str], lock_fd: int) -> None:
        """Start it; one that cannot be started ends at once, with a line in the log."""
        try:
            os.chdir(cwd)
            with log.open("ab") as output:
                self.pid = self._spawn(self.argv, env, lock_fd, output.fileno())
            self.identity = ProcessIdentity.of(self.pid)
        except OSError as error:
            self._note_end((_NOT_FOUND if isinstance(error, _CommandNotFoundError) else _CANNOT_START) << 8)
            where = f" ({error.filename})" if error.filename else ""
            _say(log, f"{self.argv[0]!r} cannot be started: {error.strerror}{where}")

    def watch(self, signals: set[signal.Signals], log: Path) -> None:
        """Wait until nothing of the tree is left, pass `signals` on and take the steps that are due."""
        while self._collect():
            now = time.monotonic()
            self._bound(log)
            if self.wait_status is None:
                self._note_evaluators()
            if self._steps and self._steps[0][0] <= now:
                _, number = self._steps.pop(0)
                send_signal(descendants(), number)
                if number == signal.SIGKILL:
                    self._steps = [(now + _KILL_AGAIN_S, number)]
                continue
            wait_s = min(_LOOK_EVERY_S, self._steps[0][0] - now) if self._steps else _LOOK_EVERY_S
            received = signal.sigtimedwait(signals, wait_s)
            if received and received.si_signo != signal.SIGCHLD:
                send_signal(descendants(), signal.SIGINT if received.si_signo == signal.SIGINT else signal.SIGTERM)
                self._steps = self._steps[-1:] if self._steps else [(now + self._stop_timeout_s, signal.SIGKILL)]
        self._bound(log)  # for what was said since the last look

    def record(self) -> dict[str, Any]:
        """Return what is known of the end, by the names of the exit file's fields."""
        assert self.wait_status is not None, "nothing is left, so the command has ended"
        code = os.waitstatus_to_exitcode(self.wait_status)
        before, after = self._oom_kills, _oom_kills()
        return {
            "command": tuple(_text(word) for word in self.argv),
            "pid": self.pid,
            "exit_status": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "started": self.started,
            "ended": self.ended,
            "seconds": self.seconds,
            "start_ticks": self.identity and self.identity.start_ticks,
            "boot_id": self.identity and self.identity.boot_id,
            "peak_memory": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,  # Linux counts in KiB
            "oom_kills": None if before is None or after is None else after - before,
            "evaluators_on": tuple(
                sorted(gpu for gpu, at in self._seen_on.items() if at >= self._begin + self.seconds - _LAST_SECONDS)
            ),
        }

    def _bound(self, log: Path) -> None:
        with contextlib.suppress(OSError):  # a sick disk shows in the training itself
            bound(log)

    def _note_evaluators(self) -> None:
        with contextlib.suppress(LabError, OSError):  # a lock that cannot be looked at tells nothing
            self._seen_on |= dict.fromkeys(gpus_of_evaluators(), time.monotonic())

    def _collect(self) -> bool:
        """Wait for every process that has ended; False when none is left."""
        while True:
            try:
                pid, wait_status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.pid and self.wait_status is None:  # its number may come again in the same tree
                self._note_end(wait_status)
                if not self._steps:
                    told, killed = (time.monotonic() + times * self._leftover_timeout_s for times in (1, 2))
                    self._steps = [(told, signal.SIGTERM), (killed, signal.SIGKILL)]

    def _note_end(self, wait_status: int) -> None:
        self._note_evaluators()
        self.wait_status = wait_status
        self.ended = datetime.now().astimezone()
        self.seconds = time.monotonic() - self._begin


def spawn_program(argv: Sequence[str], env: Mapping[str, str], lock_fd: int, log_fd: int) -> int:
    """Start the command in a process group of its own: what it sends to its group does not reach us.

    Raises:
        OSError: it cannot be started.
    """
    program = argv[0] if os.sep in argv[0] else shutil.which(argv[0], path=env.get("PATH"))
    if program is None or not Path(program).exists():
        raise _CommandNotFoundError(errno.ENOENT, "command not found")
    redirections = [(lock_fd, 0), (log_fd, 1), (log_fd, 2)]
    try:
        return os.posix_spawn(
            program,
            list(argv),
            env,
            file_actions=[(os.POSIX_SPAWN_DUP2, source, target) for source, target in redirections],
            setpgroup=0,
            setsigmask=(),
            setsigdef=_RESTORED,
        )
    except ValueError as error:  # a variable's name with "=", or a zero byte
        raise OSError(errno.EINVAL, str(error)) from error


def main(arguments: Sequence[str], spawn: Spawn = spawn_program) -> int:
    """Supervise one command; return the exit status of this process."""
    options = _parse(arguments)
    try:
        return _supervise(options, spawn)
    except LabError as error:
        print(f"supervise: {error}", file=sys.stderr)
        return error.exit_code


def forget(exit_file: Path) -> None:
    """Remove an earlier run's exit file for good: it must not pass for this run's, should this one leave none.

    Raises:
        DiskError: it is still there.
    """
    try:
        exit_file.unlink(missing_ok=True)
        folder = os.open(exit_file.parent, os.O_RDONLY)
    except OSError as error:
        raise DiskError(exit_file, error) from error
    try:
        with contextlib.suppress(OSError):  # 9p and some network mounts cannot sync a folder
            os.fsync(folder)
    finally:
        os.close(folder)


def _supervise(options: argparse.Namespace, spawn: Spawn) -> int:
    _lead_a_session()
    adopt_orphans()
    signals = _block_signals()
    if options.die_with_parent is not None and not die_with_parent(options.die_with_parent):
        raise UserError("the parent ended before the command was started")
    if options.lock_fd is None:
        lock = FileLock(options.lock, inheritable=True).acquire()
    else:
        lock = FileLock.from_fd(options.lock, options.lock_fd)
    forget(options.exit_file)
    command = _Command(options.command, options.stop_timeout, options.leftover_timeout, spawn)
    command.start(cwd=options.cwd, log=options.log, env=_environment(options.env_fd), lock_fd=lock.fileno())
    # Heavy, so it comes now: the command does not wait for it, and no upgrade during the training can mix versions.
    from shared.files import write_model
    from shared.schemas.trainer import TrainerExit

    command.watch(signals, options.log)
    record = TrainerExit(**command.record())
    _persist(lambda: write_model(options.exit_file, record))
    return record.exit_status if record.exit_status is not None else 128 + (record.signal or 0)


def _persist(write: Callable[[], None]) -> None:
    """Write, again and again while the disk refuses."""
    deadline = time.monotonic() + _RECORD_PATIENCE_S
    while True:
        try:
            return write()
        except DiskError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(1.0)


def _oom_kills() -> int | None:
    """How many processes the kernel has killed for want of memory since boot; None where it does not count them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None


def _lead_a_session() -> None:
    try:
        os.setsid()
    except PermissionError as error:
        if os.getsid(0) != os.getpid():
            # A shell's job: whoever stops the trainer by its session would stop the shell.
            raise UserError(
                "needs a session of its own; start it as: setsid --wait python -m shared.supervise"
            ) from error


def _block_signals() -> set[signal.Signals]:
    """Block the signals we wait for, so that none is lost or cuts the bookkeeping short; return them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored it would hide how the command ends
    signals = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signals.add(signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    return signals


def _environment(fd: int | None) -> dict[str, str]:
    if fd is None:
        return child_environment()
    with os.fdopen(fd, encoding="ascii") as file:
        variables: dict[str, str] = json.load(file)
    return variables


def _text(word: str) -> str:
    """Make a command's word presentable: JSON takes no bytes beyond UTF-8, and the record no empty words."""
    return word.encode(errors="backslashreplace").decode() or "''"


def _say(log: Path, line: str) -> None:
    try:
        with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"supervise: {line}\n")
    except OSError:
        print(f"supervise: {line}", file=sys.stderr)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m shared.supervise",
        usage="%(prog)s [options] -- COMMAND [WORD ...]",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("--directory", type=Path, required=True, help="folder that the other paths start from")
    parser.add_argument("--lock", type=Path, help="the trainer's lock (default: trainer.lock)")
    parser.add_argument("--lock-fd", type=int, help="descriptor on which the parent already holds the lock")
    parser.add_argument("--exit-file", type=Path, help="how the command ended (default: trainer_exit.json)")
    parser.add_argument("--log", type=Path, help="gets the command's output, appended (default: training.log)")
    parser.add_argument("--cwd", type=Path, help="where the command runs (default: the folder)")
    parser.add_argument("--env-fd", type=int, help="descriptor with the command's environment, as a JSON object")
    parser.add_argument(
        "--die-with-parent",
        type=int,
        nargs="?",
        const=os.getppid(),
        metavar="PID",
        help="stop when the parent ends; its PID also tells when that was before we looked",
    )
    parser.add_argument("--stop-timeout", type=float, default=STOP_TIMEOUT_S, metavar="SECONDS")
    parser.add_argument("--leftover-timeout", type=float, default=LEFTOVER_TIMEOUT_S, metavar="SECONDS")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    options.command = list(arguments[split + 1 :])
    if not options.command:
        parser.error("no command; write it after --")
    trial = TrialLayout(options.directory.absolute())
    options.lock = trial.folder / (options.lock or trial.trainer_lock)
    options.exit_file = trial.folder / (options.exit_file or trial.trainer_exit)
    options.log = trial.folder / (options.log or trial.training_log)
    options.cwd = trial.folder / (options.cwd or "")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A daemon's view of a trainer that runs under `python -m shared.supervise`: start it, adopt it, wait, stop it.

The trainer's lock says whether anything of it lives. `kill -9` of the supervisor changes nothing about that: `adopt`
finds the holders of the lock in /proc, and `stop` ends them, their sessions and all their children.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from shared.errors import ResourceError
from shared.files import read_model
from shared.layout import TrialLayout
from shared.locks import FileLock
from shared.preloaded import Preloaded
from shared.process import ProcessIdentity, StopReport, child_environment, lock_holders, spawn, stop
from shared.schemas import TrainerExit
from shared.supervise import LEFTOVER_TIMEOUT_S, STOP_TIMEOUT_S, forget

_POLL_S = 0.05


@dataclass
class SupervisedProcess:
    """A trainer under its supervisor, started by this daemon or adopted from an earlier one.

    Args:
        directory: the trial's folder.
        supervisor: None when it was killed or cannot be told from the rest of the tree.
    """

    directory: Path
    supervisor: ProcessIdentity | None
    _child: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def is_alive(self) -> bool:
        """Whether anything of the trainer or its supervisor lives."""
        if self._child is not None:
            self._child.poll()  # collects the supervisor once it has ended
        return FileLock.is_held(TrialLayout(self.directory).trainer_lock)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the whole tree; False when something of it lives on after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while self.is_alive:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        if self._child is not None:
            self._child.wait()  # it has given up the lock with its last breath
        return True

    def exit_record(self) -> TrainerExit | None:
        """Return how the training ended; None while it lives, and when its supervisor was killed.

        Raises:
            UnreadableFileError: the record is damaged.
        """
        if self.is_alive:
            return None
        try:
            return read_model(TrialLayout(self.directory).trainer_exit, TrainerExit)
        except FileNotFoundError:
            return None

    def stop(self, *, term_timeout_s: float, kill_timeout_s: float) -> StopReport:
        """End the whole tree, with or without its supervisor: SIGTERM, wait, SIGKILL, wait; see process.stop."""
        report = stop(
            self.supervisor,
            term_timeout_s=term_timeout_s,
            kill_timeout_s=kill_timeout_s,
            lock=TrialLayout(self.directory).trainer_lock,
            leader_forwards=True,
        )
        if self._child is not None and not report.survivors:
            self._child.wait()
        return report


def start_supervised(
    argv: Sequence[str],
    *,
    directory: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    parent_bound: bool = False,
    stop_timeout_s: float = STOP_TIMEOUT_S,
    leftover_timeout_s: float = LEFTOVER_TIMEOUT_S,
    pass_fds: Collection[int] = (),
    preloaded: Preloaded | None = None,
) -> SupervisedProcess:
    """Start a command under a supervisor. The trainer's lock is held when this returns, and never by two.

    A command that cannot be started is no error here: like any end it is found in the exit record. Main thread only.
    A supervisor that `preloaded` forks is no child of ours, just as an adopted one.

    Args:
        directory: the trial's folder, for the lock, the exit record and the log.
        cwd: where the command runs; None for `directory`.
        env: the command's whole environment; None for ours. The supervisor itself runs in ours.
        parent_bound: end the trainer when this process ends, instead of leaving it for the next daemon to adopt.
        stop_timeout_s: when told to stop, the supervisor kills what is left after this many seconds, by itself.
        leftover_timeout_s: how long processes may outlive the command before they are told to end.
        pass_fds: descriptors for the whole tree, such as those of a GPU lease.
        preloaded: forks the supervisor and the command, where it can; the command is `python -m MODULE ...`.

    Raises:
        AlreadyRunningError: a trainer of this folder lives.
        ResourceError: the lock or the log cannot be opened.
    """
    trial = TrialLayout(directory.absolute())
    lock = FileLock(trial.trainer_lock, inheritable=True).acquire()
    try:
        forget(trial.trainer_exit)
        with _open_log(trial.training_log) as log, _in_memory(child_environment() if env is None else env) as variables:
            options = {
                "--directory": trial.folder,
                "--lock": trial.trainer_lock,
                "--exit-file": trial.trainer_exit,
                "--log": trial.training_log,
                "--cwd": trial.folder if cwd is None else cwd.absolute(),
                "--stop-timeout": stop_timeout_s,
                "--leftover-timeout": leftover_timeout_s,
            } | ({"--die-with-parent": os.getpid()} if parent_bound else {})
            words = [str(word) for option in options.items() for word in option]
            if preloaded is not None and not parent_bound:  # its parent would be the server
                pid = preloaded.fork(words, argv, (log.fileno(), lock.fileno(), variables.fileno(), *pass_fds))
                if pid is not None:
                    return SupervisedProcess(trial.folder, ProcessIdentity.of(pid))
                if lock_holders(trial.trainer_lock) - {os.getpid()}:  # it was forked although nobody said so
                    return SupervisedProcess(trial.folder, None)
            words += ["--lock-fd", str(lock.fileno()), "--env-fd", str(variables.fileno())]
            child = spawn(
                [sys.executable, "-P", "-m", "shared.supervise", *words, "--", *argv],
                env=_supervisor_environment(),
                stdout=log,
                stderr=log,
                pass_fds=(lock.fileno(), variables.fileno(), *pass_fds),
            )
    finally:
        lock.release()  # our copy only; the supervisor has its own
    return SupervisedProcess(trial.folder, ProcessIdentity.of(child.pid), child)


def adopt(directory: Path) -> SupervisedProcess | None:
    """Take over the living trainer of a folder, whoever started it; None when nothing of it lives."""
    lock = TrialLayout(directory).trainer_lock
    if not FileLock.is_held(lock):
        return None
    pid = FileLock.signed_pid(lock)
    supervisor = ProcessIdentity.of(pid) if pid is not None and pid in lock_holders(lock) else None
    return SupervisedProcess(directory, supervisor)


def stop_together(processes: Sequence[SupervisedProcess], *, term_timeout_s: float, kill_timeout_s: float) -> None:
    """End several trees at once, each as `SupervisedProcess.stop` does: it takes as long as the slowest.

    What a signal handler raises meanwhile comes through at once, and the trees may then be stopped anew.
    """
    if not processes:
        return
    pool = ThreadPoolExecutor(len(processes))
    try:
        stops = [
            pool.submit(process.stop, term_timeout_s=term_timeout_s, kill_timeout_s=kill_timeout_s)
            for process in processes
        ]
        for stop in stops:
            stop.result()
    finally:
        pool.shutdown(wait=False)


def _open_log(path: Path) -> BinaryIO:
    try:
        return path.open("ab")
    except OSError as error:
        raise ResourceError(f"{path}: the log cannot be opened ({error.strerror}); make it writable") from error


def _in_memory(variables: Mapping[str, str]) -> BinaryIO:
    """Hold an environment in a file without a name: neither `ps` nor the disk shows its secrets."""
    file = os.fdopen(os.memfd_create("environment"), "r+b")
    file.write(json.dumps(dict(variables)).encode())
    file.seek(0)
    return file


def _supervisor_environment() -> dict[str, str]:
    """Our environment, in which `shared` can be imported even when we run from a source tree."""
    variables = child_environment()
    places = [str(Path(__file__).parents[1]), variables.get("PYTHONPATH", "")]
    return variables | {"PYTHONPATH": os.pathsep.join(filter(None, places))}

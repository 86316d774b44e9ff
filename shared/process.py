"""Processes: who they are, starting one in its own session, ending a whole tree of them. Linux only (/proc, pidfd).

A tree is found by three marks, since any one of them can be shed: the session (lost by setsid), the inherited lock
(lost by closing every descriptor) and the parent (lost when it dies). A process that shed all three is nobody's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from shared.errors import ResourceError

_POLL_S = 0.05
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_PROC = Path("/proc")
# Addressed to the service itself; a child that answered in its place would confuse systemd.
_SERVICE_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class _Status(NamedTuple):
    """The part of /proc/<pid>/stat we use."""

    state: str
    parent: int
    session: int
    start_ticks: int


@dataclass(frozen=True)
class ProcessIdentity:
    """One process for all time: pids are reused, this triple is not.

    Args:
        pid: process id.
        start_ticks: when it started, in clock ticks since boot (field 22 of proc_pid_stat(5)).
        boot_id: which boot.
    """

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """Identify the process that has `pid` now, zombies included; None when there is none."""
        status = _status(pid)
        return status and cls(pid, status.start_ticks, boot_id())

    @classmethod
    def current(cls) -> ProcessIdentity:
        """Identify this process."""
        identity = cls.of(os.getpid())
        assert identity is not None, "/proc does not show this process"
        return identity

    @property
    def exists(self) -> bool:
        """Whether the process still has its pid: it runs, or nobody has waited for it yet."""
        return ProcessIdentity.of(self.pid) == self

    @property
    def is_alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        status = _status(self.pid)
        return self.exists and status is not None and status.state not in "ZX"


@dataclass(frozen=True)
class StopReport:
    """What `stop` did.

    Args:
        terminated: pids that got SIGTERM.
        killed: pids that outlived `term_timeout_s` and got SIGKILL.
        survivors: pids that outlived even that, e.g. in an uninterruptible read of a broken disk, or of another user.
        duration_s: how long it took.
    """

    terminated: tuple[int, ...]
    killed: tuple[int, ...]
    survivors: tuple[int, ...]
    duration_s: float


def spawn(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    pass_fds: Collection[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a command as the leader of its own session, so that it can be stopped with all it starts.

    Only from the main thread: a parent-death signal fires when the *thread* that started the child ends.

    Args:
        env: the whole environment; None passes ours on, without what addresses this service alone.

    Raises:
        ResourceError: the command cannot be started.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("children must be started from the main thread")
    try:
        return subprocess.Popen(
            list(argv),
            cwd=cwd,
            env=child_environment() if env is None else dict(env),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    except OSError as error:
        raise ResourceError(f"{argv[0]!r} cannot be started ({error}); install it or correct the command") from error


def child_environment() -> dict[str, str]:
    """Our environment without what systemd addressed to this process alone."""
    return {name: value for name, value in os.environ.items() if name not in _SERVICE_VARIABLES}


def stop(
    leader: ProcessIdentity | None,
    *,
    term_timeout_s: float,
    kill_timeout_s: float,
    lock: Path | None = None,
    leader_forwards: bool = False,
) -> StopReport:
    """End a tree: SIGTERM, wait, SIGKILL, wait; see `members` for what belongs to it.

    Each process gets at most one SIGTERM. A signal goes through a pidfd whose identity was checked, so never to a
    stranger with a recycled pid. The leader, if it is our child, is left for the caller to wait for.

    Args:
        leader: the process that `spawn` made, or None when only the lock is known.
        term_timeout_s: how long the tree may take to end by itself.
        kill_timeout_s: how long the kernel may take to end it.
        lock: the lock file whose descriptor the tree inherited, if it has one.
        leader_forwards: the leader passes SIGTERM on to the rest and ends last, as shared.supervise does; it alone gets
            SIGTERM, and SIGKILL only when it stays although all others have gone.
    """
    begin = time.monotonic()
    find = functools.partial(members, leader, lock=lock)
    alive = find()
    spared = [process for process in alive if leader_forwards and process == leader]
    terminated = send_signal(spared or alive, signal.SIGTERM)
    if spared and not wait_until_gone(lambda: [process for process in spared if process.is_alive], term_timeout_s):
        spared = []
        terminated += send_signal(find(), signal.SIGTERM)  # it was killed before it could pass the signal on
    killed: set[int] = set()
    if wait_until_gone(find, begin + term_timeout_s - time.monotonic()):
        killed |= _kill(lambda: [process for process in find() if process not in spared], kill_timeout_s)
        if spared and wait_until_gone(find, kill_timeout_s):
            killed |= _kill(find, kill_timeout_s)
    _kill_group_of(leader)
    survivors = tuple(process.pid for process in find())
    return StopReport(tuple(terminated), tuple(sorted(killed)), survivors, time.monotonic() - begin)


def members(leader: ProcessIdentity | None, *, lock: Path | None = None) -> list[ProcessIdentity]:
    """List the living processes of a tree, without this process.

    They are the session `leader` leads, as long as it has its pid; whoever keeps `lock` alive, with their sessions; and
    all children of these.
    """
    table = _process_table()
    sessions: set[int] = set()
    pids: set[int] = set()
    if leader is not None and leader.exists:  # later its number may lead a stranger's session
        sessions.add(leader.pid)
        pids.add(leader.pid)
    if lock is not None:
        holders = lock_holders(lock)
        pids |= holders
        sessions |= {table[pid].session for pid in holders if pid in table}
    # Never ours, nor our other children, should we happen to hold the lock ourselves for a moment.
    sessions.discard(os.getsid(0))
    pids.discard(os.getpid())
    pids |= {pid for pid, status in table.items() if status.session in sessions}
    return _identities(_with_descendants(pids, table) - {os.getpid()}, table)


def descendants() -> list[ProcessIdentity]:
    """List the living children of this process, their children, and so on."""
    table = _process_table()
    return _identities(_with_descendants({os.getpid()}, table) - {os.getpid()}, table)


def lock_holders(path: Path) -> set[int]:
    """Return the pids of all processes that keep a flock on `path` alive; only those this user may look at.

    A process that has the file open without the lock, such as one that probes it, is not among them.
    """
    try:
        target = path.stat()
    except FileNotFoundError:
        return set()
    return {pid for pid in _pids() if _carries_lock(pid, target)}


def send_signal(processes: Iterable[ProcessIdentity], number: signal.Signals) -> list[int]:
    """Signal exactly these processes and return the pids that got it; those that ended or forbid it are left out."""
    reached = []
    for process in processes:
        # Gone, or of another user: both show in what is found alive afterwards.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            handle = os.pidfd_open(process.pid)
            try:
                if process.exists:  # the handle was opened before, so it refers to this very process
                    signal.pidfd_send_signal(handle, number)
                    reached.append(process.pid)
            finally:
                os.close(handle)
    return reached


def wait_until_gone(find: Callable[[], list[ProcessIdentity]], timeout_s: float) -> list[ProcessIdentity]:
    """Wait until `find` finds nobody; return whom it still finds after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while (alive := find()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return alive


def die_with_parent(parent_pid: int) -> bool:
    """Ask the kernel for SIGTERM when the thread that started this process ends; call it from the main thread.

    Returns:
        False when the parent `parent_pid` had already ended before we asked: no signal will come.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return os.getppid() == parent_pid


def adopt_orphans() -> None:
    """Become the parent of all our descendants whose parent ends, wherever they moved (PR_SET_CHILD_SUBREAPER)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


@functools.cache
def boot_id() -> str:
    """The kernel's random name of this boot."""
    return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _kill(find: Callable[[], list[ProcessIdentity]], timeout_s: float) -> set[int]:
    """SIGKILL what `find` finds, again and again: a process may fork between the look and the signal."""
    killed: set[int] = set()
    deadline = time.monotonic() + timeout_s
    while (alive := find()) and time.monotonic() < deadline:
        killed.update(send_signal(alive, signal.SIGKILL))
        time.sleep(_POLL_S)
    return killed


def _kill_group_of(leader: ProcessIdentity | None) -> None:
    """SIGKILL whatever is left of the group `leader` led.

    Processes that do nothing but fork and end can slip through any look at /proc; no signal to their group misses them.
    """
    if leader is not None and leader.exists and leader.pid != os.getpgid(0):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader.pid, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _status(pid: int) -> _Status | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the command's name before it may hold anything
    return _Status(fields[0], int(fields[1]), int(fields[3]), int(fields[19]))


def _pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def _process_table() -> dict[int, _Status]:
    return {pid: status for pid in _pids() if (status := _status(pid))}


def _identities(pids: Iterable[int], table: Mapping[int, _Status]) -> list[ProcessIdentity]:
    return [
        ProcessIdentity(pid, table[pid].start_ticks, boot_id())
        for pid in sorted(pids)
        if pid in table and table[pid].state not in "ZX"
    ]


def _with_descendants(pids: set[int], table: Mapping[int, _Status]) -> set[int]:
    children: dict[int, list[int]] = {}
    for pid, status in table.items():
        children.setdefault(status.parent, []).append(pid)
    found: set[int] = set()
    left = list(pids)
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left.extend(children.get(pid, ()))
    return found


def _carries_lock(pid: int, target: os.stat_result) -> bool:
    # Processes and descriptors end while we look, and those of other users are closed to us.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for entry in (_PROC / str(pid) / "fdinfo").iterdir():
            with contextlib.suppress(FileNotFoundError):
                # The text first: a stat of just any descriptor may hang on a dead network mount.
                locked = "FLOCK" in entry.read_text(encoding="utf-8", errors="replace")
                if locked and os.path.samestat((_PROC / str(pid) / "fd" / entry.name).stat(), target):
                    return True
    return False

"""flock: one owner per file, alive for as long as the lock is held.

A lock is life itself: the kernel drops it when the last process that has it open ends, however it ends. Nothing here
looks at pids or time stamps to decide who lives; the text inside a lock file only makes messages readable.

Lock files are never unlinked: a second process could lock a new file of the same name while the first still holds the
old one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.errors import AlreadyRunningError, ResourceError

_POLL_S = 0.01
# `is_held` holds a shared lock for some microseconds; an owner who comes just then must wait, not give up.
_PROBE_PATIENCE_S = 0.5
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class FileLock:
    """A flock on `path`, exclusive unless `shared`; also a context manager that acquires on entry.

    A child made by `os.fork` without exec (multiprocessing's fork) shares the lock until it ends, or until the owner
    calls `release`.

    Args:
        path: the lock file; made when missing, its folder is not.
        shared: hold it together with other shared holders.
        inheritable: the file descriptor survives exec, so a whole tree of children keeps the lock alive, and
            `release` only closes this process's copy.
    """

    def __init__(self, path: Path, *, shared: bool = False, inheritable: bool = False) -> None:
        self.path = path
        self._operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._inheritable = inheritable
        self._fd: int | None = None

    @classmethod
    def from_fd(cls, path: Path, fd: int) -> Self:
        """Take over the lock that the parent process holds on `path` through the inherited descriptor `fd`.

        Raises:
            AlreadyRunningError: `fd` is another file, or carries no lock and somebody else holds `path`.
        """
        lock = cls(path, inheritable=True)
        if not os.path.samestat(os.fstat(fd), path.stat()) or not lock._flock(fd):
            raise AlreadyRunningError(path, cls.holder(path))
        os.set_inheritable(fd, True)
        lock._fd = fd
        lock._sign(fd)
        return lock

    def acquire(self) -> Self:
        """Take the lock or raise AlreadyRunningError naming its holder."""
        if not self.try_acquire():
            raise AlreadyRunningError(self.path, self.holder(self.path))
        return self

    def try_acquire(self, timeout_s: float = 0.0) -> bool:
        """Take the lock within `timeout_s` seconds of the monotonic clock; False when others hold it all that time.

        Raises:
            ResourceError: the file cannot be opened, or its file system has no flock.
        """
        assert self._fd is None, f"{self.path} is already held by this object"
        fd = self._open()
        try:
            deadline = time.monotonic() + max(timeout_s, _PROBE_PATIENCE_S)
            while not self._flock(fd):
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_POLL_S)
            os.set_inheritable(fd, self._inheritable)
            self._sign(fd)
            self._fd, fd = fd, -1
            return True
        finally:
            if fd >= 0:
                os.close(fd)

    def release(self) -> None:
        """Give the lock up; harmless when it is not held."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        if not self._inheritable:  # an explicit unlock would also free the copies of a child tree
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)

    def fileno(self) -> int:
        """The descriptor that carries the lock, to pass to children."""
        assert self._fd is not None, f"{self.path} is not held by this object"
        return self._fd

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    @staticmethod
    def is_held(path: Path) -> bool:
        """Whether somebody alive holds `path` exclusively; False when the file is missing.

        Never blocks. It looks by a shared lock of some microseconds: two probes do not mistake each other for an
        owner, and an owner who comes at that very moment waits it out.

        Raises:
            ResourceError: the file cannot be opened, or its file system has no flock.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ResourceError(
                f"{path}: the lock file cannot be opened ({error.strerror}); make it readable"
            ) from error
        try:
            free = _try_flock(fd, fcntl.LOCK_SH, path)
            if free:
                # Closing is not enough: a child between fork and exec may own a copy of the descriptor.
                fcntl.flock(fd, fcntl.LOCK_UN)
            return not free
        finally:
            os.close(fd)

    @staticmethod
    def holder(path: Path) -> str:
        """Who signed the lock last, as "pid 1234 on host since time"; for messages, never for decisions."""
        with contextlib.suppress(OSError, ValueError):
            pid, host, since = path.read_text(encoding="utf-8").split()
            return f"pid {pid} on {host} since {since}"
        return "an unknown process"

    @staticmethod
    def signed_pid(path: Path) -> int | None:
        """The pid in the file; only a hint where to look, for its writer may be long gone."""
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text(encoding="utf-8").partition(" ")[0])
        return None

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ResourceError(
                f"{self.path}: the lock file cannot be opened ({error.strerror}); make its folder exist and be writable"
            ) from error

    def _flock(self, fd: int) -> bool:
        return _try_flock(fd, self._operation, self.path)

    def _sign(self, fd: int) -> None:
        text = f"{os.getpid()} {os.uname().nodename} {datetime.now().astimezone().isoformat(timespec='seconds')}\n"
        with contextlib.suppress(OSError):  # only messages read it: a full disk must not keep an owner out
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, text.encode())  # leaves the offset at the end: the file reads as empty when used as stdin


def _try_flock(fd: int, operation: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        raise ResourceError(
            f"{path}: its file system has no flock ({error.strerror}); put the folder on a local disk"
        ) from error
    return True

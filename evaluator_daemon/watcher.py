"""Wake-ups when something changes in a folder. Events are hints: a lost one costs a check interval, never a file."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.api import BaseObserver, ObservedWatch
from watchdog.observers.inotify import InotifyEmitter
from watchdog.observers.inotify_c import InotifyEvent, InotifyFD

from shared.logs import log_change
from shared.mounts import file_system, tells_changes

RETRY_S = 300.0
"""How long after the system's watches were found used up it is tried again."""
STEADY_S = 600.0
"""An observer that lived this long starts its count of failures anew."""
MAX_FAILURES = 10
"""An observer that failed this often in a row is left off."""

# watchdog's default mask floods its queue, and a reader that opens files would wake itself.
_EVENTS: list[type[FileSystemEvent]] = [
    FileClosedEvent,
    FileMovedEvent,
    FileCreatedEvent,
    DirCreatedEvent,
    DirMovedEvent,
]
_LIMITS = {
    errno.ENOSPC: "the system's inotify watches are used up; raise fs.inotify.max_user_watches",
    errno.EMFILE: "the system's inotify instances are used up; raise fs.inotify.max_user_instances",
}

_log = logging.getLogger(__name__)


@dataclass
class _Folder:
    """A folder that is watched, or would be.

    Args:
        identity: device and inode of what is watched, or was found unfit for it; None where nothing was found.
        watch: None while there are no events from it.
        blind_because: why.
        final: it will stay so for as long as this very folder stands there.
    """

    names: Sequence[str]
    identity: tuple[int, int] | None = None
    watch: ObservedWatch | None = None
    blind_because: str | None = None
    final: bool = False


class Watches:
    """Calls `wake` from its own thread when something is made, closed or renamed directly in one of its folders.

    Where the file system cannot tell, or the system's watches are used up, a folder stays silent: `blind` says why.
    Whatever happens to the threads, the kernel's queue or the folders themselves is found and mended by `check`.

    Args:
        wake: called for every event that matters; when it raises, the thread ends, as any handler's.
        clock: monotonic time in seconds.
    """

    def __init__(self, wake: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._wake = wake
        self._clock = clock
        self._overflowed = threading.Event()
        self._folders: dict[Path, _Folder] = {}
        self._observer: _Observer | None = None
        self._born_s = 0.0
        self._failures = 0
        self._not_before_s = 0.0
        self._pause_because = ""

    @property
    def blind(self) -> dict[Path, str]:
        """The folders that are there but send no events, with the reason."""
        return {path: why for path, known in self._folders.items() if known.identity and (why := known.blind_because)}

    def keep(self, folders: Mapping[Path, Sequence[str]]) -> bool:
        """Watch exactly these folders.

        Args:
            folders: each with the patterns of the names that matter; whoever writes there must not wake itself.
        Returns:
            Whether there is a new one: what changed there before is not told, so look at it again.
        """
        for path in self._folders.keys() - folders.keys():
            self._drop(self._folders.pop(path))
        new = [path for path in folders if path not in self._folders]
        for path in new:
            self._folders[path] = _Folder(folders[path])
            self._try(path)
        return any(self._folders[path].watch for path in new)

    def check(self) -> str | None:
        """Mend what is broken.

        Returns:
            Why events may have been lost since the last call, so that only a look at everything finds all that
            changed; None when none were.
        """
        lost: list[str] = []
        if self._overflowed.is_set():
            self._overflowed.clear()
            lost.append("the kernel's queue of events overflowed")
        if self._observer is not None and not self._observer.is_well:
            lost.append("a thread that reads events had ended")
            self._fail()
        for path, known in self._folders.items():
            was_blind = known.blind_because is not None
            if not self._is_well(path, known):
                lost.append(f"{path.name} was replaced")
            if known.watch is None and not self._is_hopeless(path, known):
                self._try(path)
                if was_blind and known.watch is not None:
                    lost.append(f"{path.name} can be watched again")
        if not lost:
            return None
        why = "; ".join(dict.fromkeys(lost))
        log_change(_log, "events may be lost", level=logging.WARNING, why=why)
        return why

    def close(self) -> None:
        """Stop watching."""
        self._folders.clear()
        self._discard_observer()

    # ------------------------------------------------------------------------------------------------------- helpers

    def _is_well(self, path: Path, known: _Folder) -> bool:
        """Whether the watch, if there is one, is on what stands at the path now; a dead one is dropped."""
        if known.watch is None:
            return True
        assert self._observer is not None
        if _identity(path) == known.identity and self._observer.is_fed_by(known.watch):
            return True
        self._drop(known)
        return False

    def _is_hopeless(self, path: Path, known: _Folder) -> bool:
        return known.final and _identity(path) == known.identity

    def _try(self, path: Path) -> None:
        known = self._folders[path]
        known.identity, known.final, known.blind_because = _identity(path), False, None
        if known.identity is None:
            known.blind_because = "it is not there"
            return
        if self._failures >= MAX_FAILURES:
            known.blind_because = f"watching failed {MAX_FAILURES} times in a row; start again to try again"
            return
        if self._clock() < self._not_before_s:
            known.blind_because = self._pause_because
            return
        kind = file_system(path)
        if not tells_changes(kind):
            known.blind_because, known.final = f"its file system, {kind}, does not tell what others write", True
            return
        try:
            if self._observer is None:
                self._observer = _Observer(self._overflow)
                self._born_s = self._clock()
                self._observer.start()
            # inotify does not follow a link, and a link may be turned to another folder: `check` sees that
            known.watch = self._observer.schedule(
                _Waker(known.names, self._wake), os.path.realpath(path), event_filter=_EVENTS
            )
        except OSError as error:
            known.blind_because = _LIMITS.get(error.errno or 0, f"it cannot be watched ({error.strerror})")
            if error.errno in _LIMITS:
                self._not_before_s, self._pause_because = self._clock() + RETRY_S, known.blind_because

    def _overflow(self) -> None:
        self._overflowed.set()
        self._wake()

    def _drop(self, known: _Folder) -> None:
        if known.watch is not None and self._observer is not None:
            self._observer.drop(known.watch)
        known.watch = None

    def _fail(self) -> None:
        """Give up an observer of which a thread has ended: the first time for a new one, then for longer and longer."""
        now = self._clock()
        self._failures = 1 if now - self._born_s >= STEADY_S else self._failures + 1
        if self._failures > 1:
            self._not_before_s = now + min(RETRY_S, 2.0**self._failures)
            self._pause_because = "watching failed a moment ago"
        self._discard_observer()

    def _discard_observer(self) -> None:
        for known in self._folders.values():
            known.watch = None
        if self._observer is not None:
            self._observer.stop()
            if self._observer.is_alive():
                self._observer.join()
        self._observer = None


class FolderWatch:
    """Calls `wake` whenever something is made, closed or renamed directly in one folder; see `Watches`.

    Args:
        names: patterns of the names that matter; whoever writes into the folder itself must not wake itself.
    """

    def __init__(self, folder: Path, names: Sequence[str], wake: Callable[[], None]) -> None:
        self._folder = folder
        self._watches = Watches(wake)
        self._watches.keep({folder: names})

    @property
    def blind_because(self) -> str | None:
        """Why it is silent; None while it is not."""
        why = self._watches.blind.get(self._folder)
        return why and f"{self._folder}: {why}"

    def check(self) -> str | None:
        """Mend the watch where its threads or its folder are no more; return why events may have been lost."""
        return self._watches.check()

    def close(self) -> None:
        """Stop watching."""
        self._watches.close()


class _Waker(FileSystemEventHandler):
    def __init__(self, names: Sequence[str], wake: Callable[[], None]) -> None:
        self._names = names
        self._wake = wake

    def on_any_event(self, event: FileSystemEvent) -> None:
        name = Path(os.fsdecode(event.dest_path or event.src_path)).name
        if any(fnmatch(name, pattern) for pattern in self._names):
            self._wake()


class _Reader(InotifyFD):
    """Tells of an overflow, which watchdog only logs."""

    def __init__(self, overflowed: Callable[[], None]) -> None:
        super().__init__()
        self._tell = overflowed

    def handle_event(self, event: InotifyEvent) -> None:
        if event.is_queue_overflow:
            self._tell()
        super().handle_event(event)


class _Observer(BaseObserver):
    """watchdog's inotify observer with our reader.

    Raises:
        OSError: EMFILE where the system's inotify instances are used up.
    """

    def __init__(self, overflowed: Callable[[], None]) -> None:
        self._reader = _Reader(overflowed)
        super().__init__(InotifyEmitter, inotify_fd=self._reader)

    def on_thread_start(self) -> None:
        self._reader.start()
        super().on_thread_start()

    def on_thread_stop(self) -> None:
        super().on_thread_stop()
        self._reader.stop()
        self._reader.join()

    @property
    def is_well(self) -> bool:
        """Whether events are read and dispatched; an exception in a handler ends the dispatcher."""
        return self.is_alive() and self._reader.is_alive()

    def is_fed_by(self, watch: ObservedWatch) -> bool:
        """Whether the watch's own thread lives; it ends when its folder is deleted."""
        return any(emitter.watch == watch and emitter.is_alive() for emitter in self.emitters)

    def drop(self, watch: ObservedWatch) -> None:
        """Forget a watch, whether it lives or not."""
        if any(emitter.watch == watch for emitter in self.emitters):
            self.unschedule(watch)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino

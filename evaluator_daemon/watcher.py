"""Wake-ups when something changes in a folder. Events are hints: a lost one costs a check interval, never a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from watchdog.events import (
    DirCreatedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

from shared.errors import ResourceError

# There inotify does not see what the other side writes.
_BLIND = ("9p", "drvfs", "nfs", "cifs", "smb", "fuse", "virtiofs", "vboxsf")
# watchdog's default mask floods its queue, and a reader that opens files would wake itself.
_EVENTS: list[type[FileSystemEvent]] = [FileClosedEvent, FileMovedEvent, FileCreatedEvent, DirCreatedEvent]


class FolderWatch:
    """Calls `wake` from its own thread whenever something is made, closed or renamed directly in `folder`.

    Where the file system cannot tell, or the system's watches are used up, it stays silent: `blind_because` says why.

    Args:
        names: patterns of the names that matter; whoever writes into the folder itself must not wake itself.
    """

    def __init__(self, folder: Path, names: Sequence[str], wake: Callable[[], None]) -> None:
        self.blind_because: str | None = None
        kind = mount_type(folder, Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines())
        if kind.startswith(_BLIND):
            self.blind_because = f"{folder} lies on {kind}"
            return
        self._observer = Observer()
        self._observer.schedule(_Waker(names, wake), str(folder), recursive=False, event_filter=_EVENTS)
        try:
            self._observer.start()
        except OSError as error:
            self.blind_because = f"{folder} cannot be watched ({error.strerror})"

    def close(self) -> None:
        """Stop watching."""
        if self.blind_because is None:
            self._observer.stop()
            self._observer.join()

    def check(self) -> None:
        """Notice a watch that died, which would otherwise go unseen.

        Raises:
            ResourceError: its thread has ended.
        """
        if self.blind_because is None and not self._observer.is_alive():
            raise ResourceError("the thread that watches the folder has ended; start the evaluator again")


class _Waker(FileSystemEventHandler):
    def __init__(self, names: Sequence[str], wake: Callable[[], None]) -> None:
        self._names = names
        self._wake = wake

    def on_any_event(self, event: FileSystemEvent) -> None:
        name = Path(os.fsdecode(event.dest_path or event.src_path)).name
        if any(fnmatch(name, pattern) for pattern in self._names):
            self._wake()


def mount_type(folder: Path, mountinfo: Iterable[str]) -> str:
    """Return the file system's type of the mount `folder` lies on, from the lines of /proc/self/mountinfo."""
    path = os.path.realpath(folder)
    best, kind = "", ""
    for line in mountinfo:
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")  # a space is written \040
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, after.split()[0]
    return kind

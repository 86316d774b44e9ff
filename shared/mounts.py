"""Which file system a path lies on, and what cannot be relied on there: events, SQLite's locks and shared memory."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

MOUNT_TABLE = Path("/proc/self/mountinfo")

_NETWORK = {
    *("9p", "drvfs", "virtiofs", "vboxsf", "vmhgfs", "prl_fs", "fakeowner"),  # a host's folder in a virtual machine
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ncpfs", "coda"),
    *("ceph", "lustre", "gpfs", "beegfs", "glusterfs", "ocfs2", "gfs2", "orangefs", "pvfs2", "panfs", "wekafs"),
}
_LOCAL_FUSE = {"fuse-overlayfs", "bindfs", "mergerfs", "unionfs", "unionfs-fuse", "gocryptfs", "encfs", "cryfs",
               "ntfs-3g", "exfat", "lxcfs", "zfs"}  # fmt: skip


def file_system(path: Path, table: Path = MOUNT_TABLE) -> str:
    """Return the type of the file system that a path lies on, such as ext4 or fuse.sshfs; empty where nothing tells.

    Args:
        path: any file or folder, there or not; links are followed.
        table: of mounts, in the form of /proc/self/mountinfo.
    """
    with contextlib.suppress(OSError):
        path.stat()  # an automounter mounts at the first look
    place = os.path.realpath(os.fsencode(path))
    best, kind = b"", b""
    try:
        lines = table.read_bytes().splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(b" - ")
        # a space is written \040; all but four characters stand there as they are, whatever their encoding
        point = re.sub(rb"\\([0-3][0-7]{2})", lambda octal: bytes([int(octal[1], 8)]), before.split(b" ")[4])
        inside = place == point or place.startswith(point.rstrip(b"/") + b"/")
        if inside and len(point) >= len(best):  # of several mounts on one point the last covers the others
            best, kind = point, after.split(b" ")[0]
    return kind.decode()


def tells_changes(kind: str) -> bool:
    """Tell whether inotify sees there what others write: on no network, and not through FUSE."""
    return kind not in _NETWORK and not kind.startswith("fuse")


def network_type(path: Path, table: Path = MOUNT_TABLE) -> str | None:
    """Return the type of the file system that a path lies on where SQLite cannot work, else None.

    Another machine may have the files there, or a server that does not share memory with us. Any FUSE file system that
    is not known as local counts, for most are clients of something.
    """
    kind = file_system(path, table)
    family, _, name = kind.partition(".")
    return kind if kind in _NETWORK or (family == "fuse" and name not in _LOCAL_FUSE) else None

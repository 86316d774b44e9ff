"""Keeps a log that another process appends to from filling the disk: its middle is given back to the file system.

A hole is punched into the file (fallocate(2)), so nothing is copied, no line at its ends is lost, and neither the
writer nor a reader has to know: every byte keeps its place, `ls -l` shows the full length, `du` what is left, and the
hole reads as zeros. File systems without holes, such as 9p and NFS before 4.2, keep the log whole.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

MOST_BYTES = 64 << 20  # on disk, before the middle goes
KEPT_HEAD_BYTES = 1 << 20  # how the training began
KEPT_TAIL_BYTES = 16 << 20

_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own are


def bound(log: Path) -> bool:
    """Give the middle of a log back when it takes too much of the disk; whether that was done.

    Raises:
        OSError: the log cannot be opened, or the disk failed.
    """
    try:
        status = log.stat()
    except FileNotFoundError:
        return False
    length = status.st_size - KEPT_TAIL_BYTES - KEPT_HEAD_BYTES
    if status.st_blocks * _BLOCK_BYTES <= MOST_BYTES or length <= 0:
        return False
    descriptor = os.open(log, os.O_RDWR | os.O_CLOEXEC)
    try:
        return _punch(descriptor, KEPT_HEAD_BYTES, length)
    finally:
        os.close(descriptor)


def _punch(descriptor: int, start: int, length: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    mode = ctypes.c_int(_KEEP_SIZE | _PUNCH_HOLE)
    if libc.fallocate(ctypes.c_int(descriptor), mode, ctypes.c_int64(start), ctypes.c_int64(length)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number))

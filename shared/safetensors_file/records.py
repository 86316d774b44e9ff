"""What is known about a weight file after each look."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HASH_PROMISE = "sshs_model_hash"
"""Metadata field in which sd-scripts, and our trainer, promise the SHA-256 of the data section."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """The cheap identity of a file's bytes at one look.

    The change time is in it because nobody can set it: a copy tool that rewrites a file in place and then puts the old
    modification time back changes nothing else.
    """

    size: int  # bytes
    mtime_ns: int
    inode: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Return the stamp of a file from its stat or fstat result."""
        return cls(size=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino, ctime_ns=status.st_ctime_ns)


def is_stable(previous: Stamp | None, current: Stamp) -> bool:
    """Say whether nothing changed between two looks; a first look (`previous` None) is never stable.

    The looks must lie further apart than the file system's clock ticks (4 ms on ext4, 2 s on FAT).
    """
    return previous == current


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the header; `start` and `end` count bytes from the start of the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """The header of a complete file; `tensors` are in data order, `data_start` = 8 + header length, in bytes."""

    path: Path
    stamp: Stamp
    data_start: int
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self.stamp.size

    @property
    def epoch(self) -> int | None:
        """The epoch the trainer wrote down as `ss_epoch`; None when absent or not a number."""
        text = self.metadata.get("ss_epoch", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None

    def bounds(self, name: str) -> tuple[int, int]:
        """Return (start, end) of a tensor's bytes within the file."""
        tensor = self.tensors[name]
        return self.data_start + tensor.start, self.data_start + tensor.end


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint(Header):
    """A file proven whole, finite and not zero, with its bytes for `safetensors.torch.load`.

    `sha256` is its identity by content; see `reading.content_hash`. `data_sha256` is that of the data section alone,
    by which other programs know the file.
    """

    sha256: str
    data_sha256: str
    raw: bytes = field(repr=False)

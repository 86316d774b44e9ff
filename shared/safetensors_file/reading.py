"""Open a weight file without trusting it, and prove what is in it."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shared.errors import CheckpointError, ResourceError
from shared.safetensors_file.header import MAX_FILE_BYTES, MAX_HEADER_BYTES, parse_header
from shared.safetensors_file.lora import role_of
from shared.safetensors_file.records import HASH_PROMISE, Checkpoint, Header, Stamp, Tensor
from shared.safetensors_file.refusals import incomplete, refused, shown
from shared.safetensors_file.values import is_finite, is_zero

_PREFIX_BYTES = 8  # the header's length, unsigned, little-endian


def stamp_of(path: Path) -> Stamp:
    """Look at a file without opening it; a symbolic link is looked at itself.

    Raises:
        IncompleteCheckpointError: gone, or the disk or the mount does not answer.
    """
    try:
        return Stamp.of(path.lstat())
    except OSError as error:
        raise _explained(path, error) from error


def read_header(path: Path, inside: Path, *, max_bytes: int = MAX_FILE_BYTES) -> Header:
    """Prove by the header alone that the file is complete and within all bounds.

    Args:
        path: the weight file.
        inside: the folder it must lie in, symbolic links resolved.
        max_bytes: how large the file may be.
    Raises:
        IncompleteCheckpointError: cut short, gone or unreadable; look again later.
        RefusedCheckpointError: longer than promised, or a bound is broken. Act on it only when the stamp is stable.
    """
    with _opened(path, inside, max_bytes) as (file, stamp):
        head = file.read(_PREFIX_BYTES)
        head += file.read(min(int.from_bytes(head, "little"), MAX_HEADER_BYTES))
    return _proven_header(path, stamp, head, stamp.size, max_bytes)


def read_checkpoint(path: Path, inside: Path) -> Checkpoint:
    """Read the bytes once, and prove them whole, unaltered, finite and not zero.

    Args:
        path: the weight file, at most MAX_FILE_BYTES.
        inside: the folder it must lie in, symbolic links resolved.
    Raises:
        IncompleteCheckpointError: cut short, changing, gone or unreadable; look again later.
        RefusedCheckpointError: never acceptable as it is.
        ResourceError: there is no memory for it.
    """
    with _opened(path, inside, MAX_FILE_BYTES) as (file, stamp):
        try:
            raw = file.read(stamp.size)
        except MemoryError as error:
            raise ResourceError(
                f"{path}: no memory for its {stamp.size} bytes; close other programs, or remove the file"
            ) from error
    header = _proven_header(path, stamp, raw, len(raw), MAX_FILE_BYTES)
    data_hash = hashlib.sha256(memoryview(raw)[header.data_start :])
    _require_hash(header, data_hash.hexdigest())
    _require_finite(header, raw)
    _require_nonzero(header, raw)
    return Checkpoint(
        path=path,
        stamp=header.stamp,
        data_start=header.data_start,
        tensors=header.tensors,
        metadata=header.metadata,
        sha256=content_hash(header.tensors, data_hash.digest()),
        data_sha256=data_hash.hexdigest(),
        raw=raw,
    )


def content_hash(tensors: Mapping[str, Tensor], data_digest: bytes) -> str:
    """Return the identity of a checkpoint's content, 64 hexadecimal digits.

    It is SHA-256 over the compact ASCII JSON list of [name, dtype, shape] in data order, followed by the 32-byte
    SHA-256 of the data section. Metadata, file name and header spacing do not count. The order of the tensors in the
    file does: every writer known to us sorts, and hashing in file order lets one pass serve sshs_model_hash too.
    """
    layout = [[name, tensor.dtype, tensor.shape] for name, tensor in tensors.items()]
    return hashlib.sha256(json.dumps(layout, separators=(",", ":")).encode("ascii") + data_digest).hexdigest()


def _opener(name: str, flags: int) -> int:
    # No link is followed to another folder, and a FIFO without a writer must not block the daemon.
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


@contextmanager
def _opened(path: Path, inside: Path, max_bytes: int) -> Iterator[tuple[BinaryIO, Stamp]]:
    """Open a regular file of bounded size that lies inside a folder, and check that reading it met no writer.

    OSErrors, the caller's too, become CheckpointErrors. Judge what was read only after leaving: a file that changed
    meanwhile gets no verdict.
    """
    folder = os.path.realpath(path.parent)  # unlike Path.resolve it does not raise on a loop of links
    if not Path(folder).is_relative_to(os.path.realpath(inside)):
        raise refused(path, "outside_folder", f"does not lie inside {inside}; weights are read from there only")
    try:
        with io.BufferedReader(io.FileIO(path, opener=_opener)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise refused(path, "not_a_file", "is not a regular file; remove it from the trial's folder")
            if status.st_size > max_bytes:
                raise refused(path, "too_large", f"has {status.st_size} bytes; at most {max_bytes} are accepted")
            stamp = Stamp.of(status)
            yield file, stamp
            if Stamp.of(os.fstat(file.fileno())) != stamp:
                raise incomplete(path, "changing", "changed while it was being read; it is looked at again later")
    except OSError as error:
        raise _explained(path, error) from error


def _explained(path: Path, error: OSError) -> CheckpointError:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return incomplete(path, "vanished", "is not there, or no longer there")
        case errno.ELOOP:
            return refused(path, "symlink", "is a symbolic link; put the file itself there")
        case errno.EISDIR | errno.ENXIO | errno.ENODEV:  # a folder, a socket, a device without driver
            return refused(path, "not_a_file", "is not a regular file; remove it from the trial's folder")
    return incomplete(
        path, "unreadable", f"cannot be read ({error.strerror or error}); let this user read it, or repair the disk"
    )


def _proven_header(path: Path, stamp: Stamp, head: bytes, size: int, max_bytes: int) -> Header:
    """Judge the first bytes of a file, at least the whole header, against the file's size in bytes."""
    if len(head) < _PREFIX_BYTES:
        raise incomplete(path, "incomplete", f"has {len(head)} of the {_PREFIX_BYTES} bytes of the header's length")
    length = int.from_bytes(head[:_PREFIX_BYTES], "little")
    if not 0 < length <= MAX_HEADER_BYTES:
        raise refused(
            path,
            "header_size",
            f"the header is said to have {length} bytes; 1 to {MAX_HEADER_BYTES} are accepted; is this safetensors?",
        )
    data_start = _PREFIX_BYTES + length
    text = head[_PREFIX_BYTES:data_start]
    if len(text) < length:
        raise incomplete(path, "incomplete", f"has {len(text)} of {length} bytes of its header")
    tensors, metadata = parse_header(path, text, max_bytes)
    promised = data_start + max(tensor.end for tensor in tensors.values())
    if promised > max_bytes:
        raise refused(path, "too_large", f"promises {promised} bytes; at most {max_bytes} are accepted")
    if size < promised:
        raise incomplete(path, "incomplete", f"has {size} of {promised} bytes")
    if size > promised:
        raise refused(path, "trailing_bytes", f"has {size - promised} bytes after the last tensor; save it again")
    return Header(path, stamp, data_start, tensors, metadata)


def _require_hash(header: Header, actual: str) -> None:
    """kohya-ss/sd-scripts writes SHA-256 of the data section, in hexadecimal (`addnet_hash_safetensors`).

    It hashes a serialisation with reduced metadata, but metadata lies in the header, outside the data section. What the
    hash does not cover, which name stands for which data, shows by the order: who promises it saves by the safetensors
    library, which stores the tensors of one dtype together, by name.
    """
    promised = header.metadata.get(HASH_PROMISE)
    if promised is None:
        return
    if promised.lower() != actual:
        raise refused(
            header.path,
            "hash_mismatch",
            f"its data has SHA-256 {actual[:12]}..., but sshs_model_hash says {promised[:12]!r}; "
            "save it again, or drop that field after a conversion",
        )
    seen: dict[str, str] = {}
    dtype = None
    for name, tensor in header.tensors.items():
        if tensor.dtype in seen and (tensor.dtype != dtype or name < seen[tensor.dtype]):
            raise refused(
                header.path,
                "hash_mismatch",
                f"tensor {shown(name)} is not where the writer of sshs_model_hash stores it, behind "
                f"{shown(seen[tensor.dtype])}; save it again, or drop that field after a conversion",
            )
        dtype = tensor.dtype
        seen[dtype] = name


def _require_finite(header: Header, raw: bytes) -> None:
    for name, tensor in header.tensors.items():
        if not is_finite(raw, *header.bounds(name), tensor.dtype):
            raise refused(
                header.path, "not_finite", f"tensor {shown(name)} holds NaN or Inf; the training diverged before this"
            )


def _require_nonzero(header: Header, raw: bytes) -> None:
    """A LoRA starts with up = 0: with every up weight still zero it changes nothing."""

    def are_zero(names: list[str]) -> bool:
        return all(is_zero(raw, *header.bounds(name), header.tensors[name].dtype) for name in names)

    ups = [name for name in header.tensors if role_of(name) == "up"]
    if ups and are_zero(ups):
        raise refused(
            header.path, "all_zero", f"all {len(ups)} lora_up (lora_B) tensors are zero: the LoRA has learnt nothing"
        )
    weights = [name for name in header.tensors if role_of(name) != "alpha"]
    if weights and are_zero(weights):
        raise refused(header.path, "all_zero", f"all {len(weights)} weight tensors are zero")

"""The JSON header of a safetensors file, read against strict bounds.

The library's own loader accepts duplicate keys, names like `../../etc/x` and hundreds of thousands of empty tensors;
a file from a trainer needs none of these.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from shared.safetensors_file.records import Tensor
from shared.safetensors_file.refusals import refused, shown
from shared.safetensors_file.values import ITEMSIZE

MAX_HEADER_BYTES = 8 * 2**20
MAX_FILE_BYTES = 4 * 2**30  # twice the largest SDXL LoRA; the bytes are held in memory
MAX_MODEL_BYTES = 32 * 2**30  # of a base model, whose header alone is read: SDXL in float32 has 14 GB
MAX_TENSORS = 20_000
MAX_NAME_CHARACTERS = 512
MAX_DIMENSIONS = 8

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}


def parse_header(path: Path, text: bytes, max_bytes: int = MAX_FILE_BYTES) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors in data order, and the metadata.

    Args:
        path: the file, for messages.
        text: the whole JSON header, at most MAX_HEADER_BYTES.
        max_bytes: how large the file may be.
    Raises:
        RefusedCheckpointError: the header breaks a bound.
    """
    document = _load_json(path, text)
    metadata = _metadata(path, document.pop(_METADATA, {}))
    if not document:
        raise refused(path, "no_tensors", "holds no tensor; the trainer saved an empty model")
    if len(document) > MAX_TENSORS:
        raise refused(path, "too_many_tensors", f"holds {len(document)} tensors, more than {MAX_TENSORS}")
    tensors = {name: _tensor(path, name, entry, max_bytes) for name, entry in document.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end, item[0])))
    _require_contiguous(path, tensors)
    return tensors, metadata


def _load_json(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise refused(
            path, "header_json", f"the header starts with {text[:8]!r}, not with '{{'; not a safetensors file"
        )
    bounds = _JsonBounds(path)
    try:
        document = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=bounds.table,
            parse_int=bounds.integer,
            parse_float=bounds.no_number,
            parse_constant=bounds.no_number,
        )
    except RecursionError:
        raise refused(path, "header_json", "the header is nested too deeply; not written by a trainer") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError and the bounds on numbers
        raise refused(path, "header_json", f"the header is not acceptable JSON: {error}") from error
    assert isinstance(document, dict)  # it starts with "{"
    return document


class _JsonBounds:
    """Hooks of the JSON parser that end a hostile header's parsing early."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tables = 0
        self.integers = 0

    def table(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self.tables += 1
        # One table for each tensor, for the metadata and for the header itself; the widest has all but the last.
        if self.tables > MAX_TENSORS + 2 or len(pairs) > MAX_TENSORS + 1:
            raise refused(self.path, "too_many_tensors", f"the header has more than {MAX_TENSORS} entries")
        table = dict(pairs)
        if len(table) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise refused(self.path, "duplicate_key", f"the header has the key {shown(twice)} twice in one object")
        return table

    def integer(self, digits: str) -> int:
        self.integers += 1
        if self.integers > MAX_TENSORS * (MAX_DIMENSIONS + 2):
            raise ValueError("more numbers than shapes and offsets need")
        if len(digits) > 20:  # more than 2**64 needs; int() of a long text is quadratic
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    def no_number(self, text: str) -> NoReturn:
        raise ValueError(f"{text[:20]!r} where only integers stand")


def _metadata(path: Path, table: object) -> dict[str, str]:
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise refused(path, "metadata", f"{_METADATA} is not a flat table of strings")
    try:
        "".join((*table, *table.values())).encode("utf-8")
    except UnicodeEncodeError as error:
        raise refused(path, "metadata", f"{_METADATA} holds half a surrogate pair ({error.reason})") from error
    return table


def _tensor(path: Path, name: str, entry: object, max_bytes: int) -> Tensor:
    # Names never become paths here, but other programs read the same file.
    if not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable() or any(s in name for s in ("/", "\\", "..")):
        raise refused(
            path,
            "tensor_name",
            f"tensor name {shown(name)} will not do; 1 to {MAX_NAME_CHARACTERS} printable characters without "
            "'/', '\\' and '..' are accepted",
        )
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise refused(path, "tensor_entry", f"tensor {shown(name)} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise refused(
            path,
            "dtype",
            f"tensor {shown(name)} has dtype {reprlib.repr(dtype)}; one of {', '.join(ITEMSIZE)} is needed",
        )
    if not _are_bounded(shape, max_bytes) or len(shape) > MAX_DIMENSIONS:
        raise refused(
            path,
            "shape",
            f"tensor {shown(name)} has shape {reprlib.repr(shape)}; at most {MAX_DIMENSIONS} integers from 0 to "
            f"{max_bytes} are accepted",
        )
    if not _are_bounded(offsets, max_bytes) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refused(
            path,
            "offsets",
            f"tensor {shown(name)} has data_offsets {reprlib.repr(offsets)}; [start, end] with 0 <= start <= end <= "
            f"{max_bytes} is needed",
        )
    start, end = offsets
    if end - start != math.prod(shape) * ITEMSIZE[dtype]:
        raise refused(
            path,
            "size_mismatch",
            f"tensor {shown(name)} spans {end - start} bytes, but {dtype} {shape} needs "
            f"{math.prod(shape) * ITEMSIZE[dtype]}",
        )
    return Tensor(dtype, tuple(shape), start, end)


def _are_bounded(numbers: object, max_bytes: int) -> bool:
    """Say whether this is a list of integers (True and False are none) that a file can hold."""
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n <= max_bytes for n in numbers)


def _require_contiguous(path: Path, tensors: dict[str, Tensor]) -> None:
    first = next(iter(tensors))
    if tensors[first].start != 0:
        raise refused(path, "hole", f"the data before tensor {shown(first)} belongs to no tensor")
    for (name, tensor), (following, later) in pairwise(tensors.items()):
        if later.start < tensor.end:
            raise refused(path, "overlap", f"tensors {shown(name)} and {shown(following)} share bytes")
        if later.start > tensor.end:
            raise refused(
                path, "hole", f"{later.start - tensor.end} bytes before tensor {shown(following)} belong to no tensor"
            )

"""The stable code of every reason not to score a file, and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from shared.errors import IncompleteCheckpointError, RefusedCheckpointError

INCOMPLETE_CODES: Mapping[str, str] = MappingProxyType(
    {
        "incomplete": "the file is shorter than its header promises, or the header itself is cut",
        "changing": "the file changed while it was being read",
        "vanished": "the file is not there, or no longer there",
        "unreadable": "the system does not let us open or read the file",
    }
)
"""No verdict: look again later. Recorded as the reason why a checkpoint waits."""

REFUSED_CODES: Mapping[str, str] = MappingProxyType(
    {
        "outside_folder": "the file does not lie inside the trial's folder",
        "symlink": "the name is a symbolic link",
        "not_a_file": "a directory, FIFO, socket or device stands at the name",
        "too_large": "the file is, or promises to become, larger than the limit",
        "header_size": "the header is empty or longer than the limit",
        "header_json": "the header is not a JSON object in UTF-8 within the limits",
        "duplicate_key": "one JSON object of the header has the same key twice",
        "metadata": "__metadata__ is not a flat table of strings",
        "no_tensors": "the file holds no tensor",
        "too_many_tensors": "the file holds more tensors than the limit",
        "tensor_name": "a tensor's name is empty, too long, unprintable or looks like a path",
        "tensor_entry": "a tensor's entry is not exactly dtype, shape and data_offsets",
        "dtype": "a tensor's dtype is not one that can be loaded",
        "shape": "a tensor's shape is not a short list of bounded non-negative integers",
        "offsets": "a tensor's data_offsets are not two ordered bounded non-negative integers",
        "size_mismatch": "a tensor's data_offsets do not span shape x itemsize bytes",
        "overlap": "two tensors share bytes",
        "hole": "bytes between tensors belong to none",
        "trailing_bytes": "the file is longer than its header promises",
        "hash_mismatch": "the data is not what sshs_model_hash in the metadata says, or not stored as its writers do",
        "not_finite": "a tensor holds NaN or Inf",
        "all_zero": "the weights are zero, so the images would be the base model's",
        "not_a_lora": "no tensor has the name of a LoRA weight",
        "unknown_key": "some tensors have names that no known LoRA loader applies",
        "mixed_families": "kohya and diffusers names stand in one file",
        "half_pair": "a module lacks its down weight, its up weight or its alpha",
        "lora_dtype": "a LoRA weight is not a real floating-point tensor",
        "lora_shape": "a LoRA pair is neither two matrices nor a square convolution and its 1x1 convolution",
        "rank_mismatch": "a module's down and up weights have different ranks",
        "lora_alpha": "an alpha is not one positive number, or the metadata scales layers singly",
    }
)
"""A verdict on the bytes as they are: never scored, not tried again until the file changes."""

CODES: Mapping[str, str] = MappingProxyType({**INCOMPLETE_CODES, **REFUSED_CODES})


def incomplete(path: Path, code: str, reason: str) -> IncompleteCheckpointError:
    """Return the error for "look again later"."""
    assert code in INCOMPLETE_CODES, code
    return IncompleteCheckpointError(path, code, reason)


def refused(path: Path, code: str, reason: str) -> RefusedCheckpointError:
    """Return the error for "never as it is"."""
    assert code in REFUSED_CODES, code
    return RefusedCheckpointError(path, code, reason)


def shown(name: str) -> str:
    """Return a name from the file as it may appear in a message: escaped and short."""
    return repr(name) if len(name) <= 120 else f"{name[:100]!r}... ({len(name)} characters)"

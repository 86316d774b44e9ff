"""Is a weight file whole, and may it be scored? Answered with the standard library alone.

A safetensors file is 8 bytes of little-endian header length n, n bytes of JSON and the tensor data; it is complete if
and only if 8 + n + max(data_offsets) equals its size. Three questions, each cheaper than the next:

    read_header(path, inside)       the size rule and the strict bounds; reads the header only
    read_checkpoint(path, inside)   reads the bytes once, hashes them, refuses NaN, Inf and all-zero weights
    lora_modules(checkpoint)        the keys are pairs of a LoRA of a known family, with matching ranks

Each either returns or raises: IncompleteCheckpointError means "look again later" and is no verdict, a
RefusedCheckpointError is one. `CODES` lists every code either of them carries.

A verdict, good or bad, is about the bytes behind one `Stamp`. Some trainers write in place, under the final name, and
an overwritten file may for a moment look whole, too long or malformed; so a caller looks twice and acts, on
acceptance as on refusal, only when `is_stable(first.stamp, second.stamp)`; a changed stamp re-opens every verdict.

The file is never memory-mapped: truncating a mapped file kills the reader with SIGBUS.
"""

from shared.safetensors_file.header import MAX_FILE_BYTES, MAX_MODEL_BYTES
from shared.safetensors_file.lora import Family, LoraLayout, LoraModule, lora_modules, lora_ranks
from shared.safetensors_file.reading import read_checkpoint, read_header, stamp_of
from shared.safetensors_file.records import Checkpoint, Header, Stamp, Tensor, is_stable
from shared.safetensors_file.refusals import CODES, INCOMPLETE_CODES, REFUSED_CODES

__all__ = [
    "CODES",
    "INCOMPLETE_CODES",
    "MAX_FILE_BYTES",
    "MAX_MODEL_BYTES",
    "REFUSED_CODES",
    "Checkpoint",
    "Family",
    "Header",
    "LoraLayout",
    "LoraModule",
    "Stamp",
    "Tensor",
    "is_stable",
    "lora_modules",
    "lora_ranks",
    "read_checkpoint",
    "read_header",
    "stamp_of",
]

"""How long does the proof of a weight file take?

    python -m benchmarks.admission.safetensors_proof

Run from the repository's root; the files go to a temporary folder (TMPDIR chooses it). Prints, for fp16 LoRA files of
75 and 150 MB, the median of each step in milliseconds with the file in the page cache. Targets: header proof 10 ms,
whole check of 75 MB 500 ms.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from shared.safetensors_file import read_checkpoint, read_header
from shared.safetensors_file.values import is_finite

MODULES = 264  # of an SD 1.5 LoRA of kohya's, UNet and text encoder
REPEATS = 7


def finite_fp16(count: int) -> bytes:
    """Return random numbers below 2 in magnitude, so that every byte value occurs and none is NaN or Inf."""
    data = bytearray(os.urandom(2 * count))
    data[1::2] = data[1::2].translate(bytes(byte & 0xBF for byte in range(256)))
    return bytes(data)


def write_lora(path: Path, size: int) -> None:
    """Write an fp16 LoRA with kohya's names, about `size` bytes."""
    width = size // (MODULES * 2 * 2 * 64)
    header: dict[str, object] = {}
    end = 0
    for index in range(MODULES):
        for part, shape in (("lora_down.weight", [64, width]), ("lora_up.weight", [width, 64])):
            start, end = end, end + 2 * 64 * width
            header[f"lora_unet_block_{index}.{part}"] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    data = finite_fp16(end // 2)
    header["__metadata__"] = {"ss_epoch": "2", "sshs_model_hash": hashlib.sha256(data).hexdigest()}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def are_finite(raw: bytes, spans: list[tuple[int, int, str]]) -> bool:
    """Run the finite check over every (start, end, dtype)."""
    return all(is_finite(raw, *span) for span in spans)


def milliseconds(action: Callable[[], object]) -> float:
    """Return the median wall time of an action."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1000 * median(times)


def main() -> None:
    """Print one line per file size."""
    print(f"{'MB':>5} {'header proof':>13} {'read':>7} {'hash':>7} {'finite':>7} {'read_checkpoint':>16}   [ms]")
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in (75, 150):
            path = Path(folder) / "lora.safetensors"
            write_lora(path, megabytes * 10**6)
            checkpoint = read_checkpoint(path, path.parent)
            spans = [(*checkpoint.bounds(name), tensor.dtype) for name, tensor in checkpoint.tensors.items()]
            raw = checkpoint.raw
            header = milliseconds(partial(read_header, path, path.parent))
            read = milliseconds(path.read_bytes)
            digest = milliseconds(partial(hashlib.sha256, memoryview(raw)[checkpoint.data_start :]))
            finite = milliseconds(partial(are_finite, raw, spans))
            whole = milliseconds(partial(read_checkpoint, path, path.parent))
            print(f"{megabytes:5} {header:13.2f} {read:7.1f} {digest:7.1f} {finite:7.1f} {whole:16.1f}")


if __name__ == "__main__":
    main()

"""How long does the proof of a weight file take?

    python -m benchmarks.admission.safetensors_proof

Run from the repository's root; the files go to a temporary folder (TMPDIR chooses it). Prints, for fp16 LoRA files of
75 and 150 MB, the median of each step in milliseconds with the file in the page cache; the last three are admission
as a whole: of a file written just now, of the same with a look of SETTLE_S before, of one that has been still for long.
Targets: header proof 10 ms, whole check of 75 MB 500 ms, admission of a still file no longer than the check.
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

from evaluator_daemon.admission import LONG_AGO_S, SETTLE_S, FirstLook, admit
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


def admission_ms(path: Path, *, still_for_s: float = 0.0, seen_for_s: float | None = None) -> float:
    """Return the median wall time of admitting a file that was touched so long ago.

    Args:
        seen_for_s: since when a sweep has seen it as it is; None when none has.
    """
    times = []
    for _ in range(REPEATS):
        os.utime(path)
        time.sleep(still_for_s)
        status, now_s = path.stat(), time.monotonic()
        seen = (status.st_size, status.st_mtime_ns, status.st_ctime)
        first_look = None if seen_for_s is None else FirstLook(*seen, seen_s=now_s - seen_for_s)
        admit(path, path.parent, first_look=first_look)
        times.append(time.monotonic() - now_s)
    return 1000 * median(times)


def main() -> None:
    """Print one line per file size."""
    columns = ("header proof", "read", "hash", "finite", "read_checkpoint", "admit: new", "seen before", "still")
    print(f"{'MB':>5}  {'  '.join(columns)}   [ms]")
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in (75, 150):
            path = Path(folder) / "lora.safetensors"
            write_lora(path, megabytes * 10**6)
            checkpoint = read_checkpoint(path, path.parent)
            spans = [(*checkpoint.bounds(name), tensor.dtype) for name, tensor in checkpoint.tensors.items()]
            raw = checkpoint.raw
            figures = (
                milliseconds(partial(read_header, path, path.parent)),
                milliseconds(path.read_bytes),
                milliseconds(partial(hashlib.sha256, memoryview(raw)[checkpoint.data_start :])),
                milliseconds(partial(are_finite, raw, spans)),
                milliseconds(partial(read_checkpoint, path, path.parent)),
                admission_ms(path),
                admission_ms(path, seen_for_s=SETTLE_S),
                admission_ms(path, still_for_s=LONG_AGO_S + 0.1),
            )
            row = (f"{figure:{len(name)}.1f}" for name, figure in zip(columns, figures, strict=True))
            print(f"{megabytes:5}  {'  '.join(row)}")


if __name__ == "__main__":
    main()

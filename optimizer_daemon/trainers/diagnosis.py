"""Why a training failed, in one line that names the remedy."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

from shared.schemas import TrainerExit

_GPU_MEMORY = re.compile(r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
_HOST_MEMORY = re.compile(r"DefaultCPUAllocator|Cannot allocate memory|\bMemoryError\b")
_ERROR_PREFIX = "error: "


def memory_remedies(
    *,
    gpu: bool,
    batch_size: str = "batch_size in the data-set TOML",
    gradient_checkpointing: bool = False,
    network_dim: int | None = None,
) -> str:
    """Return what to do about a lack of memory, the cheapest first.

    Args:
        gpu: the GPU's memory ran out, not the host's.
        batch_size: where the batch size is set, with its line where one is known.
        gradient_checkpointing: it is on already.
        network_dim: the rank that did not fit.
    """
    remedies = [f"lower {batch_size}"]
    if not gradient_checkpointing:
        remedies.append("set gradient_checkpointing = true")
    remedies.append("use a smaller network_dim" + (f" than {network_dim}" if network_dim is not None else ""))
    remedies.append("pass --gpu-policy defer" if gpu else "close other programs")
    *first, last = remedies
    return f"{', '.join(first)}, or {last}"


def memory_that_ran_out(text: str) -> str | None:
    """Return "GPU" or "host" when `text`, a message or a log, says that this memory ran out; None otherwise."""
    if _GPU_MEMORY.search(text):
        return "GPU"
    return "host" if _HOST_MEMORY.search(text) else None


def explain(record: TrainerExit | None, last_lines: Sequence[str]) -> str:
    """Return one line for a training that failed; its own error line where it wrote one, else its last lines."""
    text = "\n".join(last_lines)
    own = [line.removeprefix(_ERROR_PREFIX) for line in re.split(r"[\r\n]", text) if line.startswith(_ERROR_PREFIX)]
    if own:
        return own[-1].strip()
    if memory := memory_that_ran_out(text):
        return f"out of {memory} memory: {memory_remedies(gpu=memory == 'GPU')}"
    quoted = " | ".join(line.strip() for line in last_lines if line.strip()) or "(nothing)"
    return f"{_ending(record)}; its last lines: {quoted}"


def _ending(record: TrainerExit | None) -> str:
    if record is None:
        return "the training and its supervisor were killed"
    if record.signal == signal.SIGKILL:
        return "the training was killed by SIGKILL, which the kernel sends when the host's memory is short (see dmesg)"
    if record.signal is not None:
        return f"the training was ended by {_signal_name(record.signal)}"
    return f"the training ended with exit status {record.exit_status}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

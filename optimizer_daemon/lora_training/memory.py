"""Running out of memory: how it shows, and what helps."""

from __future__ import annotations

import re
from typing import Literal

Memory = Literal["GPU", "host"]

_GPU = re.compile(
    r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|out of memory on the GPU"
)
_HOST = re.compile(r"DefaultCPUAllocator|Cannot allocate memory|\bMemoryError\b|out of memory on the host")


def memory_that_ran_out(text: str) -> Memory | None:
    """Return which memory `text`, a message or a log, says ran out; None when it says nothing of the kind."""
    if _GPU.search(text):
        return "GPU"
    return "host" if _HOST.search(text) else None


def out_of_memory(
    memory: Memory,
    *,
    batch_size: str = "batch_size in the data-set TOML",
    gradient_checkpointing: bool = False,
    network_dim: int | None = None,
    workers: int = 0,
) -> str:
    """Return the message for people, with what to do, the cheapest first.

    Args:
        memory: which one ran out.
        batch_size: where the batch size is set, with its line where one is known.
        gradient_checkpointing: it is on already.
        network_dim: the rank that did not fit.
        workers: processes that load pictures; each holds a copy of the data set's tables in the host's memory.
    """
    remedies = [f"lower {batch_size}"]
    if not gradient_checkpointing:
        remedies.append("set gradient_checkpointing = true")
    remedies.append("use a smaller network_dim" + (f" than {network_dim}" if network_dim is not None else ""))
    if memory == "host" and workers > 1:
        remedies.insert(0, f"set max_data_loader_n_workers = {min(4, workers // 2)} instead of {workers}")
    last = "pass --gpu-policy defer" if memory == "GPU" else "close other programs"
    return f"out of memory on the {memory}: {', '.join(remedies)}, or {last}"

"""Every way a training fails has its sentence: the cause, the value and the remedy."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from optimizer_daemon.trainers.diagnosis import explain
from shared.schemas import TrainerExit

REMEDIES = "lower batch_size in the data-set TOML, set gradient_checkpointing = true, use a smaller network_dim, or "
CRASH = "; mend what the traceback in its log names"


def ended(exit_status: int | None = None, signal: int | None = None, **known: object) -> TrainerExit:
    now = datetime(2025, 11, 15, tzinfo=UTC)
    fields = {"exit_status": exit_status, "signal": signal, "started": now, "ended": now, "seconds": 0.0, **known}
    return TrainerExit.model_validate({"command": ("train.sh", "-v"), "pid": 7, **fields})


TABLE = [
    ("its own error line", ended(2), ["running", "error: /d.toml: there is no [[datasets]] table; add one", "bye"],
     "/d.toml: there is no [[datasets]] table; add one"),
    ("GPU memory", ended(1), ["Traceback", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"],
     f"out of memory on the GPU: {REMEDIES}pass --gpu-policy defer"),
    ("host memory", ended(1), ["RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory"],
     f"out of memory on the host: {REMEDIES}close other programs"),
    ("the kernel's memory killer", ended(signal=9, oom_kills=1, peak_memory=7_623_567_974), ["steps: 1"],
     f"out of memory on the host: {REMEDIES}close other programs (killed by the kernel for want of memory, see dmesg; "
     "one of its processes had held 7.1 GiB)"),
    ("the same under a wrapper", ended(137, oom_kills=1), [],
     f"out of memory on the host: {REMEDIES}close other programs (killed by the kernel for want of memory, see dmesg)"),
    ("a full disk", ended(1), ["OSError: [Errno 28] No space left on device: 'x'", "exiting"],
     "the disk is full: OSError: [Errno 28] No space left on device: 'x'; free space, then start the study again"),
    ("SIGKILL of somebody", ended(signal=9, oom_kills=0), ["steps: 1"],
     "the training was killed by SIGKILL; look for who did it, such as a memory limit of the container or job"),
    ("a crash of a library", ended(signal=11), [], "the training crashed with SIGSEGV, a fault of a library or driver; "
     "update torch and the GPU driver, or try another optimizer"),
    ("a crash under a wrapper", ended(134), [], "the training crashed with SIGABRT, a fault of a library or driver; "
     "update torch and the GPU driver, or try another optimizer"),
    ("another signal", ended(signal=25), [], "the training was ended by SIGXFSZ; look for who sent it"),
    ("a signal without a name", ended(signal=40), [], "the training was ended by signal 40; look for who sent it"),
    ("a command that is not there", ended(127), ["supervise: 'train.sh' cannot be started: command not found"],
     "exit status 127: 'train.sh' cannot be started: command not found; install the program, or correct --trainer or "
     "its paths"),
    ("a command inside the command that is not there", ended(127), ["sh: 1: accelerate: not found"],
     "exit status 127: train.sh; install the program, or correct --trainer or its paths"),
    ("an exception", ended(1), ["Traceback (most recent call last):", "  File ...", "ValueError: 3 is no rank", "done"],
     f"the training crashed with ValueError: 3 is no rank (exit status 1){CRASH}"),
    ("an exception of a module", ended(1), ["torch._dynamo.exc.BackendCompilerError: backend failed"],
     f"the training crashed with torch._dynamo.exc.BackendCompilerError: backend failed (exit status 1){CRASH}"),
    ("an exception of one process of several", ended(1), ["[rank0]: RuntimeError: NCCL error"],
     f"the training crashed with RuntimeError: NCCL error (exit status 1){CRASH}"),
    ("nothing known", ended(7), ["a", " b ", ""], "the training ended with exit status 7; mend what the end of its log "
     "names"),
    ("no exit record", None, ["a"], "the training and its supervisor were killed; look for who did it, dmesg names the "
     "kernel's own kills"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "lines", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_failure_is_explained_in_one_sentence(record: TrainerExit | None, lines: list[str], expected: str):
    assert explain(record, lines) == expected


def test_every_sentence_names_a_remedy():
    assert [expected for *_, expected in TABLE if not any(mark in expected for mark in ("; ", ": lower "))] == []

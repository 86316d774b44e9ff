"""Why a training failed, in one sentence that names the cause, the value and the remedy."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Sequence

from optimizer_daemon.lifecycle import signal_of
from optimizer_daemon.lora_training.memory import Memory, memory_that_ran_out, out_of_memory
from shared.schemas import TrainerExit

_ERROR_PREFIX = "error: "
# The line that a Python traceback ends with, e.g. "torch.AcceleratorError: device lost"; "[rank0]: " may lead it.
_EXCEPTION = re.compile(r"^(?:\[\w+\]:? )?((?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b.*)")
_FULL_DISK = re.compile(r"No space left on device|Disk quota exceeded|Errno 28\b|Errno 122\b")
_NOT_STARTED = re.compile(r"^supervise: (.* cannot be started: .*)")
_CANNOT_START = (126, 127)  # as shells and our supervisor have it
_GIB = 2**30


def explain(
    record: TrainerExit | None, last_lines: Sequence[str], *, remedies: Callable[[Memory], str] = out_of_memory
) -> str:
    """Return one sentence for a training that failed; its own error line where it wrote one.

    Args:
        record: how it ended; None when its supervisor was killed.
        last_lines: the end of its log.
        remedies: says what helps when a memory ran out.
    """
    if own := [line.removeprefix(_ERROR_PREFIX) for line in last_lines if line.startswith(_ERROR_PREFIX)]:
        return own[-1].strip()
    if record is not None and signal_of(record) == signal.SIGKILL and record.oom_kills:
        peak = f"; one of its processes had held {record.peak_memory / _GIB:.1f} GiB" if record.peak_memory else ""
        return f"{remedies('host')} (killed by the kernel for want of memory, see dmesg{peak})"
    if memory := memory_that_ran_out("\n".join(last_lines)):
        return remedies(memory)
    if full := [line for line in last_lines if _FULL_DISK.search(line)]:
        return f"the disk is full: {full[-1].strip()}; free space, then start the study again"
    if record is None:
        return "the training and its supervisor were killed; look for who did it, dmesg names the kernel's own kills"
    return _ending(record, last_lines)


def _ending(record: TrainerExit, last_lines: Sequence[str]) -> str:
    number = signal_of(record)
    if number == signal.SIGKILL:
        return "the training was killed by SIGKILL; look for who did it, such as a memory limit of the container or job"
    if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE):
        return (
            f"the training crashed with {_signal_name(number)}, a fault of a library or driver; update torch and the "
            "GPU driver, or try another optimizer"
        )
    if number is not None:
        return f"the training was ended by {_signal_name(number)}; look for who sent it"
    if record.exit_status in _CANNOT_START:
        said = [found[1] for line in last_lines if (found := _NOT_STARTED.match(line))] or [record.command[0]]
        return f"exit status {record.exit_status}: {said[-1]}; install the program, or correct --trainer or its paths"
    if crash := [found[1] for line in last_lines if (found := _EXCEPTION.match(line))]:
        return (
            f"the training crashed with {crash[-1].strip()} (exit status {record.exit_status}); mend what the "
            "traceback in its log names"
        )
    return f"the training ended with exit status {record.exit_status}; mend what the end of its log names"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

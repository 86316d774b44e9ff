"""Why a training failed, in one line that names the remedy."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

from optimizer_daemon.lora_training.memory import memory_that_ran_out, out_of_memory
from shared.schemas import TrainerExit

_ERROR_PREFIX = "error: "


def explain(record: TrainerExit | None, last_lines: Sequence[str]) -> str:
    """Return one line for a training that failed; its own error line where it wrote one, else its last lines."""
    text = "\n".join(last_lines)
    own = [line.removeprefix(_ERROR_PREFIX) for line in re.split(r"[\r\n]", text) if line.startswith(_ERROR_PREFIX)]
    if own:
        return own[-1].strip()
    if memory := memory_that_ran_out(text):
        return out_of_memory(memory)
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

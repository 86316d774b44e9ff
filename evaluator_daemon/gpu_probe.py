"""What the GPUs are doing, by nvidia-smi."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from evaluator_daemon.overview import Gpu

NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=index,name,memory.used,memory.total,utilization.gpu",
    "--format=csv,noheader,nounits",
)
NVIDIA_SMI_TIMEOUT_S = 2.0
NVIDIA_SMI_PERIOD_S = 2.0
"""For how long an answer is good: it takes a while, and a window that is resized is drawn again and again."""
NVIDIA_SMI_PAUSE_S = 60.0
"""How long nvidia-smi is left alone after it failed or did not answer in time."""


class GpuProbe:
    """Asks nvidia-smi, where there is one; a driver that hangs is not asked again for a while."""

    def __init__(self, clock: Callable[[], float], command: tuple[str, ...]) -> None:
        self._clock = clock
        self._command = command
        self._not_before_s = clock()
        self._known: tuple[Gpu, ...] = ()

    def ask(self) -> tuple[Gpu, ...]:
        """Return every GPU; none where there is none, or nobody answers."""
        if self._clock() >= self._not_before_s:
            self._known, pause_s = self._asked()
            self._not_before_s = self._clock() + pause_s
        return self._known

    def _asked(self) -> tuple[tuple[Gpu, ...], float]:
        try:
            done = subprocess.run(
                self._command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
                timeout=NVIDIA_SMI_TIMEOUT_S, errors="replace",
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return (), NVIDIA_SMI_PAUSE_S
        return parse_gpus(done.stdout), NVIDIA_SMI_PERIOD_S


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Read the lines `NVIDIA_SMI` prints; what it does not know, such as [N/A], becomes None."""
    found = []
    for line in text.splitlines():
        index, *middle = [part.strip() for part in line.split(",")]
        if index.isdecimal() and len(middle) >= 4:  # a name may hold commas
            used, total, percent = (int(word) if word.isdecimal() else None for word in middle[-3:])
            found.append(Gpu(int(index), ", ".join(middle[:-3]), used, total, percent))
    return tuple(found)

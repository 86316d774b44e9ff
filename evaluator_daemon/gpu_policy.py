"""Whether a checkpoint may be rendered now, and when to look again. Decisions only: nothing here touches a GPU."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from evaluator_daemon.folder import file_stamp, read_or_none
from evaluator_daemon.job import policy_in, read_run
from shared.errors import ResourceError, UnreadableFileError
from shared.gpu_lease import GpuPolicy
from shared.layout import TRIAL_STATE, StudyLayout, TrialLayout
from shared.locks import FileLock
from shared.schemas import TERMINAL_STATES, EvaluationPlan, TrialState

POLICY_LOOK_S = 2.0
"""How late the end of a training is seen under `defer`; looking costs a few lock probes."""
QUEUE_PAUSE_S = 1.0
"""How long to leave the queue for another evaluator's turn to end."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 15.0
"""Between two looks at the memory, which cost next to nothing."""
REFUSALS_BEFORE_A_TRY = 20
"""After so many looks at a card on which nothing changes, some five minutes, the attempt tells more."""
TRIES_ON_A_FREE_CARD = 3
"""Memory that runs out so often, while others have little and always the same of it, will do so again."""

_MARGIN = 1.1  # of an estimate or a measurement: other programs breathe
_CROWDED = 0.9  # with less of the card's memory than this to ourselves, others had some of it
_MOST = 0.8  # of the card's memory: more than this is not waited for, a desktop or a CUDA context has the rest
_SAME = 0.02  # of the card's memory: others have as much as before
# Peak of one 512 x 512 picture in fp16, bytes per pixel: the VAE decodes one picture at a time in full size, the UNet
# works on the whole batch at once, doubled by the guidance. Only used until a peak has been measured.
_DECODING_PER_PIXEL = 2048
_DENOISING_PER_PIXEL = 384
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class DeviceMemory:
    """A card's memory as one process sees it, bytes.

    Args:
        free: what the driver would still give.
        ours: what this process has reserved, used or not.
        total: all of it.
    """

    free: int
    ours: int
    total: int

    @property
    def available(self) -> int:
        """What we could use if we needed everything anew."""
        return self.free + self.ours


def policy_of(study: StudyLayout, asked: GpuPolicy | None) -> GpuPolicy:
    """Return how trainings and evaluations share the device: as the study has it now, else as `asked`, else "share".

    run.json is looked at anew each time: the optimizer may be started again with another policy.
    """
    try:
        run = read_run(study)
    except UnreadableFileError:
        run = None
    return (run and policy_in(run)) or asked or "share"


def training_in_the_way(study: StudyLayout, policy: GpuPolicy) -> str | None:
    """Return the name of a trial whose trainer lives, where the policy has evaluations wait for it."""
    return None if policy == "share" else _trainings_of(study.root).find()


class _Trainings:
    """Who trains in a study, asked again and again: a trial that is over is probed once per trial_state.json."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._last: str | None = None
        self._over: dict[str, tuple[int, ...]] = {}  # by name, the stamp of the state file that says so

    def find(self) -> str | None:
        if self._last is not None and self._trains(self._last):
            return self._last
        try:
            # the newest first: it is the one in training
            names = sorted((name for name in os.listdir(self._root) if name.startswith("trial_")), reverse=True)  # noqa: PTH208
        except FileNotFoundError:
            names = []
        self._over = {name: self._over[name] for name in names if name in self._over}
        self._last = next((name for name in names if not self._is_over(name) and self._trains(name)), None)
        return self._last

    def _is_over(self, name: str) -> bool:
        return name in self._over and self._over[name] == file_stamp(f"{self._root}/{name}/{TRIAL_STATE}")

    def _trains(self, name: str) -> bool:
        trial = TrialLayout(self._root / name)
        stamp = file_stamp(trial.state)  # before the probe: whoever starts it again writes it anew
        try:
            if FileLock.is_held(trial.trainer_lock):
                return True
            state = read_or_none(trial.state, TrialState) if stamp else None
        except ResourceError:  # somebody else's folder, which the manager's sweep tells of
            return False
        if stamp and state is not None and state.state in TERMINAL_STATES:
            self._over[name] = stamp
        return False


@functools.lru_cache(maxsize=1)
def _trainings_of(root: Path) -> _Trainings:
    return _Trainings(root)


def picture_bytes(plan: EvaluationPlan) -> int:
    """Estimate what rendering the plan's largest batch takes beside the weights, bytes."""
    width = _BYTES[plan.dtype]
    largest = 0
    for batch in plan.batches(plan.batch_size):
        sample = plan.sample(batch[0])
        pixels = sample.width * sample.height
        largest = max(largest, pixels * width * (_DECODING_PER_PIXEL + _DENOISING_PER_PIXEL * len(batch)))
    return largest


@dataclass(frozen=True)
class Repeated:
    """How often in a row something happened while others had the same share of the card.

    Args:
        count: so often.
        available: see `DeviceMemory.available`; the first time.
    """

    count: int = 0
    available: int = 0

    def still(self, memory: DeviceMemory) -> int:
        """Return the count, 0 where others have another share by now."""
        return self.count if abs(memory.available - self.available) <= _SAME * memory.total else 0

    def once_more(self, memory: DeviceMemory) -> Repeated:
        """Return it with what happened just now."""
        count = self.still(memory)
        return Repeated(count + 1, self.available if count else memory.available)


def needed_bytes(weights: int, pictures: int, measured_peak: int | None) -> int:
    """Return how much must be available before the model is loaded or a checkpoint is taken up.

    Args:
        weights: of everything that is loaded, in the plan's number format.
        pictures: see `picture_bytes`.
        measured_peak: of the latest checkpoint; it replaces the estimate.
    """
    return int((measured_peak if measured_peak is not None else weights + pictures) * _MARGIN)


def lacks_memory(
    memory: DeviceMemory, needed: int, *, weights: int = 0, ran_out_with: int | None = None, refusals: int = 0
) -> str | None:
    """Say why the memory does not suffice now; None when it does, or when only the attempt can tell.

    The need is an estimate, or was measured when there was plenty. So nobody waits for more than a card ever gives
    beside a desktop, and where nothing changes for long it is tried.

    Args:
        weights: with less than this available the attempt would only disturb the others.
        ran_out_with: what was available when the memory last ran out; that much is too little.
        refusals: how often in a row this has been refused, others having the same share all that time.
    """
    wanted = min(needed, int(_MOST * memory.total))
    if ran_out_with is not None:
        wanted = max(wanted, int(ran_out_with * _MARGIN))
    if memory.available >= wanted or has_it_to_ourselves(memory):
        return None
    if refusals >= REFUSALS_BEFORE_A_TRY and memory.available >= weights:
        return None
    return f"{memory.available / 2**30:.1f} GiB of its memory are free, about {wanted / 2**30:.1f} GiB are needed"


def is_too_small(memory: DeviceMemory, ran_out: Repeated) -> bool:
    """Whether the memory that ran out will not suffice later either, so that waiting is no use."""
    if has_it_to_ourselves(memory):
        return True
    return memory.available >= _MOST * memory.total and ran_out.count >= TRIES_ON_A_FREE_CARD


def has_it_to_ourselves(memory: DeviceMemory) -> bool:
    """Whether nobody else has a notable part of the card, so that waiting would not help."""
    return memory.available >= _CROWDED * memory.total


def pause_s(deferrals: int) -> float:
    """How long to wait for memory after the n-th deferral in a row, n counted from 0: 5, 10, 15, 15, ... s."""
    return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(deferrals, 10)))

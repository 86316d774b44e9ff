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
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0

_MARGIN = 1.1  # of an estimate or a measurement: other programs breathe
_CROWDED = 0.9  # with less of the card's memory than this to ourselves, others had some of it
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


def needed_bytes(weights: int, pictures: int, measured_peak: int | None, ran_out_with: int | None) -> int:
    """Return how much must be available before the model is loaded or a checkpoint is taken up.

    Args:
        weights: of everything that is loaded, in the plan's number format.
        pictures: see `picture_bytes`.
        measured_peak: of the latest checkpoint; it replaces the estimate.
        ran_out_with: what was available when the memory last ran out; that much is too little.
    """
    needed = measured_peak if measured_peak is not None else weights + pictures
    return int(max(needed, ran_out_with or 0) * _MARGIN)


def lacks_memory(memory: DeviceMemory, needed: int) -> str | None:
    """Say why the memory does not suffice now; None when it does.

    What a card cannot give even when it is empty is tried all the same where it has the card to itself: the need is an
    estimate, and only the attempt tells.
    """
    if memory.available >= needed or has_it_to_ourselves(memory):
        return None
    return f"{memory.available / 2**30:.1f} GiB of its memory are free, about {needed / 2**30:.1f} GiB are needed"


def has_it_to_ourselves(memory: DeviceMemory) -> bool:
    """Whether nobody else has a notable part of the card, so that waiting would not help."""
    return memory.available >= _CROWDED * memory.total


def pause_s(deferrals: int) -> float:
    """How long to wait after the n-th deferral in a row, n counted from 0: 5, 10, 20, ... 300 s."""
    return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(deferrals, 10)))

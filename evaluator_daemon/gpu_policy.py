"""Whether a checkpoint may be rendered now, and when to look again. Decisions only: nothing here touches a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from evaluator_daemon.folder import read_or_none
from evaluator_daemon.job import policy_in
from shared.gpu_lease import GpuPolicy
from shared.layout import StudyLayout
from shared.locks import FileLock
from shared.schemas import EvaluationPlan, Run

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

    run.json is read anew each time: the optimizer may be started again with another policy.
    """
    run = read_or_none(study.run, Run)
    return (run and policy_in(run)) or asked or "share"


def training_in_the_way(study: StudyLayout, policy: GpuPolicy) -> str | None:
    """Return the name of a trial whose trainer lives, where the policy has evaluations wait for it."""
    if policy == "share":
        return None
    return next((trial.name for trial in study.list_trials() if FileLock.is_held(trial.trainer_lock)), None)


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

"""Where trainings run: one slot for each GPU, or several on one device, and whether one more may begin.

A slot is held from a training's start to its end; scoring holds none. Decisions only, over what is known of the trials;
`slots_of` alone asks the driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from optimizer_daemon.settings import OptimizerSettings
from shared.devices import cuda_device_count, gpu_model, gpu_uuid, require_device, resolve_device, why_no_cuda
from shared.errors import SettingsError
from shared.gpu_lease import GpuPolicy
from shared.schemas import TrialStateName

UNSCORED_PER_SLOT = 2  # trainings that ended and wait for their score

_WAITS_FOR_SCORES: tuple[TrialStateName, ...] = ("trained", "pruned")
_WANTS_A_SLOT: tuple[TrialStateName, ...] = ("drawn", "training", "interrupted")


@dataclass(frozen=True)
class Slot:
    """A place for one training.

    Args:
        device: "cpu", "cuda" or "cuda:N" as this process counts.
        gpu: UUID of the card; None on a CPU.
        model: what kind of card it is.
    """

    device: str
    gpu: str | None
    model: str | None = None


@dataclass(frozen=True)
class Standing:
    """How a trial that is not over stands to the slots.

    Args:
        state: as in trial_state.json.
        gpu: the card it has or had; None on a CPU.
        holds_slot: its training runs, or is about to start under leases it has.
        prepares: its training runs and has taken no step yet.
    """

    state: TrialStateName
    gpu: str | None = None
    holds_slot: bool = False
    prepares: bool = False


class Slots:
    """The slots of one run.

    Args:
        slots: at least one; several may name one card.
        policy: how trainings and evaluations share a card.
        apart: no training starts while another one has taken no step yet, for both would write the same files.
    """

    def __init__(self, slots: Sequence[Slot], policy: GpuPolicy, *, apart: bool = False) -> None:
        self._slots = tuple(slots)
        self._policy = policy
        self._apart = apart

    @classmethod
    def of(cls, settings: OptimizerSettings, *, apart: bool = False) -> Self:
        """Return what the settings ask for; errors as `slots_of`."""
        return cls(slots_of(settings), settings.gpu_policy, apart=apart)

    def __len__(self) -> int:
        return len(self._slots)

    def may_draw(self, trials: Sequence[Standing]) -> bool:
        """Tell whether there is a slot for one trial more, and not too much left to score."""
        unscored = sum(trial.state in _WAITS_FOR_SCORES for trial in trials)
        most = 0 if self._policy == "defer" else UNSCORED_PER_SLOT * len(self)
        return sum(trial.state in _WANTS_A_SLOT for trial in trials) < len(self) and unscored <= most

    def free_for_training(self, others: Sequence[Standing]) -> list[str | None]:
        """Return the cards on which a trial's training may start now, None for the CPU; empty where it has to wait.

        Args:
            others: all trials but the one.
        """
        if self._policy == "defer" and any(trial.state == "trained" for trial in others):
            return []  # their scores come first
        if self._apart and any(trial.prepares for trial in others):
            return []
        return [slot.gpu for slot in self._free(others)]

    def scoring_device(self, trials: Sequence[Standing]) -> str:
        """Return the device to score on: one where nobody trains, if there is one.

        Always the same kind of card: another one rounds otherwise, so that its scores could not be compared.
        """
        first = self._slots[0]
        return next((slot for slot in self._free(trials) if slot.model == first.model), first).device

    def _free(self, trials: Sequence[Standing]) -> list[Slot]:
        """Return the slots nobody holds; none while more trainings run than there are slots now."""
        left, taken = list(self._slots), [trial.gpu for trial in trials if trial.holds_slot]
        for gpu in taken:
            same = next((slot for slot in left if slot.gpu == gpu), None)
            if same is not None:
                left.remove(same)
        return left[: max(0, len(self) - len(taken))]


def slot_count(settings: OptimizerSettings) -> int:
    """Return how many trainings run at once, without a look at the machine.

    Raises:
        SettingsError: --gpus, --jobs, --device and --gpu-policy do not go together.
    """
    if settings.gpus is None:
        return settings.jobs or 1
    numbers = _gpu_numbers(settings.gpus)
    if settings.jobs is not None:
        raise SettingsError("--jobs", settings.jobs, f"leave it out: --gpus {settings.gpus} trains once on each GPU")
    if settings.device not in ("auto", "cuda"):
        raise SettingsError("--device", settings.device, f"leave it out: --gpus {settings.gpus} names the devices")
    return len(numbers)


def slots_of(settings: OptimizerSettings) -> list[Slot]:
    """Return the slots, each with the card behind it.

    Raises:
        SettingsError: the settings do not go together, or name a GPU that is not there.
        ResourceError: the device of --device is not there.
    """
    count = slot_count(settings)
    if settings.gpus is None:
        require_device(settings.device)
        device = resolve_device(settings.device)
        gpu = gpu_uuid(device)
        if count > 1 and gpu is not None and settings.gpu_policy == "defer":
            raise SettingsError(
                "--jobs",
                count,
                "under --gpu-policy defer a training has its GPU to itself; use share, or a GPU for each with --gpus",
            )
        return [Slot(device, gpu, gpu_model(device))] * count
    if why := why_no_cuda():
        raise SettingsError("--gpus", settings.gpus, f"{why}; repair that, or use --device cpu and --jobs")
    numbers, known = _gpu_numbers(settings.gpus), cuda_device_count()
    if max(numbers) >= known:
        raise SettingsError("--gpus", settings.gpus, f"there are only {known} GPUs, counted from 0; name others")
    devices = [f"cuda:{number}" for number in numbers]
    return [Slot(device, gpu_uuid(device), gpu_model(device)) for device in devices]


def _gpu_numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise SettingsError("--gpus", text, "write the GPUs' numbers with commas between, such as 0,1")
    numbers = [int(word) for word in words]
    for place, number in enumerate(numbers):
        if number in numbers[:place]:
            raise SettingsError("--gpus", text, f"GPU {number} is named twice; name each once")
    return numbers

"""The device an evaluator renders on: whose turn it is there, and whether its memory suffices.

All that needs CUDA is in this module and small; what follows from it is decided in gpu_policy.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path

from evaluator_daemon.gpu_policy import (
    DeviceMemory,
    has_it_to_ourselves,
    lacks_memory,
    needed_bytes,
    picture_bytes,
    policy_of,
    training_in_the_way,
)
from evaluator_daemon.job import Job
from shared.devices import gpu_uuid
from shared.errors import CheckpointError, DeviceBusyError, LabError, ResourceError
from shared.gpu_lease import GpuLease
from shared.layout import StudyLayout
from shared.safetensors_file import read_header

LEASE_PATIENCE_S = 10.0
"""How long one look at the queue waits for another evaluator's turn to end."""
_LEASE_LOOK_S = 1.0


class DeviceGate:
    """Lets one evaluator at a time render on a GPU; on a CPU only the policy counts.

    Args:
        job: the study, the plan and the device.
        give_back: frees everything this process has on the device; called before it waits for long.
        stop_if_asked: raises Stopped when this process is to end; called while waiting.
    """

    def __init__(self, job: Job, give_back: Callable[[], None], stop_if_asked: Callable[[], None]) -> None:
        self._job = job
        self._study = StudyLayout(job.root)
        self._give_back = give_back
        self._stop_if_asked = stop_if_asked
        self._lease: GpuLease | None = None
        self._weights: int | None = None
        self._measured_peak: int | None = None
        self._ran_out_with: int | None = None

    @property
    def is_gpu(self) -> bool:
        return self._job.device != "cpu"

    def held_back(self) -> str | None:
        """Say which training the policy has us wait for; None when there is none."""
        training = training_in_the_way(self._study, policy_of(self._study, self._job.gpu_policy))
        return training and f"--gpu-policy defer: {training} is training"

    def enter(self) -> None:
        """Begin a turn.

        Raises:
            DeviceBusyError: it is somebody else's turn, or others have the memory; nothing is held then.
            ResourceError: the device is not there.
        """
        if why := self.held_back():
            raise DeviceBusyError(why)
        if not self.is_gpu:
            return
        lease = self._lease or GpuLease(str(gpu_uuid(self._job.device)), "evaluator")
        self._acquire(lease)
        self._lease = lease
        try:
            self._require_memory()
        except BaseException:
            lease.release()
            raise

    def leave(self) -> None:
        """End the turn."""
        if self._lease is not None:
            self._lease.release()

    def note_success(self) -> None:
        """Remember how much memory the checkpoint really took."""
        if self.is_gpu:
            self._measured_peak, self._ran_out_with = _peak(self._job.device), None

    def after_running_out(self, reason: str) -> LabError:
        """Return what an evaluation that ran out of memory ends with; call it when everything has been given back."""
        if not self.is_gpu:
            return ResourceError(f"{self._job.device}: {reason}")
        memory = device_memory(self._job.device)
        if has_it_to_ourselves(memory):
            return ResourceError(reason)
        self._ran_out_with = memory.available
        return DeviceBusyError(f"{reason}; others have {(memory.total - memory.available) / 2**30:.1f} GiB of it")

    def _acquire(self, lease: GpuLease) -> None:
        """Wait a while for the lease, without our model in the others' way."""
        if _got(lease, 0.0):
            return
        self._give_back()
        for _ in range(math.ceil(LEASE_PATIENCE_S / _LEASE_LOOK_S) - 1):
            self._stop_if_asked()
            if _got(lease, _LEASE_LOOK_S):
                return
        lease.acquire(timeout_s=_LEASE_LOOK_S)

    def _require_memory(self) -> None:
        if why := lacks_memory(device_memory(self._job.device), self._needed()):
            raise DeviceBusyError(f"{self._job.device}: {why}")
        _forget_peak(self._job.device)

    def _needed(self) -> int:
        if self._weights is None:
            folders = [folder for folder in (self._job.base_model, self._job.clip_model) if folder is not None]
            self._weights = sum(weight_bytes(folder, self._job.plan.dtype) for folder in folders)
        pictures = picture_bytes(self._job.plan)
        return needed_bytes(self._weights, pictures, self._measured_peak, self._ran_out_with)


def _got(lease: GpuLease, timeout_s: float) -> bool:
    try:
        lease.acquire(timeout_s)
    except DeviceBusyError:
        return False
    return True


def weight_bytes(folder: Path, dtype: str) -> int:
    """Return what a model folder's weights take in memory once they have this number format, bytes."""
    element = 4 if dtype == "float32" else 2
    total = 0
    for file in folder.rglob("*.safetensors"):
        real = file.resolve()  # a download cache links to the content
        try:
            tensors = read_header(real, real.parent).tensors.values()
        except CheckpointError:
            total += real.stat().st_size
        else:
            total += sum(math.prod(tensor.shape) * element for tensor in tensors)
    return total or sum(file.stat().st_size for file in folder.rglob("*.bin"))


def free_everything(device: str) -> None:
    """Return to the driver what no living tensor needs; the caller has dropped its models."""
    gc.collect()  # models hold themselves in cycles
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not get memory on the device."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def device_memory(device: str) -> DeviceMemory:
    """Ask the driver about a CUDA device."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(free, torch.cuda.memory_reserved(device), total)


def _forget_peak(device: str) -> None:
    import torch

    torch.cuda.reset_peak_memory_stats(device)


def _peak(device: str) -> int:
    import torch

    return torch.cuda.max_memory_reserved(device)

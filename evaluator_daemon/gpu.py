"""The device an evaluator renders on: whose turn it is there, and whether its memory suffices.

All that needs CUDA is in this module and small; what follows from it is decided in gpu_policy.
"""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

from evaluator_daemon.gpu_policy import (
    DeviceMemory,
    Repeated,
    is_too_small,
    lacks_memory,
    needed_bytes,
    picture_bytes,
    policy_of,
    training_in_the_way,
)
from evaluator_daemon.job import Job
from evaluator_daemon.renderers.base import is_out_of_memory
from shared.devices import gpu_uuid
from shared.errors import CheckpointError, DeviceBusyError, LabError, ResourceError
from shared.gpu_lease import GpuLease
from shared.layout import StudyLayout
from shared.metric_names import NEEDS, is_random_backbone
from shared.model_folders import single_file_of
from shared.safetensors_file import read_header
from shared.scoring_presets import metrics_of

LEASE_PATIENCE_S = 10.0
"""How long one look at the queue waits for another evaluator's turn to end."""
KEEP_MODEL_S = 60.0
"""How long a model stays loaded beside another evaluator's turn, where there is memory for both."""
_LEASE_LOOK_S = 1.0
_RENDERING = ("unet", "vae", "text_encoder", "text_encoder_2")
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?\.(safetensors|bin)")
"""What loaders read: neither fp16 twins nor other variants, which have a word more in their names."""


class DeviceGate:
    """Lets one evaluator at a time render on a GPU; on a CPU only the policy counts.

    Args:
        job: the study, the plan and the device.
        give_back: frees everything this process has on the device; called when it is in the others' way.
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
        self._refused = Repeated()
        self._ran_out = Repeated()
        self._queued_since: float | None = None  # seconds of the monotonic clock
        self._has_entered = False  # so that asking the driver costs no context of its own

    @property
    def queues(self) -> bool:
        """Whether the latest turn was refused because it is another evaluator's, not for lack of memory."""
        return self._queued_since is not None

    @property
    def is_gpu(self) -> bool:
        return self._job.device != "cpu"

    def held_back(self) -> str | None:
        """Say which training the policy has us wait for; None when there is none."""
        training = training_in_the_way(self._study, policy_of(self._study, self._job.gpu_policy))
        return training and f"--gpu-policy defer: {training} is training"

    def may_keep_model(self) -> bool:
        """Whether a model that is not needed for now is in nobody's way."""
        if not self.is_gpu:
            return True
        return policy_of(self._study, self._job.gpu_policy) == "share" and not self._is_short()

    def enter(self) -> None:
        """Begin a turn.

        Raises:
            DeviceBusyError: it is somebody else's turn, or others have the memory, for which ours has been given back.
            ResourceError: the device is not there.
        """
        if why := self.held_back():
            self._queued_since = None
            self._give_back()
            raise DeviceBusyError(why)
        if not self.is_gpu:
            return
        lease = self._lease or GpuLease(str(gpu_uuid(self._job.device)), "evaluator")
        self._acquire(lease)
        self._lease = lease
        try:
            self._require_memory()
        except BaseException as error:
            if isinstance(error, DeviceBusyError):
                self._give_back()
            lease.release()
            raise
        self._has_entered = True

    def leave(self) -> None:
        """End the turn."""
        if self._lease is not None:
            self._lease.release()

    def note_success(self) -> None:
        """Remember how much memory the checkpoint really took."""
        if self.is_gpu:
            self._measured_peak = _peak(self._job.device)
            self._refused = self._ran_out = Repeated()

    def after_running_out(self, reason: str) -> LabError:
        """Return what an evaluation that ran out of memory ends with; call it when everything has been given back."""
        if not self.is_gpu:
            return ResourceError(f"{self._job.device}: {reason}; free memory or use a smaller --num-samples")
        try:
            memory = self._memory()
        except DeviceBusyError as error:
            return error
        self._refused, self._ran_out = Repeated(), self._ran_out.once_more(memory)
        if is_too_small(memory, self._ran_out):
            return ResourceError(reason)
        return DeviceBusyError(f"{reason}; others have {(memory.total - memory.available) / 2**30:.1f} GiB of it")

    def _acquire(self, lease: GpuLease) -> None:
        """Wait a while for the lease; our model stays loaded at first, as long as it is not in the others' way."""
        if _got(lease, 0.0):
            self._queued_since = None
            return
        if self._queued_since is None:
            self._queued_since = time.monotonic()
        for _ in range(math.ceil(LEASE_PATIENCE_S / _LEASE_LOOK_S)):
            if time.monotonic() - self._queued_since >= KEEP_MODEL_S or self._is_short():
                self._give_back()
            self._stop_if_asked()
            if _got(lease, _LEASE_LOOK_S):
                self._queued_since = None
                return
        lease.acquire()

    def _is_short(self) -> bool:
        """Whether another evaluator like this one, or as much of a training, would not find room beside our model."""
        if not self._has_entered:
            return False
        try:
            return self._memory().free < self._needed()
        except DeviceBusyError:
            return True

    def _memory(self) -> DeviceMemory:
        try:
            return device_memory(self._job.device)
        except RuntimeError as error:  # on a full card there is no room for the question
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            raise DeviceBusyError(f"{self._job.device}: {reason}; others have all of its memory") from error

    def _require_memory(self) -> None:
        memory, needed = self._memory(), self._needed()
        assert self._weights is not None
        why = lacks_memory(
            memory,
            needed,
            weights=self._weights,
            ran_out_with=self._ran_out.available if self._ran_out.count else None,
            refusals=self._refused.still(memory),
        )
        if why:
            self._refused = self._refused.once_more(memory)
            raise DeviceBusyError(f"{self._job.device}: {why}")
        _forget_peak(self._job.device)

    def _needed(self) -> int:
        if self._weights is None:
            self._weights = loaded_bytes(self._job)
        return needed_bytes(self._weights, picture_bytes(self._job.plan), self._measured_peak)


def _got(lease: GpuLease, timeout_s: float) -> bool:
    try:
        lease.acquire(timeout_s)
    except DeviceBusyError:
        return False
    return True


def loaded_bytes(job: Job) -> int:
    """Return what the parts that render, and the networks that the plan's metrics use, take in memory, bytes."""
    single = single_file_of(job.base_model)
    if single is None:
        total = sum(weight_bytes(job.base_model / part, job.plan.dtype) for part in _RENDERING)
    else:
        shapes = [shape for part in single.shapes.values() for shape in part.values()]
        total = sum(map(math.prod, shapes)) * _element_bytes(job.plan.dtype)
    needs = {need for name in metrics_of(job.plan) for need in NEEDS[name]}
    if job.clip_model is not None and ("clip" in needs or ("clip or dino" in needs and job.dino_model is None)):
        total += weight_bytes(job.clip_model, "float32")
    if job.dino_model is not None and needs & {"dino", "clip or dino"}:
        total += weight_bytes(job.dino_model, "float32")
    backbone = job.lpips_weights
    if backbone is not None and "lpips" in needs and not is_random_backbone(backbone) and backbone.is_file():
        total += backbone.stat().st_size
    return total


def weight_bytes(folder: Path, dtype: str) -> int:
    """Return what the weights of one model's folder take in memory once they have this number format, bytes.

    One set of weights counts, as for the loaders: whole or in shards, *.safetensors before *.bin.

    Returns:
        0 for a folder that is not there or holds no weights.
    """
    if not folder.is_dir():
        return 0
    element = _element_bytes(dtype)
    sets: dict[str, list[Path]] = {"safetensors": [], "bin": []}
    for file in folder.iterdir():
        if found := _WEIGHTS.fullmatch(file.name):
            sets[found[1]].append(file)
    total = 0
    for file in sets["safetensors"]:
        real = file.resolve()  # a download cache links to the content
        try:
            tensors = read_header(real, real.parent).tensors.values()
        except CheckpointError:
            total += real.stat().st_size
        else:
            total += sum(math.prod(tensor.shape) * element for tensor in tensors)
    return total or sum(file.stat().st_size for file in sets["bin"])


def _element_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def free_everything(device: str) -> None:
    """Return to the driver what no living tensor needs; the caller has dropped its models."""
    gc.collect()  # models hold themselves in cycles
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()


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

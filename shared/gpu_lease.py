"""Who may use one physical GPU now: leases between trainers and evaluators, across studies of one user.

A lease is made of flocks in `$XDG_RUNTIME_DIR/lora-tuner/`, so it ends with its last holder:

                          another evaluator   sharing trainer   exclusive trainer
    evaluator                  waits              beside              waits
    sharing trainer            beside             beside              waits
    exclusive trainer          waits              waits               waits

Sharing trainers belong to `--gpu-policy share`, exclusive ones to `defer`.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from shared.errors import DeviceBusyError, ResourceError
from shared.locks import FileLock

GpuUse = Literal["evaluator", "sharing trainer", "exclusive trainer"]
GpuPolicy = Literal["share", "defer"]
"""share: evaluations run beside the training when the memory allows; defer: they wait until it ends."""

_TURN = ".evaluator.lock"  # held by the one evaluator whose turn it is


class GpuLease:
    """The right to use one GPU; also a context manager that acquires, without waiting, on entry.

    Args:
        gpu_uuid: as the driver names the card, e.g. "GPU-8f2c6a31-...".
        use: what for, see the table above.
        inheritable: a tree of children keeps the lease alive; pass it `filenos()`.
    """

    def __init__(self, gpu_uuid: str, use: GpuUse, *, inheritable: bool = False) -> None:
        if not re.fullmatch(r"[\w-]+", gpu_uuid):
            raise ValueError(f"{gpu_uuid!r} is no GPU UUID; pass it as nvidia-smi -L prints it")
        folder = lease_folder()
        self.gpu_uuid = gpu_uuid
        card = FileLock(folder / f"gpu-{gpu_uuid}.lock", shared=use != "exclusive trainer", inheritable=inheritable)
        turn = FileLock(folder / f"gpu-{gpu_uuid}{_TURN}", inheritable=inheritable)
        self._locks = [turn, card] if use == "evaluator" else [card]

    def acquire(self, timeout_s: float = 0.0) -> Self:
        """Take the lease within `timeout_s` seconds of the monotonic clock.

        Raises:
            DeviceBusyError: others used the GPU all that time; nothing is held then.
        """
        deadline = time.monotonic() + timeout_s
        for lock in self._locks:
            if not lock.try_acquire(deadline - time.monotonic()):
                self.release()
                raise DeviceBusyError(
                    f"GPU {self.gpu_uuid} is in use by {lock.holder(lock.path)}; waited {timeout_s:g} s, "
                    "try again later or use another GPU"
                )
        return self

    def release(self) -> None:
        """Give the lease back; harmless when it is not held."""
        for lock in reversed(self._locks):
            lock.release()

    def filenos(self) -> list[int]:
        """The descriptors that carry the lease, to pass to children."""
        return [lock.fileno() for lock in self._locks]

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def gpus_of_evaluators() -> set[str]:
    """UUIDs of the GPUs that evaluators of this user hold now; none on a machine where no lease was ever taken."""
    folder = _lease_path()
    if not folder.is_dir() or folder.stat().st_uid != os.getuid():
        return set()
    named = {path.name.removeprefix("gpu-").removesuffix(_TURN): path for path in folder.glob(f"gpu-*{_TURN}")}
    return {gpu_uuid for gpu_uuid, path in named.items() if FileLock.is_held(path)}


def lease_folder() -> Path:
    """The folder all processes of this user agree on, made when missing.

    `$XDG_RUNTIME_DIR`, else what logind would set it to (cron and plain services lack the variable but must meet the
    others), else `/tmp` whatever TMPDIR says.

    Raises:
        ResourceError: somebody else owns the folder.
    """
    folder = _lease_path()
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
        raise ResourceError(f"{folder} belongs to somebody else; remove it or set XDG_RUNTIME_DIR to a folder of yours")
    return folder


def _lease_path() -> Path:
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")
    owned = os.access(runtime, os.W_OK | os.X_OK) and runtime.stat().st_uid == os.getuid()
    return runtime / "lora-tuner" if owned else Path(f"/tmp/lora-tuner-{os.getuid()}")

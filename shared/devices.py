"""Which device computes, found out without importing torch."""

from __future__ import annotations

import ctypes
import uuid
from importlib import metadata
from typing import Literal

from shared.errors import ResourceError


def require_device(device: str) -> None:
    """Refuse a CUDA device that is not there.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
    Raises:
        ResourceError: the driver shows no such device, or torch is a CPU build.
    """
    if not device.startswith("cuda"):
        return
    if why := why_no_cuda():
        raise ResourceError(f"--device {device}: {why}; repair that, or use --device cpu")
    if int(device.partition(":")[2] or 0) >= (count := cuda_device_count()):
        raise ResourceError(f"--device {device}: there are only {count} CUDA devices, counted from 0; name another")


def resolve_device(device: str) -> str:
    """Turn "auto" into "cuda" where a CUDA driver shows a device and torch is no CPU build, else "cpu"."""
    if device != "auto":
        return device
    return "cpu" if why_no_cuda() else "cuda"


def why_no_cuda() -> str | None:
    """Say why nothing can compute on CUDA here; None where something can."""
    if cuda_device_count() == 0:
        return "the CUDA driver shows no device"
    return "the installed torch is a CPU build" if _torch_is_cpu_build() else None


def cuda_device_count() -> int:
    """Ask the CUDA driver itself, which takes milliseconds, makes no context and heeds CUDA_VISIBLE_DEVICES."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def gpu_uuid(device: str) -> str | None:
    """Return the name of the card behind "cuda" or "cuda:N", as `nvidia-smi -L` prints it; None on a CPU.

    Raises:
        ResourceError: the driver does not tell.
    """
    if not device.startswith("cuda"):
        return None
    content, name = _card(device)
    # Of a card that is cut into instances the driver names the instance.
    return f"{'MIG' if ' MIG ' in name else 'GPU'}-{uuid.UUID(bytes=content)}"


def gpu_model(device: str) -> str | None:
    """Return what kind of card is behind "cuda" or "cuda:N", such as "NVIDIA H200"; None on a CPU.

    Raises:
        ResourceError: the driver does not tell.
    """
    return _card(device)[1] if device.startswith("cuda") else None


def _card(device: str) -> tuple[bytes, str]:
    """Return the 16 bytes that identify a card, and its kind."""
    require_device(device)
    driver = ctypes.CDLL("libcuda.so.1")
    handle, content, name = ctypes.c_int(0), (ctypes.c_ubyte * 16)(), ctypes.create_string_buffer(256)
    if (
        driver.cuDeviceGet(ctypes.byref(handle), int(device.partition(":")[2] or 0))
        or driver.cuDeviceGetUuid_v2(ctypes.byref(content), handle)
        or driver.cuDeviceGetName(name, len(name), handle)
    ):
        raise ResourceError(f"--device {device}: the driver does not name the card; repair it, or use --device cpu")
    return bytes(content), name.value.decode(errors="replace")


def default_dtype(device: str) -> Literal["float32", "float16"]:
    """The number format to render in: float16 on CUDA, float32 on a CPU."""
    return "float16" if resolve_device(device).startswith("cuda") else "float32"


def _torch_is_cpu_build() -> bool:
    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return True

"""What every renderer offers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from shared.safetensors_file import Checkpoint, LoraLayout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OnStep = Callable[[], None]
"""Called after every sampling step; may raise to stop the rendering."""


@dataclass(frozen=True)
class Rendering:
    """Pictures of one model on the plan's whole grid.

    Args:
        pictures: sample i is (height, width, 3) uint8 sRGB.
        batch_size: how many were rendered at once; below the plan's when memory ran out.
    """

    pictures: list[NDArray[np.uint8]]
    batch_size: int


_OUT_OF_MEMORY = ("out of memory", "_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
"""What CUDA, cuBLAS, cuDNN and the CPU's allocator say, each in an error of another class."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be got, on the device or for the CPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


class Renderer(Protocol):
    """A resident base model that takes one LoRA at a time."""

    def lora(self, checkpoint: Checkpoint, layout: LoraLayout) -> AbstractContextManager[None]:
        """Apply the LoRA, whole or not at all, for the length of a `with` block; never fused.

        However the block ends, the bare base model is left. Entering again with another file is cheap: no weight of
        the base model is read or written.

        Raises:
            RefusedCheckpointError: the base model has no such layers or has them in another width; or, at the end of
                a block that rendered, a layer took no part in it, so that the pictures do not show the whole LoRA.
        """

    def left_out(self, layout: LoraLayout) -> set[str]:
        """Return the layers that a usual LoRA of the parts it touches (UNet, text encoders) has and this one lacks."""

    def render(self, on_step: OnStep) -> Rendering:
        """Render the plan's samples with what is applied now.

        Raises:
            ResourceError: memory does not suffice even for half the batch.
        """

    @property
    def device_name(self) -> str:
        """What renders, for people."""

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that decide the pixels."""

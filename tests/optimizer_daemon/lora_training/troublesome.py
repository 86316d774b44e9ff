"""Torch optimizers that run into trouble, named in optimizer_type as a user's own would be."""

from __future__ import annotations

from typing import Any

import torch


class OutOfGpuMemory(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class OutOfHostMemory(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        torch.empty(2**46)  # 256 TiB


class Infinite(torch.optim.SGD):
    """Ends the epoch with weights that no half-precision number holds."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.fill_(1e6)


class NoOptimizer:
    """Something else under the name of a class."""

"""A LoRA beside the base model's layers: W x + scale * up(down(x)), never inside W.

The base model is not touched: each adapted layer gets a forward hook that adds the pair's output, and the hooks go when
the LoRA does. So nothing has to be loaded again, fused, undone or cleaned up, a failure leaves the bare base model, and
no weight of one checkpoint can survive into the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from safetensors.torch import load as load_tensors
from torch import nn
from torch.nn import functional as F  # noqa: N812  as everybody calls it

from evaluator_daemon.renderers.layer_names import LayerNames
from shared.errors import RefusedCheckpointError
from shared.safetensors_file import Checkpoint, LoraLayout


@dataclass
class LoraPair:
    """What one layer gets beside its weight.

    Args:
        down: (rank, in) or (rank, in, h, w), in the layer's number format and on its device.
        up: (out, rank) or (out, rank, 1, 1).
        scale: alpha / rank * strength.
        calls: how many times the layer has run with it.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    calls: int = 0

    def __call__(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Add the pair's output; a forward hook."""
        self.calls += 1
        if isinstance(layer, nn.Conv2d):
            low = F.conv2d(inputs[0], self.down, None, layer.stride, layer.padding, layer.dilation)
            return torch.add(output, F.conv2d(low, self.up), alpha=self.scale)
        return torch.add(output, F.linear(F.linear(inputs[0], self.down), self.up), alpha=self.scale)


@contextmanager
def applied(
    checkpoint: Checkpoint, layout: LoraLayout, names: LayerNames, strength: float
) -> Iterator[Mapping[str, LoraPair]]:
    """Hold a LoRA's pairs at the base model's layers, all of them or none.

    Args:
        strength: multiplies every pair; 1 is as trained.
    Yields:
        layer -> its pair.
    Raises:
        RefusedCheckpointError: the base model lacks a layer, or has it in another width.
    """
    pairs = _pairs(checkpoint, layout, names, strength)
    with ExitStack() as hooks:
        for layer, pair in pairs.items():
            hooks.callback(names.layers[layer].register_forward_hook(pair).remove)
        yield pairs


def require_used(checkpoint: Checkpoint, pairs: Mapping[str, LoraPair]) -> None:
    """Refuse, after a rendering, a LoRA of which a pair never ran: the pictures do not show it as a whole.

    Raises:
        RefusedCheckpointError: so it is.
    """
    if idle := {layer for layer, pair in pairs.items() if not pair.calls}:
        raise _not_applied(checkpoint, idle, "belong to layers that take no part in rendering", "leave them out")


def _not_applied(
    checkpoint: Checkpoint, modules: set[str], what: str, remedy: str = "train on this base model"
) -> RefusedCheckpointError:
    """Return the refusal of a LoRA of which these modules would be lost."""
    shown = ", ".join(sorted(modules)[:3])
    return RefusedCheckpointError(
        checkpoint.path, "not_applied", f"{len(modules)} of its modules {what}, such as {shown}; {remedy}"
    )


def _pairs(checkpoint: Checkpoint, layout: LoraLayout, names: LayerNames, strength: float) -> dict[str, LoraPair]:
    resolved = names.resolve(layout)
    if unknown := {name for name, layer in resolved.items() if layer is None}:
        raise _not_applied(checkpoint, unknown, "do not exist in the base model")
    layers = {name: layer for name, layer in resolved.items() if layer is not None}
    if len(set(layers.values())) < len(layers):
        first: dict[str, str] = {}
        twice = {name for name, layer in layers.items() if first.setdefault(layer, name) != name}
        raise _not_applied(checkpoint, twice, "name a layer that another one names, too", "save it under one name each")
    misfits = {
        module.name
        for module in layout.modules
        if not _fits(
            names.layers[layers[module.name]],
            checkpoint.tensors[module.down].shape,
            checkpoint.tensors[module.up].shape,
        )
    }
    if misfits:
        raise _not_applied(checkpoint, misfits, "have another width than the base model's; trained on another model")
    tensors = load_tensors(checkpoint.raw)
    return {
        layers[module.name]: LoraPair(
            _like(names.layers[layers[module.name]], tensors[module.down]),
            _like(names.layers[layers[module.name]], tensors[module.up]),
            module.scale * strength,
        )
        for module in layout.modules
    }


def _fits(layer: nn.Linear | nn.Conv2d, down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    """Whether the pair's shapes are the layer's; a matrix and a 1x1 kernel are the same thing."""
    out, into, *kernel = layer.weight.shape
    grouped = isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros")
    of_pair = list(down[2:]) or [1, 1]
    return not grouped and (up[0], down[1]) == (out, into) and of_pair == (kernel or [1, 1])


def _like(layer: nn.Linear | nn.Conv2d, weight: torch.Tensor) -> torch.Tensor:
    """The weight as the layer can use it: a kernel for a convolution, else a matrix."""
    kernel = (weight.shape[2:] or (1, 1)) if layer.weight.ndim == 4 else ()
    return weight.reshape(*weight.shape[:2], *kernel).to(layer.weight.device, layer.weight.dtype)

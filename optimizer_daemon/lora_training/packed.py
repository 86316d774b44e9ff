"""Frozen layers whose weights are laid out once as the CPU's matrix kernels read them.

oneDNN reads weights in blocks. Given a plain weight it reorders all of it at every call, forward and backward; for
small pictures that takes longer than the multiplication. A frozen weight never changes, so it is reordered once, for
either direction. CPU seconds of SD1.5's UNet forward and backward on one thread, plain and packed: .92 .59 at 64 x 64
pixels, 5.5 4.3 at 256 x 256. But packed for other sizes it is slower than plain: 2.4 for 1.4, 6.4 for 6.2.

Source of the operators: what torch.compile's inductor replaces frozen layers by on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor, nn

_MOST_OF_MEMORY = 0.5  # of all the machine has: a training that is resumed computes as it did before
_COPIES = 2  # one for each direction, in place of the plain weight


def packed_bytes(plain_bytes: int) -> int:
    """Return what networks of that many bytes take once their weights are packed, about."""
    return _COPIES * plain_bytes


def may_pack(plain_bytes: int, device: torch.device) -> bool:
    """Whether networks of that many bytes are to be packed where they are trained on."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return packed_bytes(plain_bytes) <= _MOST_OF_MEMORY * psutil.virtual_memory().total


def pack(module: nn.Module, example: Callable[[], object]) -> None:
    """Lay out the frozen weights of all linear layers and of the convolutions that leave the size as it is.

    Outputs and the gradients of inputs are the same up to rounding; weights get no gradients. The plain weights are
    given up: a NaN takes their place.

    Args:
        module: the network.
        example: calls it with inputs of the size that it will get: the layout depends on that. Others work, slowly.
    """
    for layer, shape in _input_shapes(module, example).items():
        packed = _PackedLinear(layer, shape) if isinstance(layer, nn.Linear) else _PackedConvolution(layer, shape)
        nothing = torch.full((1,), torch.nan, dtype=layer.weight.dtype)
        layer.weight = nn.Parameter(nothing.expand(layer.weight.shape), requires_grad=False)
        setattr(layer, "forward", packed)  # noqa: B010  hooks stay; a type checker takes this for a new method


def is_packed(module: nn.Module) -> bool:
    """Whether some layer of it has been packed."""
    return any(isinstance(layer.forward, _PackedLinear | _PackedConvolution) for layer in module.modules())


def _input_shapes(module: nn.Module, example: Callable[[], object]) -> dict[nn.Linear | nn.Conv2d, torch.Size]:
    """Return what each layer that can be packed is given."""
    shapes = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        shapes[layer] = inputs[0].shape

    layers = [layer for layer in module.modules() if type(layer) is nn.Linear or _keeps_size(layer)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            example()
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _keeps_size(layer: nn.Module) -> bool:
    """Whether it is a convolution, and the gradient of its input one with the same padding."""
    if type(layer) is not nn.Conv2d:
        return False
    ((height, width), padding) = layer.kernel_size, layer.padding
    return (
        layer.stride == (1, 1)
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and height % 2 == width % 2 == 1
        and padding == (height // 2, width // 2)
    )


class _PackedLinear:
    """A frozen linear layer; call it as one."""

    def __init__(self, layer: nn.Linear, shape: torch.Size) -> None:
        reorder, rows = torch.ops.mkldnn._reorder_linear_weight, math.prod(shape[:-1])
        weight = layer.weight.detach()
        self._forward = reorder(weight.contiguous(), rows)
        self._backward = reorder(weight.T.contiguous(), rows)
        self._bias = layer.bias

    def __call__(self, inputs: Tensor) -> Tensor:
        result: Tensor = _Apply.apply(inputs, self)
        return result

    def forward(self, inputs: Tensor) -> Tensor:
        return _linear(inputs, self._forward, self._bias)

    def backward(self, gradient: Tensor) -> Tensor:
        return _linear(gradient, self._backward, None)


class _PackedConvolution:
    """A frozen convolution that leaves the size as it is; call it as one."""

    def __init__(self, layer: nn.Conv2d, shape: torch.Size) -> None:
        self._padding = list(layer.padding)
        weight, (batch, _, *size) = layer.weight.detach(), shape
        self._forward = self._reordered(weight, [batch, layer.in_channels, *size])
        # The gradient of the input: the same with input and output channels swapped and the kernel turned around.
        turned = weight.flip(2, 3).transpose(0, 1)
        self._backward = self._reordered(turned, [batch, layer.out_channels, *size])
        self._bias = layer.bias

    def __call__(self, inputs: Tensor) -> Tensor:
        result: Tensor = _Apply.apply(inputs, self)
        return result

    def forward(self, inputs: Tensor) -> Tensor:
        return self._convolved(inputs, self._forward, self._bias)

    def backward(self, gradient: Tensor) -> Tensor:
        return self._convolved(gradient, self._backward, None)

    def _reordered(self, weight: Tensor, shape: list[int]) -> Tensor:
        ones = [1, 1]
        plain = weight.contiguous().to_mkldnn()
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the last argument
        packed: Tensor = reorder(plain, self._padding, ones, ones, 1, shape)
        return packed

    def _convolved(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ones = [1, 1]
        convolution = torch.ops.mkldnn._convolution_pointwise
        result: Tensor = convolution(inputs, weight, bias, self._padding, ones, ones, 1, "none", [], "")
        return result


class _Apply(torch.autograd.Function):
    """A packed layer in the graph: the gradient goes to its input alone."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: _PackedLinear | _PackedConvolution) -> Tensor:
        ctx.layer = layer
        return layer.forward(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return (ctx.layer.backward(gradients[0]) if ctx.needs_input_grad[0] else None), None


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(inputs.contiguous(), weight, bias, "none", [], "")
    return result

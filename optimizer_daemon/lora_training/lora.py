"""LoRA layers beside the frozen ones, under the names of kohya's networks.lora.

Source: Hu et al. 2021, arXiv:2106.09685; initial values and scale as microsoft/LoRA and sd-scripts have them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Classes whose Linear and 1x1 Conv2d layers get a LoRA; also the names that sd-scripts looks for.
_UNET_BLOCKS = frozenset({"Transformer2DModel"})
_TEXT_BLOCKS = frozenset({"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"})


class LoraLayer(nn.Module):
    """Adds scale * up(down(x)) to the output of one frozen layer.

    Args:
        base: the frozen layer.
        rank: width of the bottleneck.
        alpha: scale is alpha / rank; 0 means rank.
        dropout: share of bottleneck neurons dropped in training.
    """

    alpha: Tensor

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float | None) -> None:
        super().__init__()
        alpha = alpha or rank
        self.lora_down: nn.Linear | nn.Conv2d
        self.lora_up: nn.Linear | nn.Conv2d
        if isinstance(base, nn.Conv2d):
            self.lora_down = nn.utils.skip_init(nn.Conv2d, base.in_channels, rank, 1, base.stride, bias=False)
            self.lora_up = nn.utils.skip_init(nn.Conv2d, rank, base.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.utils.skip_init(nn.Linear, base.in_features, rank, bias=False)
            self.lora_up = nn.utils.skip_init(nn.Linear, rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self._scale = alpha / rank
        self._dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, base: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the frozen layer's output with the change added; the signature of a forward hook."""
        low = self.lora_down(inputs[0])
        if self._dropout is not None:
            low = self._dropout(low)
        return torch.add(output, self.lora_up(low), alpha=self._scale)


class LoraNetwork(nn.Module):
    """All LoRA layers of a training; its state_dict has the tensors and names of a checkpoint.

    Initial weights are drawn on the CPU from torch's global generator, the text encoder's before the UNet's, each in
    the order of `named_modules`.

    Args:
        unet: None to leave it alone.
        text_encoder: None to leave it alone.
        rank, alpha, dropout: see LoraLayer.
    """

    def __init__(
        self,
        unet: nn.Module | None,
        text_encoder: nn.Module | None,
        *,
        rank: int,
        alpha: float,
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        self.text_encoder_names: list[str] = []
        self.unet_names: list[str] = []
        targets = []
        if text_encoder is not None:
            targets.append((self.text_encoder_names, text_layers(text_encoder)))
        if unet is not None:
            targets.append((self.unet_names, unet_layers(unet)))
        for names, layers in targets:
            for name, base in layers:
                names.append(name)
                self.add_module(name, LoraLayer(base, rank, alpha, dropout))
                base.register_forward_hook(self.get_submodule(name))

    def parameters_of(self, names: list[str]) -> list[nn.Parameter]:
        """Return the trained weights of these layers, in order."""
        return [parameter for name in names for parameter in self.get_submodule(name).parameters()]


def unet_layers(unet: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yield (kohya's name, layer) for every layer of a UNet that gets a LoRA."""
    for path, layer in _layers_inside(unet, _UNET_BLOCKS):
        yield f"lora_unet_{path.replace('.', '_')}", layer


def text_layers(encoder: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yield (kohya's name, layer) for every layer of a CLIP text encoder that gets a LoRA."""
    for path, layer in _layers_inside(encoder, _TEXT_BLOCKS):
        # transformers 5.6 took this level out of the module tree; files keep it.
        full = path if path.startswith("text_model.") else f"text_model.{path}"
        yield f"lora_te_{full.replace('.', '_')}", layer


def _layers_inside(root: nn.Module, blocks: frozenset[str]) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for block_path, block in root.named_modules():
        if type(block).__name__ in blocks:
            for path, layer in block.named_modules():
                if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)):
                    yield f"{block_path}.{path}", layer

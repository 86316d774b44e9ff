"""LoRA layers beside the frozen ones, under the names of kohya's networks.lora: SDXL's UNet has SGM names there.

Source: Hu et al. 2021, arXiv:2106.09685; initial values and scale as microsoft/LoRA and sd-scripts have them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optimizer_daemon.lora_training.network_settings import NetworkArgs
from shared.sgm_names import SgmNames

# Classes whose Linear and 1x1 Conv2d layers get a LoRA; also the names that sd-scripts looks for.
_UNET_BLOCKS = frozenset({"Transformer2DModel"})
_SPATIAL_BLOCKS = frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D"})  # with conv_dim all their layers do, too
_TEXT_BLOCKS = frozenset({"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"})

# The order in which sd-scripts' own classes register their parts, where diffusers has another: initial weights are
# drawn in it. Class -> parts, in order.
_ORDERS: Mapping[str, Sequence[str]] = {"BasicTransformerBlock": ("attn1", "ff", "attn2")}
_SDXL_ORDERS: Mapping[str, Sequence[str]] = {
    **_ORDERS,
    "UNet2DConditionModel": ("down_blocks", "mid_block", "up_blocks"),
}


class LoraLayer(nn.Module):
    """Adds scale * up(down(x)) to the output of one frozen layer.

    Args:
        base: the frozen layer.
        rank: width of the bottleneck.
        alpha: scale is alpha / rank; 0 means rank.
        dropout: share of bottleneck numbers dropped in training.
        rank_dropout: share of ranks dropped in training, anew for each sample; the scale grows to make up for them.
        module_dropout: how often the whole layer is left out in training.
    """

    alpha: Tensor

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        rank: int,
        alpha: float,
        dropout: float | None = None,
        rank_dropout: float | None = None,
        module_dropout: float | None = None,
    ) -> None:
        super().__init__()
        alpha = alpha or rank
        self.lora_down: nn.Linear | nn.Conv2d
        self.lora_up: nn.Linear | nn.Conv2d
        # Their constructors draw weights that are not used; left out, the same seed would give others than sd-scripts'.
        if isinstance(base, nn.Conv2d):
            shape: dict[str, Any] = {name: getattr(base, name) for name in ("kernel_size", "stride", "padding")}
            self.lora_down = nn.Conv2d(base.in_channels, rank, **shape, bias=False)
            self.lora_up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(base.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self._scale = alpha / rank
        self._dropout = nn.Dropout(dropout) if dropout else None
        self._rank_dropout = rank_dropout or 0.0
        self._module_dropout = module_dropout or 0.0

    def forward(self, base: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the frozen layer's output with the change added; the signature of a forward hook."""
        if self.training and self._module_dropout and torch.rand(1) < self._module_dropout:
            return output
        low = self.lora_down(inputs[0])
        if self._dropout is not None:
            low = self._dropout(low)
        scale = self._scale
        if self.training and self._rank_dropout:
            low = low * self._kept_ranks(low)
            scale /= 1.0 - self._rank_dropout
        return torch.add(output, self.lora_up(low), alpha=scale)

    def limit(self, most: float) -> None:
        """Scale both matrices down alike where the change of the frozen weight has a norm above `most`."""
        up, down = self.lora_up.weight.flatten(1), self.lora_down.weight.flatten(1)
        # The squared norm of up @ down is the sum of the products of their Gram matrices: rank x rank, not out x in.
        norm = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0.0).sqrt() * self._scale
        factor = (most / norm.clamp(min=most)).sqrt()
        self.lora_up.weight.mul_(factor)
        self.lora_down.weight.mul_(factor)

    def _kept_ranks(self, low: Tensor) -> Tensor:
        """Return ones and zeros, (batch, rank), shaped to be multiplied with the bottleneck."""
        rank = self.lora_up.weight.shape[1]
        kept = torch.rand((len(low), rank), device=low.device) > self._rank_dropout
        if low.dim() == 4:
            return kept[:, :, None, None]
        return kept[:, None, :] if low.dim() == 3 else kept


class LoraNetwork(nn.Module):
    """All LoRA layers of a training; its state_dict has the tensors and names of a checkpoint.

    Initial weights are drawn on the CPU from torch's global generator as sd-scripts' networks.lora draws them: for the
    text encoders, then for the UNet, trained or not. So the UNet's do not depend on what else is trained.

    Args:
        unet: the UNet.
        text_encoders: one, or SDXL's two.
        rank, alpha, dropout: see LoraLayer.
        args: further shares that are dropped; rank and alpha of spatial convolutions, which get a LoRA only with one.
        untrained: which of "unet", "text_encoder", "text_encoder_2" get none.
    """

    def __init__(
        self,
        unet: nn.Module,
        text_encoders: Sequence[nn.Module],
        *,
        rank: int,
        alpha: float,
        dropout: float | None = None,
        args: NetworkArgs | None = None,
        untrained: Collection[str] = (),
    ) -> None:
        super().__init__()
        args = args or NetworkArgs()
        spatial_alpha = 1.0 if args.conv_alpha is None else args.conv_alpha
        self.encoder_names: tuple[list[str], ...] = tuple([] for _ in text_encoders)
        self.unet_names: list[str] = []
        prefixes = ["lora_te"] if len(text_encoders) == 1 else ["lora_te1", "lora_te2"]
        targets = [
            (part, names, text_layers(encoder, prefix))
            for part, names, encoder, prefix in zip(
                ("text_encoder", "text_encoder_2"), self.encoder_names, text_encoders, prefixes, strict=False
            )
        ]
        targets.append(("unet", self.unet_names, unet_layers(unet, spatial=args.conv_dim is not None)))
        for part, names, layers in targets:
            for name, base in layers:
                size = (args.conv_dim, spatial_alpha) if args.conv_dim and _is_spatial(base) else (rank, alpha)
                layer = LoraLayer(base, *size, dropout, args.rank_dropout, args.module_dropout)
                if part not in untrained:
                    names.append(name)
                    self.add_module(name, layer)
                    base.register_forward_hook(layer)

    @property
    def text_encoder_names(self) -> list[str]:
        """The layers of all text encoders."""
        return [name for names in self.encoder_names for name in names]

    def parameters_of(self, names: list[str], ending: str = "") -> list[nn.Parameter]:
        """Return the trained weights of these layers whose name ends so, in order."""
        return [
            parameter
            for name in names
            for own_name, parameter in self.get_submodule(name).named_parameters()
            if own_name.endswith(ending)
        ]

    @torch.no_grad()
    def limit(self, most: float) -> None:
        """See LoraLayer.limit; for every layer."""
        for layer in self.children():
            assert isinstance(layer, LoraLayer)
            layer.limit(most)


def unet_layers(unet: nn.Module, *, spatial: bool = False) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yield (kohya's name, layer) for every layer of a UNet that gets a LoRA, in the order of sd-scripts.

    Args:
        unet: the UNet.
        spatial: so do the layers of resnets and samplers.
    """
    blocks = _UNET_BLOCKS | _SPATIAL_BLOCKS if spatial else _UNET_BLOCKS
    if getattr(getattr(unet, "config", None), "addition_embed_type", None) != "text_time":
        for path, layer in _layers_inside(unet, blocks, _ORDERS):
            yield f"lora_unet_{path.replace('.', '_')}", layer
        return
    names = SgmNames(unet)
    found = []
    for path, layer in _layers_inside(unet, blocks, _SDXL_ORDERS):
        known = names.of(path)
        assert known is not None, f"{path} lies in no block of SDXL"
        found.append((known, layer))
    for known, layer in sorted(found, key=lambda entry: _sgm_place(entry[0])):
        yield f"lora_unet_{known.replace('.', '_')}", layer


def text_layers(encoder: nn.Module, prefix: str = "lora_te") -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yield (kohya's name, layer) for every layer of a CLIP text encoder that gets a LoRA."""
    for path, layer in _layers_inside(encoder, _TEXT_BLOCKS, {}):
        # transformers 5.6 took this level out of the module tree; files keep it.
        full = path if path.startswith("text_model.") else f"text_model.{path}"
        yield f"{prefix}_{full.replace('.', '_')}", layer


def _layers_inside(
    root: nn.Module, blocks: frozenset[str], orders: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for block_path, block in _modules(root, orders):
        if (kind := type(block).__name__) in blocks:
            for path, layer in _modules(block, orders):
                if isinstance(layer, nn.Linear) or (
                    isinstance(layer, nn.Conv2d) and (kind in _SPATIAL_BLOCKS or not _is_spatial(layer))
                ):
                    yield f"{block_path}.{path}", layer


def _is_spatial(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


def _sgm_place(path: str) -> tuple[int, ...]:
    """The place of a layer's block in SDXL's original layout, where resnets and attentions take turns."""
    section, *numbers = path.split(".")
    depth = 1 if section == "middle_block" else 2
    return (("input_blocks", "middle_block", "output_blocks").index(section), *map(int, numbers[:depth]))


def _modules(root: nn.Module, orders: Mapping[str, Sequence[str]], path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, but the parts of the classes in `orders` come in that order, others behind them."""
    yield path, root
    children = dict(root.named_children())
    first = [name for name in orders.get(type(root).__name__, ()) if name in children]
    for name in [*first, *(name for name in children if name not in first)]:
        yield from _modules(children[name], orders, f"{path}.{name}" if path else name)

"""The names that a UNet's layers have in Stability's own (SGM) layout.

sd-scripts trains SDXL in that layout and names LoRA modules by it: one running number for the resnets and samplers of
all down blocks, another for the up blocks'.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# diffusers' module of a ResnetBlock2D or a time embedding -> the original (SGM) one's
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


class SgmNames:
    """Names of one UNet's layers.

    Args:
        unet: diffusers' UNet2DConditionModel; only its structure is looked at, so that it may be on the meta device.
    """

    def __init__(self, unet: Any) -> None:
        self._blocks = dict(_blocks(unet))

    def of(self, path: str) -> str | None:
        """Return the original path of a layer, given diffusers'; None where it has none."""
        if path in _OUTSIDE_BLOCKS:
            return _OUTSIDE_BLOCKS[path]
        if path in self._blocks:
            return self._blocks[path]
        parts = path.split(".")
        depth = 3 if parts[0] == "mid_block" else 4
        original, inner = self._blocks.get(".".join(parts[:depth])), ".".join(parts[depth:])
        if original is None:
            return None
        return f"{original}.{_RESNET.get(inner, inner) if 'resnets' in parts[:depth] else inner}"


def _blocks(unet: Any) -> Iterator[tuple[str, str]]:
    """(diffusers' path of a resnet, attention or sampler, its path in the original layout)."""
    number = 1  # input_blocks.0 is conv_in
    for index, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            yield f"down_blocks.{index}.resnets.{layer}", f"input_blocks.{number}.0"
            if hasattr(block, "attentions"):
                yield f"down_blocks.{index}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            yield f"down_blocks.{index}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    yield from (
        ("mid_block.resnets.0", "middle_block.0"),
        ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.1", "middle_block.2"),
    )
    number = 0
    for index, block in enumerate(unet.up_blocks):
        attends = hasattr(block, "attentions")
        for layer in range(len(block.resnets)):
            yield f"up_blocks.{index}.resnets.{layer}", f"output_blocks.{number}.0"
            if attends:
                yield f"up_blocks.{index}.attentions.{layer}", f"output_blocks.{number}.1"
            number += 1
        if block.upsamplers:
            yield f"up_blocks.{index}.upsamplers.0.conv", f"output_blocks.{number - 1}.{2 if attends else 1}.conv"

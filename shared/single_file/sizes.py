"""The configuration of a base model's parts, its sizes read from the shapes of a single file's tensors.

What no shape tells stays as in the published model of the family (`shared/base_configs`): the kinds of activations, 32
groups of the norms, the size of pictures, the noise schedule. Heads follow from widths as there: 8 in SD1.5's UNet,
otherwise one of each 64 channels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from shared.clip_tokenizers import BASE_CONFIGS
from shared.safetensors_file import Tensor
from shared.single_file.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE

Family = Literal["sd15", "sdxl"]
Configs = dict[str, dict[str, Any]]
_HEAD_WIDTH = 64
_SIZES = 6  # original height and width, crop from top and left, target height and width


class _Shapes:
    """Sizes by name; a tensor that is not there is a KeyError with its name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __call__(self, name: str, axis: int) -> int:
        shape = self._tensors[name].shape
        if axis >= len(shape):
            raise ValueError(f"{name} has {len(shape)} axes")
        return shape[axis]

    def axes(self, name: str) -> int:
        return len(self._tensors[name].shape)

    def count(self, start: str, end: str) -> int:
        """Return how many of start0end, start1end, ... there are in a row."""
        number = 0
        while f"{start}{number}{end}" in self._tensors:
            number += 1
        return number

    def __contains__(self, name: str) -> bool:
        return name in self._tensors


def shipped_config(family: Family, file: str) -> dict[str, Any]:
    """Return one of the published files, such as "unet/config.json"."""
    document: dict[str, Any] = json.loads((BASE_CONFIGS / family / file).read_text(encoding="utf-8"))
    return document


def derive_configs(family: Family, tensors: Mapping[str, Tensor]) -> Configs:
    """Return the configuration of each part that has weights; the names and shapes may still contradict it.

    Raises:
        KeyError: a tensor that decides a size is missing; its name.
        ValueError: a tensor cannot be of this family, or a width cannot be divided as the family does it.
    """
    shapes = _Shapes(tensors)
    configs = {
        "unet": shipped_config(family, "unet/config.json") | _unet(shapes, family),
        "vae": shipped_config(family, "vae/config.json") | _vae(shapes),
        "text_encoder": shipped_config(family, "text_encoder/config.json") | _clip(shapes, TEXT_ENCODER[family]),
    }
    if family == "sdxl":
        second = shipped_config(family, "text_encoder_2/config.json") | _open_clip(shapes)
        configs["text_encoder_2"] = second
        given = configs["unet"]["projection_class_embeddings_input_dim"]
        size_width, rest = divmod(given - second["projection_dim"], _SIZES)
        if rest or size_width < 1:
            raise ValueError(
                f"its UNet takes {given} numbers of pooled text and {_SIZES} sizes, its text_encoder_2 makes "
                f"{second['projection_dim']}"
            )
        configs["unet"]["addition_time_embed_dim"] = size_width
    for part in ("unet", "vae"):
        groups = configs[part]["norm_num_groups"]
        if uneven := [width for width in configs[part]["block_out_channels"] if width % groups]:
            raise ValueError(f"the {part}'s width {uneven[0]} cannot be divided into {groups} groups")
    return configs


def _unet(shapes: _Shapes, family: Family) -> dict[str, Any]:
    inputs = shapes(f"{UNET}input_blocks.0.0.weight", 1)
    levels: list[list[tuple[int, int]]] = [[]]  # of each level the (width, transformer depth) of its layers
    attending, number = "", 1
    while True:
        block = f"{UNET}input_blocks.{number}."
        if f"{block}0.op.weight" in shapes:
            levels.append([])
        elif f"{block}0.in_layers.0.weight" in shapes:
            depth = shapes.count(f"{block}1.transformer_blocks.", ".attn1.to_q.weight")
            levels[-1].append((shapes(f"{block}0.out_layers.3.weight", 0), depth))
            attending = attending or (f"{block}1." if depth else "")
        else:
            break
        number += 1
    if not all(levels) or not attending:
        raise ValueError("its UNet has a level without layers, or attends to no text")
    widths, depths = [level[-1][0] for level in levels], [level[-1][1] for level in levels]
    config: dict[str, Any] = {
        "in_channels": inputs,
        "out_channels": shapes(f"{UNET}out.2.weight", 0),
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "cross_attention_dim": shapes(f"{attending}transformer_blocks.0.attn2.to_k.weight", 1),
        "use_linear_projection": shapes.axes(f"{attending}proj_in.weight") == 2,
        "transformer_layers_per_block": [max(1, depth) for depth in depths],
    }
    if family == "sdxl":
        config["projection_class_embeddings_input_dim"] = shapes(f"{UNET}label_emb.0.0.weight", 1)
        config["attention_head_dim"] = [_heads(width) for width in widths]
    elif uneven := [width for width in widths if width % 8]:
        raise ValueError(f"the unet's width {uneven[0]} cannot be divided among 8 heads")
    return config


def _vae(shapes: _Shapes) -> dict[str, Any]:
    levels = shapes.count(f"{VAE}encoder.down.", ".block.0.conv1.weight")
    return {
        "in_channels": shapes(f"{VAE}encoder.conv_in.weight", 1),
        "out_channels": shapes(f"{VAE}decoder.conv_out.weight", 0),
        "latent_channels": shapes(f"{VAE}post_quant_conv.weight", 0),
        "block_out_channels": [shapes(f"{VAE}encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)],
        "layers_per_block": shapes.count(f"{VAE}encoder.down.0.block.", ".conv1.weight"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _clip(shapes: _Shapes, prefix: str) -> dict[str, Any]:
    return {
        "vocab_size": shapes(f"{prefix}embeddings.token_embedding.weight", 0),
        "max_position_embeddings": shapes(f"{prefix}embeddings.position_embedding.weight", 0),
        "num_hidden_layers": shapes.count(f"{prefix}encoder.layers.", ".mlp.fc1.weight"),
        "intermediate_size": shapes(f"{prefix}encoder.layers.0.mlp.fc1.weight", 0),
        **_width(shapes(f"{prefix}embeddings.token_embedding.weight", 1)),
    }


def _open_clip(shapes: _Shapes) -> dict[str, Any]:
    return {
        "vocab_size": shapes(f"{TEXT_ENCODER_2}token_embedding.weight", 0),
        "max_position_embeddings": shapes(f"{TEXT_ENCODER_2}positional_embedding", 0),
        "num_hidden_layers": shapes.count(f"{TEXT_ENCODER_2}transformer.resblocks.", ".mlp.c_fc.weight"),
        "intermediate_size": shapes(f"{TEXT_ENCODER_2}transformer.resblocks.0.mlp.c_fc.weight", 0),
        **_width(shapes(f"{TEXT_ENCODER_2}token_embedding.weight", 1)),
        "projection_dim": shapes(f"{TEXT_ENCODER_2}text_projection", 1),
    }


def _width(width: int) -> dict[str, int]:
    return {"hidden_size": width, "projection_dim": width, "num_attention_heads": _heads(width)}


def _heads(width: int) -> int:
    heads = max(1, width // _HEAD_WIDTH)
    if width % heads:
        raise ValueError(f"the width {width} cannot be divided into heads of {_HEAD_WIDTH} channels")
    return heads

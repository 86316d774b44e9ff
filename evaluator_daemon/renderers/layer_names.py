"""From the names in LoRA files to the layers of a loaded base model.

Nothing is hard-coded for one size of model: the table is made from the loaded models' own modules, so a name either
means exactly one layer or is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from shared.safetensors_file import Family, LoraLayout

# Classes whose Linear and 1x1 Conv2d layers sd-scripts' networks.lora adapts
_USUAL_BLOCKS = ("Transformer2DModel", "CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")

# diffusers' module of a ResnetBlock2D or a time embedding -> the original (SGM) one's
_SGM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_SGM_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
# diffusers until 0.19 saved the pairs of attention layers below their processor
_OLD_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora$")


class LayerNames:
    """Every adaptable layer of the base model, by the names that files have for it.

    Args:
        models: the pipeline's component -> the model; "unet" and the text encoders.
        kohya_prefixes: component -> how kohya's names begin, such as "lora_te1".
    """

    def __init__(self, models: Mapping[str, nn.Module], kohya_prefixes: Mapping[str, str]) -> None:
        self.layers: dict[str, nn.Linear | nn.Conv2d] = {
            f"{component}.{path}": module
            for component, model in models.items()
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        self._usual = {
            f"{component}.{path}.{inner}"
            for component, model in models.items()
            for path, block in model.named_modules()
            if type(block).__name__ in _USUAL_BLOCKS
            for inner, layer in block.named_modules()
            if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
        }
        sgm = dict(_sgm_modules(models["unet"]))
        self._kohya: dict[str, str] = {}
        self._dotted: dict[str, str] = {}
        for layer in self.layers:
            component, _, path = layer.partition(".")
            paths = [path] if component == "unet" else list(_text_paths(path))
            if component == "unet" and (original := _sgm_name(path, sgm)):
                paths.append(original)
            for known in paths:
                self._dotted[f"{component}.{known}"] = layer
                self._kohya[f"{kohya_prefixes[component]}_{known.replace('.', '_')}"] = layer

    def resolve(self, layout: LoraLayout) -> dict[str, str | None]:
        """Return module of the file -> layer such as "unet.mid_block...", None for what the model does not have."""
        if layout.family is Family.KOHYA:
            return {module.name: self._kohya.get(module.name) for module in layout.modules}
        return {module.name: self._dotted.get(_without_processor(module.name)) for module in layout.modules}

    def left_out(self, layers: set[str]) -> set[str]:
        """Return the layers that a usual LoRA of the components it touches has, and that are not among these."""
        touched = {component_of(layer) for layer in layers}
        return {layer for layer in self._usual - layers if component_of(layer) in touched}


def component_of(layer: str) -> str:
    """Return "unet", "text_encoder" or "text_encoder_2"."""
    return layer.partition(".")[0]


def _text_paths(path: str) -> Iterator[str]:
    """The path with and without "text_model", which files keep and newer versions of transformers dropped."""
    bare = path.removeprefix("text_model.")
    yield bare
    yield f"text_model.{bare}"


def _without_processor(name: str) -> str:
    old = _OLD_PROCESSOR.search(name)
    return name if old is None else f"{name[: old.start()]}.to_{'out.0' if old[1] == 'out' else old[1]}"


# ------------------------------------------------------------------------------------------------------- SGM names
# sd-scripts trains SDXL in Stability's own layout and names modules by it: one running number for the resnets and
# samplers of all down blocks, another for the up blocks'.


def _sgm_modules(unet: Any) -> Iterator[tuple[str, str]]:
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


def _sgm_name(path: str, sgm: Mapping[str, str]) -> str | None:
    """Return the original name of a UNet's layer; None where it has none."""
    if path in _SGM_OUTSIDE_BLOCKS:
        return _SGM_OUTSIDE_BLOCKS[path]
    if path in sgm:
        return sgm[path]
    block, _, inner = path.partition(".")
    parts = path.split(".")
    depth = 3 if block == "mid_block" else 4
    original, inner = sgm.get(".".join(parts[:depth])), ".".join(parts[depth:])
    if original is None:
        return None
    return f"{original}.{_SGM_RESNET.get(inner, inner) if 'resnets' in parts[:depth] else inner}"

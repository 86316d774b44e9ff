"""From the names in LoRA files to the layers of a loaded base model.

Nothing is hard-coded for one size of model: the table is made from the loaded models' own modules, so a name either
means exactly one layer or is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

from shared.safetensors_file import Family, LoraLayout
from shared.sgm_names import SgmNames

# Classes whose Linear and 1x1 Conv2d layers sd-scripts' networks.lora adapts
_USUAL_BLOCKS = ("Transformer2DModel", "CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")

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
        sgm = SgmNames(models["unet"])
        self._kohya: dict[str, str] = {}
        self._dotted: dict[str, str] = {}
        for layer in self.layers:
            component, _, path = layer.partition(".")
            paths = [path] if component == "unet" else list(_text_paths(path))
            if component == "unet" and (original := sgm.of(path)):
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

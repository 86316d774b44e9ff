"""One random LoRA in every form that files have, and the hand merge it must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from safetensors.torch import save
from torch import nn


@dataclass(frozen=True)
class Pair:
    """One changed layer of the base model: W + alpha / rank * up @ down."""

    component: str
    path: str
    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def change(self) -> torch.Tensor:
        """What is added to the weight, by plain multiplication of matrices."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return self.alpha / len(self.down) * product.reshape(len(self.up), *self.down.shape[1:])


def random_pairs(
    component: str,
    model: nn.Module,
    wanted: Callable[[str, nn.Module], bool],
    *,
    ranks: Iterable[int] = (2,),
    alpha: float = 1.5,
    strength: float = 0.3,
) -> list[Pair]:
    """A pair for each wanted layer; ranks take turns."""
    generator = torch.Generator().manual_seed(len(component))
    ranks = list(ranks)
    pairs = []
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and wanted(path, layer):
            rank = ranks[len(pairs) % len(ranks)]
            down = torch.randn((rank, *layer.weight.shape[1:]), generator=generator) / rank
            ones = (1,) * (layer.weight.ndim - 2)
            up = torch.randn((len(layer.weight), rank, *ones), generator=generator) * strength
            pairs.append(Pair(component, path, down, up, alpha))
    return pairs


def is_attention(path: str, layer: nn.Module) -> bool:
    """What every trainer adapts."""
    return path.endswith(("to_q", "to_k", "to_v", "to_out.0", "_proj", "fc1", "fc2")) and "emb" not in path


def is_usual(path: str, layer: nn.Module) -> bool:
    """What networks.lora adapts."""
    return "attentions" in path or ("layers." in path and isinstance(layer, nn.Linear))


def is_spatial(path: str, layer: nn.Module) -> bool:
    """What LoCon adapts beside: resnets' and samplers' kernels."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
KOHYA_XL = KOHYA | {"text_encoder": "lora_te1"}


def text_path(pair: Pair) -> str:
    """The path as files have it, whatever this version of transformers calls it."""
    bare = pair.path.removeprefix("text_model.")
    return pair.path if pair.component == "unet" else f"text_model.{bare}"


def kohya(pairs: list[Pair], prefixes=KOHYA, rename: Callable[[str], str] = lambda name: name) -> bytes:
    """kohya's form; `rename` maps whole module names, for SGM."""
    tensors = {}
    for pair in pairs:
        name = rename(f"{prefixes[pair.component]}_{text_path(pair).replace('.', '_')}")
        tensors[f"{name}.lora_down.weight"] = pair.down.clone()
        tensors[f"{name}.lora_up.weight"] = pair.up.clone()
        tensors[f"{name}.alpha"] = torch.tensor(pair.alpha)
    return save(tensors, {"ss_network_module": "networks.lora"})


def dotted(pairs: list[Pair], down: str, up: str, metadata: dict[str, str] | None = None, middle: str = "") -> bytes:
    """The model's own names; files without metadata mean alpha = rank."""
    tensors = {}
    for pair in pairs:
        name = f"{pair.component}.{text_path(pair)}"
        tensors[f"{name}{down}"], tensors[f"{name}{up}"] = pair.down.clone(), pair.up.clone()
    return save(tensors, metadata or {"format": "pt"})


def diffusers_name(sgm: str, unet_config: object) -> str:
    """What diffusers' own conversion makes of an SGM module name.

    Raises:
        ValueError, IndexError: the model has no such block.
    """
    (name,) = _maybe_map_sgm_blocks_to_diffusers({sgm: None}, unet_config)
    for original, ours in (
        ("input_blocks", "down_blocks"),
        ("middle_block", "mid_block"),
        ("output_blocks", "up_blocks"),
    ):
        name = name.replace(original, ours)
    return name


def merge(pairs: Iterable[Pair], models: dict[str, nn.Module], strength: float = 1.0) -> None:
    """Add the changes to the weights themselves, in place."""
    with torch.no_grad():
        for pair in pairs:
            models[pair.component].get_submodule(pair.path).weight += strength * pair.change

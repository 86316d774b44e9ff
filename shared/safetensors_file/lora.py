"""Which modules a LoRA file changes, by its tensor names and shapes.

Loaders drop what they do not know and render the base model without an error; so a file is refused here unless every
tensor belongs to a whole pair of a known family. Compare `modules` with what the loader applied.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from shared.errors import RefusedCheckpointError
from shared.safetensors_file.records import Checkpoint, Tensor
from shared.safetensors_file.refusals import refused, shown
from shared.safetensors_file.values import REAL_DTYPES, scalar

Role = Literal["down", "up", "alpha"]


class Family(StrEnum):
    """Who names tensors like this."""

    KOHYA = "kohya"  # lora_unet_..., lora_te_..., with lora_down / lora_up / alpha
    DIFFUSERS = "diffusers"  # peft's names: unet. ..., text_encoder. ..., with lora_A / lora_B


_ROLES: dict[str, Role] = {
    "lora_down.weight": "down",
    "lora_A.weight": "down",
    "lora_up.weight": "up",
    "lora_B.weight": "up",
    "alpha": "alpha",
}
_PATTERNS = {
    Family.KOHYA: re.compile(r"(lora_(?:unet|te|te1|te2|te3)_[^.]+)\.(lora_down\.weight|lora_up\.weight|alpha)"),
    Family.DIFFUSERS: re.compile(
        r"((?:unet|transformer|text_encoder|text_encoder_2|text_encoder_3|base_model)\..+)"
        r"\.(lora_A\.weight|lora_B\.weight|alpha)"
    ),
}


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One changed layer: W + (alpha / rank) * up @ down; `alpha` None means alpha = rank."""

    name: str
    rank: int
    alpha: float | None


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """All changed layers, sorted by name."""

    family: Family
    modules: tuple[LoraModule, ...]

    @property
    def ranks(self) -> frozenset[int]:
        """The different ranks; one for a usual LoRA."""
        return frozenset(module.rank for module in self.modules)


def role_of(name: str) -> Role | None:
    """Return what a tensor is by the end of its name, whatever its family; None for anything else."""
    return next((role for suffix, role in _ROLES.items() if name.endswith("." + suffix)), None)


def lora_modules(checkpoint: Checkpoint) -> LoraLayout:
    """Prove that the checkpoint is a LoRA that a loader applies as a whole.

    Raises:
        RefusedCheckpointError: unknown names, half pairs, mismatching ranks, impossible shapes, dtypes or alphas.
    """
    family, parts = _grouped(checkpoint)
    halves = {name: {"down", "up"} - roles.keys() for name, roles in parts.items()}
    missing = [f"{shown(name)} has no {' and no '.join(sorted(lacks))}" for name, lacks in halves.items() if lacks]
    if missing:
        raise refused(
            checkpoint.path,
            "half_pair",
            f"{len(missing)} of {len(parts)} modules lack half of their pair: {'; '.join(missing[:3])}; save it again",
        )
    return LoraLayout(family, tuple(_module(checkpoint, name, parts[name]) for name in sorted(parts)))


def _grouped(checkpoint: Checkpoint) -> tuple[Family, dict[str, dict[Role, str]]]:
    """Return the family and, for each module, its tensors' names by role."""
    parts: dict[str, dict[Role, str]] = {}
    families: set[Family] = set()
    unknown: list[str] = []
    for name in checkpoint.tensors:
        for family, pattern in _PATTERNS.items():
            if match := pattern.fullmatch(name):
                families.add(family)
                parts.setdefault(match[1], {})[_ROLES[match[2]]] = name
                break
        else:
            unknown.append(name)
    if not families:
        raise refused(
            checkpoint.path, "not_a_lora", f"not a LoRA: no tensor has a LoRA's name (the first is {shown(unknown[0])})"
        )
    if unknown:
        raise refused(
            checkpoint.path,
            "unknown_key",
            f"{len(unknown)} of {len(checkpoint.tensors)} tensors are no weights of a plain LoRA, so a loader would "
            f"drop them: {', '.join(map(shown, unknown[:3]))}",
        )
    if len(families) > 1:
        raise refused(checkpoint.path, "mixed_families", "holds kohya's and diffusers' names; save it in one of them")
    return families.pop(), parts


def _module(checkpoint: Checkpoint, name: str, parts: dict[Role, str]) -> LoraModule:
    down, up = checkpoint.tensors[parts["down"]], checkpoint.tensors[parts["up"]]

    def refusal(code: str, reason: str) -> RefusedCheckpointError:
        return refused(checkpoint.path, code, f"module {shown(name)}: {reason}")

    for tensor in (down, up):
        if tensor.dtype not in REAL_DTYPES:
            raise refusal("lora_dtype", f"its weights are {down.dtype} and {up.dtype}; floating-point ones are needed")
    if not _is_pair(down, up):
        raise refusal(
            "lora_shape",
            f"down {list(down.shape)} and up {list(up.shape)} are neither two matrices nor a convolution and its 1x1 "
            "convolution",
        )
    if down.shape[0] != up.shape[1]:
        raise refusal("rank_mismatch", f"down has rank {down.shape[0]}, up has rank {up.shape[1]}")
    if "alpha" not in parts:
        return LoraModule(name, rank=down.shape[0], alpha=None)
    entry = checkpoint.tensors[parts["alpha"]]
    start, end = checkpoint.bounds(parts["alpha"])
    alpha = scalar(checkpoint.raw[start:end], entry.dtype) if entry.shape in ((), (1,)) else None
    if alpha is None or alpha <= 0:
        raise refusal("lora_alpha", f"alpha is {entry.dtype} {list(entry.shape)} {alpha}; one number above 0 is needed")
    return LoraModule(name, rank=down.shape[0], alpha=alpha)


def _is_pair(down: Tensor, up: Tensor) -> bool:
    """Matrices (rank, in) and (out, rank), or kernels (rank, in, h, w) and (out, rank, 1, 1)."""
    same_kind = len(down.shape) == len(up.shape) and len(up.shape) in (2, 4)
    return same_kind and all((*down.shape, *up.shape)) and up.shape[2:] in ((), (1, 1))

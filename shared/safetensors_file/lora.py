"""Which modules a LoRA file changes, by its tensor names, shapes and metadata.

Loaders drop what they do not know and render the base model without an error; so a file is refused here unless every
tensor belongs to a whole pair of a known family. Compare `modules` with what the loader applied.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from shared.errors import RefusedCheckpointError
from shared.safetensors_file.records import HASH_PROMISE, Checkpoint, Header, Tensor
from shared.safetensors_file.refusals import refused, shown
from shared.safetensors_file.values import REAL_DTYPES, scalar

Role = Literal["down", "up", "alpha"]


class Family(StrEnum):
    """Who names tensors like this."""

    KOHYA = "kohya"  # lora_unet_..., lora_te_..., with lora_down / lora_up / alpha
    DIFFUSERS = "diffusers"  # the model's names: unet. ..., text_encoder. ..., with lora_A / lora_B or older ends


_ROLES: dict[str, Role] = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    # how diffusers ended names before it took to peft; the last two follow `to_q_lora` and the like
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "down.weight": "down",
    "up.weight": "up",
    "alpha": "alpha",
}
_PATTERNS = {
    Family.KOHYA: re.compile(r"(lora_(?:unet|te|te1|te2|te3)_[^.]+)\.(lora_down\.weight|lora_up\.weight|alpha)"),
    Family.DIFFUSERS: re.compile(
        r"((?:unet|transformer|text_encoder|text_encoder_2|text_encoder_3|base_model)\..+)"
        r"\.(lora_[AB]\.weight|lora(?:_linear_layer)?\.(?:down|up)\.weight|(?<=_lora\.)(?:down|up)\.weight|alpha)"
    ),
}


_PEFT_METADATA = "lora_adapter_metadata"  # diffusers saves the adapter's configuration there, as JSON


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One changed layer: W + (alpha / rank) * up @ down; `alpha` None means alpha = rank.

    `spatial` tells a kernel larger than 1x1, whose rank and alpha trainers set apart from the others'. `down` and `up`
    name the pair's tensors in the file.
    """

    name: str
    rank: int
    alpha: float | None
    spatial: bool = False
    down: str = field(default="", compare=False, repr=False)
    up: str = field(default="", compare=False, repr=False)

    @property
    def scale(self) -> float:
        """What up @ down is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


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
        RefusedCheckpointError: unknown names, half modules, mismatching ranks, impossible shapes, dtypes or alphas.
    """
    family, parts = _grouped(checkpoint)
    needed: set[Role] = {"down", "up"}
    # sd-scripts writes an alpha for every module: a file that lost some would be applied at another strength
    if any("alpha" in roles for roles in parts.values()) or "ss_network_alpha" in checkpoint.metadata:
        needed.add("alpha")
    halves = {name: needed - roles.keys() for name, roles in parts.items()}
    missing = [f"{shown(name)} has no {' and no '.join(sorted(lacks))}" for name, lacks in halves.items() if lacks]
    if missing:
        raise refused(
            checkpoint.path,
            "half_pair",
            f"{len(missing)} of {len(parts)} modules lack a part: {'; '.join(missing[:3])}; save it again",
        )
    if HASH_PROMISE in checkpoint.metadata:
        _require_uniform(checkpoint, parts)
    alphas = _PeftAlphas.of(checkpoint) if family is Family.DIFFUSERS else _PeftAlphas({}, {})
    return LoraLayout(family, tuple(_module(checkpoint, name, parts[name], alphas) for name in sorted(parts)))


def lora_ranks(header: Header) -> dict[str, int]:
    """Return the rank of each module of a file that `lora_modules` has accepted, by the header alone."""
    _, parts = _grouped(header)
    return {name: header.tensors[roles["down"]].shape[0] for name, roles in parts.items() if "down" in roles}


def _grouped(checkpoint: Header) -> tuple[Family, dict[str, dict[Role, str]]]:
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


def _require_uniform(checkpoint: Checkpoint, parts: Mapping[str, Mapping[Role, str]]) -> None:
    """Refuse one tensor that is described otherwise than its like: the promised hash covers the data alone.

    Who promises the hash, sd-scripts and our trainer, saves all weights in one dtype and all alphas in one dtype and
    shape.
    """
    for role in ("down", "up", "alpha"):
        tensors = [checkpoint.tensors[roles[role]] for roles in parts.values() if role in roles]
        kinds = Counter((tensor.dtype, tensor.shape if role == "alpha" else None) for tensor in tensors)
        if len(kinds) > 1:
            shapes = " or shape" if role == "alpha" else ""
            raise refused(
                checkpoint.path,
                "lora_alpha" if role == "alpha" else "lora_dtype",
                f"{min(kinds.values())} of its {role} tensors have another dtype{shapes} than the others, which the "
                f"writers of {HASH_PROMISE} never do; save it again",
            )


def _module(checkpoint: Checkpoint, name: str, parts: Mapping[Role, str], peft_alphas: _PeftAlphas) -> LoraModule:
    down, up = checkpoint.tensors[parts["down"]], checkpoint.tensors[parts["up"]]

    def refusal(code: str, reason: str) -> RefusedCheckpointError:
        return refused(checkpoint.path, code, f"module {shown(name)}: {reason}")

    for tensor in (down, up):
        if tensor.dtype not in REAL_DTYPES:
            raise refusal("lora_dtype", f"its weights are {down.dtype} and {up.dtype}; floating-point ones are needed")
    if not _is_pair(down, up):
        raise refusal(
            "lora_shape",
            f"down {list(down.shape)} and up {list(up.shape)} are neither two matrices nor a square convolution "
            "and its 1x1 convolution",
        )
    if down.shape[0] != up.shape[1]:
        raise refusal("rank_mismatch", f"down has rank {down.shape[0]}, up has rank {up.shape[1]}")
    spatial = any(size > 1 for size in down.shape[2:])
    if "alpha" not in parts:
        return LoraModule(name, down.shape[0], peft_alphas.of_module(name), spatial, parts["down"], parts["up"])
    entry = checkpoint.tensors[parts["alpha"]]
    start, end = checkpoint.bounds(parts["alpha"])
    alpha = scalar(checkpoint.raw[start:end], entry.dtype) if entry.shape in ((), (1,)) else None
    if alpha is None or alpha <= 0:
        raise refusal("lora_alpha", f"alpha is {entry.dtype} {list(entry.shape)} {alpha}; one number above 0 is needed")
    return LoraModule(name, down.shape[0], alpha, spatial, parts["down"], parts["up"])


@dataclass(frozen=True, slots=True)
class _PeftAlphas:
    """The alphas that diffusers keeps in the metadata: by model ("unet"), and by module where they differ."""

    models: Mapping[str, float]
    modules: Mapping[str, float]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _PeftAlphas:
        """Read them.

        Raises:
            RefusedCheckpointError: they cannot be read, or scale otherwise than alpha / rank.
        """
        text = checkpoint.metadata.get(_PEFT_METADATA)
        if text is None:
            return cls({}, {})
        try:
            settings = json.loads(text)
        except (ValueError, RecursionError):
            settings = None
        if not isinstance(settings, dict):
            raise refused(checkpoint.path, "lora_alpha", f"{_PEFT_METADATA} is no JSON object; save it again")
        models: dict[str, float] = {}
        modules: dict[str, float] = {}
        for key, value in settings.items():
            model, _, setting = key.rpartition(".")
            if setting == "lora_alpha" and _is_alpha(value):
                models[model] = float(value)
            elif setting == "alpha_pattern" and _is_pattern(value):
                modules |= {f"{model}.{module}": float(alpha) for module, alpha in value.items()}
            elif setting == "lora_alpha" or (setting in ("alpha_pattern", "use_rslora", "use_dora") and value):
                raise refused(
                    checkpoint.path,
                    "lora_alpha",
                    f"{_PEFT_METADATA} has {shown(key)}: {value!r:.60}; save it in kohya's form",
                )
        return cls(models, modules)

    def of_module(self, name: str) -> float | None:
        """Return a module's alpha; None where nothing is said, which means its rank.

        As in peft, a key names the modules whose path is it or ends with it.
        """
        model, _, path = name.partition(".")
        while path:
            if (alpha := self.modules.get(f"{model}.{path}")) is not None:
                return alpha
            path = path.partition(".")[2]
        return self.models.get(model)


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 1e9  # type: ignore[operator]


def _is_pattern(value: object) -> bool:
    """Whether it maps plain module paths to alphas; peft allows regular expressions, which no trainer writes."""
    return isinstance(value, dict) and all(
        re.fullmatch(r"[\w.]+", key) and _is_alpha(alpha) for key, alpha in value.items()
    )


def _is_pair(down: Tensor, up: Tensor) -> bool:
    """Matrices (rank, in) and (out, rank), or kernels (rank, in, k, k) and (out, rank, 1, 1)."""
    same_kind = len(down.shape) == len(up.shape) and len(up.shape) in (2, 4)
    square = len(set(down.shape[2:])) < 2  # as every kernel of a Stable Diffusion model
    return same_kind and square and all((*down.shape, *up.shape)) and up.shape[2:] in ((), (1, 1))

"""A LoRA to begin a training with."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.errors import SettingsError

_ROUNDED = 1e-2  # of an alpha in bfloat16


def load_start_weights(network: nn.Module, path: Path) -> None:
    """Give the network the weights of a file: of just its layers, with its ranks and alphas.

    Raises:
        SettingsError: the file is none, or has other layers, ranks or alphas; the network is as before.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _refusal(path, f"it could not be read ({error}); name a LoRA in safetensors") from error
    own = network.state_dict()
    if lacking := [name for name in own if name not in found]:
        why = f"it lacks {len(lacking)} of {len(own)} tensors, first {lacking[0]}; train only the parts that it has"
        raise _refusal(path, f"{why}, with the same network_args, on the same kind of base model")
    if further := sorted(found.keys() - own.keys()):
        why = f"it has {len(further)} tensors that this training lacks, first {further[0]}; train all that it has"
        raise _refusal(path, why)
    for name, tensor in own.items():
        _require_same(path, name, found[name], tensor)
    weights = {name: tensor for name, tensor in found.items() if not name.endswith("alpha")}  # those are rounded
    network.load_state_dict({**own, **weights})


def _require_same(path: Path, name: str, found: Tensor, own: Tensor) -> None:
    if found.shape != own.shape:
        ranks = tuple(int(tensor.shape[1 if name.endswith("up.weight") else 0]) for tensor in (found, own))
        why = f"{name} has rank {ranks[0]}, not {ranks[1]}; set network_dim, or conv_dim of network_args, to it"
        if ranks[0] == ranks[1]:
            why = f"{name} is {list(found.shape)}, not {list(own.shape)}; it was made for another base model"
        raise _refusal(path, why)
    if name.endswith("alpha") and not math.isclose(float(found), float(own), rel_tol=_ROUNDED):
        why = f"{name} is {float(found):g}, not {float(own):g}; set network_alpha, or conv_alpha of network_args, to it"
        raise _refusal(path, why)
    if not torch.isfinite(found).all():
        raise _refusal(path, f"{name} holds numbers that are not finite; begin with another file")


def _refusal(path: Path, why: str) -> SettingsError:
    return SettingsError("network_weights", str(path), why)

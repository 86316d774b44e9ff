"""LPIPS with its features computed once per picture instead of once per pair."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluator_daemon.metrics.base import Picture, loaded_once
from evaluator_daemon.renderers.base import is_out_of_memory
from shared.metric_names import is_random_backbone

# one layer that only this backbone has, and its shape -> the package's name for it
_BACKBONES = {
    "alex": ("features.0.weight", (64, 3, 11, 11)),
    "vgg": ("features.28.weight", (512, 512, 3, 3)),
    "squeeze": ("features.3.squeeze.weight", (16, 64, 1, 1)),
}


# of a file that was cut short or is something else, the unpickler complains in any of these ways
_DAMAGED = (OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError, pickle.UnpicklingError)


class LpipsNetwork:
    """The `lpips` package's own network, scaling and heads.

    Args:
        kind: "alex", "vgg" or "squeeze".
        weights: torchvision's tensors by name; None for a random backbone, which is only good for tests.
    """

    def __init__(self, kind: str, weights: dict[str, Tensor] | None, device: str) -> None:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            # lpips 0.1.4 asks torchvision for `pretrained`, an argument that torchvision deprecates in favour of
            # `weights`; what it asks for (nothing is downloaded) stays right
            warnings.filterwarnings("ignore", "(The parameter 'pretrained'|Arguments other than a weight enum)")
            torch.manual_seed(0)  # a random backbone is the same everywhere
            self._lpips: Any = lpips.LPIPS(net=kind, pnet_rand=True, verbose=False)
        if weights is not None:
            own = {name: weights[_torchvision_name(name)] for name in self._lpips.net.state_dict()}
            self._lpips.net.load_state_dict(own, strict=True)
        self._device = torch.device(device)
        self._lpips.to(self._device)
        backbone = "random" if weights is None else kind
        self.description = f"lpips {version('lpips')}, backbone: {backbone}"

    @torch.inference_mode()
    def mean_distances(self, pictures: Sequence[Picture]) -> list[float]:
        """Return each picture's mean distance to all the others."""
        distances = self.distances(pictures)
        return [float(value) for value in distances.sum(axis=1) / (len(pictures) - 1)]

    @torch.inference_mode()
    def distances(self, pictures: Sequence[Picture]) -> NDArray[np.float64]:
        """Return the (n, n) LPIPS distances, as `lpips.LPIPS` gives them pair by pair."""
        layers = [torch.cat(parts) for parts in zip(*map(self._features, pictures), strict=True)]
        count = len(pictures)
        found = np.zeros((count, count))
        for i in range(count - 1):
            total: Tensor = torch.zeros(count - 1 - i, device=self._device)
            for head, features in zip(self._lpips.lins, layers, strict=True):
                total += head((features[i : i + 1] - features[i + 1 :]) ** 2).mean(dim=(1, 2, 3))
            found[i, i + 1 :] = total.double().cpu().numpy()
        return found + found.T

    def _features(self, picture: Picture) -> list[Tensor]:
        pixels = torch.from_numpy(picture.copy()).to(self._device).permute(2, 0, 1)[None].float() / 127.5 - 1
        outputs = self._lpips.net(self._lpips.scaling_layer(pixels))
        return [lpips.normalize_tensor(output) for output in outputs]


def load_lpips(file: Path, device: str) -> tuple[LpipsNetwork | None, str]:
    """Return the network with the backbone of a torchvision file, or None and why it cannot be used.

    Args:
        file: weights of AlexNet, VGG16 or SqueezeNet 1.1 as torchvision distributes them, or the word "random".
    """
    key = ("LPIPS", file, device)
    if is_random_backbone(file):
        return loaded_once(key, lambda: LpipsNetwork("alex", None, device)), ""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        return None, f"--lpips-weights {file} cannot be read ({reason}); download it again"
    kind = _kind_of(weights)
    if kind is None:
        return None, (
            f"--lpips-weights {file} holds neither AlexNet, VGG16 nor SqueezeNet 1.1 as torchvision distributes them; "
            "name such a file"
        )
    try:
        return loaded_once(key, lambda: LpipsNetwork(kind, weights, device)), ""
    except (KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        return None, f"--lpips-weights {file} lacks parts of {kind} ({reason}); download it again"


def _kind_of(weights: Any) -> str | None:
    if not isinstance(weights, dict):
        return None
    for kind, (name, shape) in _BACKBONES.items():
        if isinstance(tensor := weights.get(name), Tensor) and tuple(tensor.shape) == shape:
            return kind
    return None


def _torchvision_name(name: str) -> str:
    """slice2.3.weight -> features.3.weight."""
    return f"features.{name.partition('.')[2]}"

"""The torch optimizers by the names users know from sd-scripts. Light: a name is checked without importing torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.machinery import PathFinder
from types import MappingProxyType

from shared.errors import UserError

# bitsandbytes' optimizers run on CPUs, too, there without paging; small tensors (below 4096 numbers) keep 32 bits.
_BITSANDBYTES = (
    *("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"),
    *("Lion", "Lion8bit", "PagedLion8bit", "AdEMAMix8bit", "PagedAdEMAMix8bit"),
)
_TORCH = ("AdamW", "Adam", "Adamax", "Adadelta", "Adagrad", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
_DADAPTATION = ("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD")
_SCHEDULE_FREE = ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")

NAMED: Mapping[str, str] = MappingProxyType(
    {name: f"torch.optim.{name}" for name in _TORCH}
    | {name: f"bitsandbytes.optim.{name}" for name in _BITSANDBYTES}
    | {
        "Adafactor": "transformers.optimization.Adafactor",
        "Prodigy": "prodigyopt.Prodigy",
        "SGDNesterov": "torch.optim.SGD",
        "SGDNesterov8bit": "bitsandbytes.optim.SGD8bit",
    }
)
"""Name, which is found in any spelling of capitals -> the class."""

OPTIONAL: Mapping[str, str] = MappingProxyType(
    {name: f"dadaptation.{name}" for name in _DADAPTATION}
    | {name: f"dadaptation.experimental.{name}" for name in ("DAdaptAdamPreprint", "DAdaptAdanIP")}
    | {"DAdaptation": "dadaptation.experimental.DAdaptAdamPreprint"}
    | {name: f"schedulefree.{name}" for name in _SCHEDULE_FREE}
)
"""Those whose package comes not with this program; used where it is installed."""

_BY_LOWER = {name.lower(): target for name, target in {**NAMED, **OPTIONAL}.items()}


def class_path(optimizer_type: str) -> str:
    """Return package.module.Class for a known name; anything else, such as a path, unchanged."""
    return _BY_LOWER.get(optimizer_type.lower(), optimizer_type)


def has_one_rate(optimizer_type: str) -> bool:
    """Whether it finds its step size itself, one for all that is trained: Prodigy and the D-Adaptation family."""
    return class_path(optimizer_type).rpartition(".")[2].lower().startswith(("prodigy", "dadapt"))


def is_schedule_free(optimizer_type: str) -> bool:
    """Whether it needs no course of the learning rates; by its name, as in sd-scripts."""
    return optimizer_type.lower().endswith("schedulefree")


def require_optimizer(optimizer_type: str) -> None:
    """Refuse what cannot be an optimizer here. Whether a module has the class is only known once it is imported.

    Raises:
        UserError: neither a known name nor the path of a module that is installed.
    """
    where = f"optimizer_type: {optimizer_type!r} will not do"
    module, _, _ = class_path(optimizer_type).rpartition(".")
    if not module:
        close = difflib.get_close_matches(optimizer_type, NAMED, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(sorted(NAMED))}"
        raise UserError(f"{where}; {hint}, or write package.module.Class")
    if not _is_installed(module):
        raise UserError(f"{where}; there is no module {module}, so install its package or correct the name")


def _is_installed(module: str) -> bool:
    """Find the module's file; unlike importlib.util.find_spec it imports no package on the way."""
    path = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True

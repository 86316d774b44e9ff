"""The torch optimizers by the names users know from sd-scripts. Light: a name is checked without importing torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.machinery import PathFinder
from types import MappingProxyType

from shared.errors import UserError

# bitsandbytes' optimizers run on CPUs, too; small tensors (below 4096 numbers) keep 32 bits.
NAMED: Mapping[str, str] = MappingProxyType(
    {
        "AdamW": "torch.optim.AdamW",
        "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
        "Lion": "bitsandbytes.optim.Lion",
        "Lion8bit": "bitsandbytes.optim.Lion8bit",
        "Adafactor": "transformers.optimization.Adafactor",
        "Prodigy": "prodigyopt.Prodigy",
    }
    # The others of torch.optim that train dense weights in one pass.
    | {
        name: f"torch.optim.{name}"
        for name in ("Adam", "Adamax", "Adadelta", "Adagrad", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
    }
)
"""Name, which is found in any spelling of capitals -> the class."""

_BY_LOWER = {name.lower(): target for name, target in NAMED.items()}


def class_path(optimizer_type: str) -> str:
    """Return package.module.Class for a name of NAMED; anything else, such as a path, unchanged."""
    return _BY_LOWER.get(optimizer_type.lower(), optimizer_type)


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

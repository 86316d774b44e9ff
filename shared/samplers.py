"""The image samplers a plan may name, and what other programs call them. No network library is needed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

DEFAULT_SAMPLER = "dpmpp_2m_karras"

SAMPLER_TITLES: Mapping[str, str] = MappingProxyType(
    {DEFAULT_SAMPLER: "DPM++ 2M Karras", "ddim": "DDIM", "euler": "Euler"}
)
"""Name in the plan -> its name in AUTOMATIC1111's web UI. All are deterministic: one start, one picture."""

_OTHER_NAMES = {"k_euler": "euler", "dpm++_2m_karras": DEFAULT_SAMPLER}  # sd-scripts' and its documentation's


def find_sampler(name: str) -> str | None:
    """Return the plan's name of a sampler by any of its names; None when we do not have it."""
    wanted = name.strip().lower()
    if wanted in SAMPLER_TITLES:
        return wanted
    titles = {title.lower(): key for key, title in SAMPLER_TITLES.items()}
    return titles.get(wanted) or _OTHER_NAMES.get(wanted)

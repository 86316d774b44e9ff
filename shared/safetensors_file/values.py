"""Number formats: which bytes are NaN or Inf, zero, or a scalar.

A number is not finite exactly when its exponent bits are all ones (IEEE 754), and these lie in its one or two most
significant bytes. Data is little-endian, so "every n-th byte" of a tensor holds those bytes; slicing them out and
searching them runs at memory speed without numpy.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

# What safetensors.torch 0.8 loads. Formats below one byte (F4, F6) and F8_E8M0 have no torch dtype there.
ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8,
    "F8_E4M3": 1, "F8_E4M3FNUZ": 1, "F8_E5M2": 1, "F8_E5M2FNUZ": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Known dtypes and their bytes per element."""


def _flags(mask: int, value: int) -> bytes:
    """Return a translation table: 1 for the bytes whose masked bits equal `value`, else 0."""
    return bytes(byte & mask == value for byte in range(256))


@dataclass(frozen=True, slots=True)
class _FloatFormat:
    """`top` and `second` flag the values of the two most significant bytes that together mean NaN or Inf."""

    width: int  # bytes per real number
    top: bytes
    second: bytes | None = None  # None: the top byte alone decides

    @property
    def suspects(self) -> tuple[int, ...]:
        return tuple(byte for byte in range(256) if self.top[byte])


_SINGLE = _flags(0x7F, 0x7F), _flags(0x80, 0x80)  # 8 exponent bits: 7 in the top byte, 1 in the next
_FLOATS = {
    "F64": _FloatFormat(8, _flags(0x7F, 0x7F), _flags(0xF0, 0xF0)),
    "F32": _FloatFormat(4, *_SINGLE),
    "C64": _FloatFormat(4, *_SINGLE),  # two F32
    "BF16": _FloatFormat(2, *_SINGLE),
    "F16": _FloatFormat(2, _flags(0x7C, 0x7C)),
    "F8_E5M2": _FloatFormat(1, _flags(0x7C, 0x7C)),
    "F8_E4M3": _FloatFormat(1, _flags(0x7F, 0x7F)),  # "fn": one NaN per sign, no Inf
    "F8_E4M3FNUZ": _FloatFormat(1, _flags(0xFF, 0x80)),  # "fnuz": NaN takes the place of -0.0
    "F8_E5M2FNUZ": _FloatFormat(1, _flags(0xFF, 0x80)),
}
_SUSPECTS = {dtype: layout.suspects for dtype, layout in _FLOATS.items()}

REAL_DTYPES = frozenset(_FLOATS) - {"C64"}
"""The dtypes of real floating-point numbers."""


def is_finite(raw: bytes, start: int, end: int, dtype: str) -> bool:
    """Say whether raw[start:end], numbers of `dtype`, holds neither NaN nor Inf; integers always do."""
    layout = _FLOATS.get(dtype)
    if layout is None:
        return True
    top = raw[start + layout.width - 1 : end : layout.width]
    if not any(byte in top for byte in _SUSPECTS[dtype]):  # memchr; sane weights end here
        return True
    if layout.second is None:
        return False
    second = raw[start + layout.width - 2 : end : layout.width]
    # Both flags on the same number: an AND of two integers of one byte per number, still no Python loop.
    both = int.from_bytes(top.translate(layout.top), "little") & int.from_bytes(
        second.translate(layout.second), "little"
    )
    return both == 0


def is_zero(raw: bytes, start: int, end: int, dtype: str) -> bool:
    """Say whether every number in raw[start:end] is zero; -0.0 is."""
    rest = raw[start:end].translate(None, b"\0")
    if not rest or dtype not in _FLOATS:
        return not rest
    width = _FLOATS[dtype].width
    signs = raw[start + width - 1 : end : width].count(0x80)
    return rest.count(0x80) == len(rest) == signs


_SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}


def scalar(data: bytes, dtype: str) -> float | None:
    """Return the one number in `data`; None for a dtype nobody stores a scalar in."""
    if dtype == "BF16":  # the upper half of an F32
        data, dtype = b"\0\0" + data, "F32"
    code = _SCALARS.get(dtype)
    return None if code is None else float(struct.unpack(code, data)[0])

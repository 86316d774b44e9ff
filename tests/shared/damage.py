"""Seeded damage to weight files, as disks, networks, killed writers and careless tools do it; a class each by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.shared.weight_files import data_section, file_of

PAGE = 4096
NOT_FINITE = (b"\x00\x7e", b"\x01\xfc", b"\x00\x7c", b"\x00\xfc")  # NaN, NaN, Inf, -Inf as F16


@dataclass(frozen=True)
class Victim:
    """A file to damage.

    Args:
        content: a sound F16 file.
        relative: another sound file: an earlier checkpoint of the same training, where there is one.
    """

    content: bytes
    relative: bytes

    @property
    def data_start(self) -> int:
        return len(self.content) - len(data_section(self.content))

    @property
    def header(self) -> dict:
        return json.loads(self.content[8 : self.data_start])


Damage = Callable[[Random, Victim], bytes]


def _span(random: Random, low: int, high: int, longest: int = 3 * PAGE) -> tuple[int, int]:
    """Return a range of at least one byte within [low, high)."""
    start = random.randrange(low, high)
    return start, min(high, start + random.choice((1, 2, 8, random.randint(1, longest))))


# ------------------------------------------------------------------------------------------------------- bytes


def _truncated(random: Random, victim: Victim) -> bytes:
    return victim.content[: random.randrange(len(victim.content))]


def _flipped(low: Callable[[Victim], int], high: Callable[[Victim], int]) -> Damage:
    def damage(random: Random, victim: Victim) -> bytes:
        at = random.randrange(low(victim), high(victim))
        return _replaced(victim.content, at, bytes([victim.content[at] ^ 1 << random.randrange(8)]))

    return damage


def _changed(low: Callable[[Victim], int], high: Callable[[Victim], int]) -> Damage:
    def damage(random: Random, victim: Victim) -> bytes:
        at = random.randrange(low(victim), high(victim))
        return _replaced(victim.content, at, bytes([random.choice([b for b in range(256) if b != victim.content[at]])]))

    return damage


def _replaced(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def _inserted(random: Random, victim: Victim) -> bytes:
    at = random.randrange(len(victim.content))
    return victim.content[:at] + random.randbytes(random.randint(1, 64)) + victim.content[at:]


def _removed(random: Random, victim: Victim) -> bytes:
    start, end = _span(random, 0, len(victim.content))
    return victim.content[:start] + victim.content[end:]


def _duplicated(random: Random, victim: Victim) -> bytes:
    start, end = _span(random, 0, len(victim.content))
    return victim.content[:end] + victim.content[start:]


def _swapped(random: Random, victim: Victim) -> bytes:
    size = random.choice((1, 2, 16, 512, PAGE))
    first, second = sorted(random.sample(range(len(victim.content) - size + 1), 2))
    content = _replaced(victim.content, first, victim.content[second : second + size])
    return _replaced(content, second, victim.content[first : first + size])


def _zeroed(random: Random, victim: Victim) -> bytes:
    start, end = _span(random, 0, len(victim.content))
    return _replaced(victim.content, start, bytes(end - start))


def _lost_pages(random: Random, victim: Victim) -> bytes:
    """Pages that were never written before the power failed read as zeros."""
    start = random.randrange(0, len(victim.content), PAGE)
    end = min(len(victim.content), start + PAGE * random.randint(1, 4))
    return _replaced(victim.content, start, bytes(end - start))


def _lost_end(random: Random, victim: Victim) -> bytes:
    start = random.randrange(0, len(victim.content), PAGE)
    return victim.content[:start] + bytes(len(victim.content) - start)


def _with_tail(random: Random, victim: Victim) -> bytes:
    tail = random.choice((bytes, random.randbytes))(random.randint(1, 2 * PAGE))
    return victim.content + tail


def _joined(random: Random, victim: Victim) -> bytes:
    return random.choice(
        (
            victim.content + victim.relative,
            victim.relative + victim.content,
            victim.content[: victim.data_start] + data_section(victim.relative),
            victim.content[: random.randrange(len(victim.content))] + victim.relative,
        )
    )


def _mixed(random: Random, victim: Victim) -> bytes:
    """A block of an older version of the file, at its own place in the data."""
    data, older = data_section(victim.content), data_section(victim.relative)
    start, end = _span(random, 0, min(len(data), len(older)), 8 * PAGE)
    return victim.content[: victim.data_start] + _replaced(data, start, older[start:end])


def _not_finite(random: Random, victim: Victim) -> bytes:
    at = victim.data_start + 2 * random.randrange(len(data_section(victim.content)) // 2)
    return _replaced(victim.content, at, random.choice(NOT_FINITE))


# ------------------------------------------------------------------------------------------------------- headers


def _edited(change: Callable[[Random, dict, list[str]], None]) -> Damage:
    """A header written anew, well-formed and padded as before; `change` gets it and the tensors' names."""

    def damage(random: Random, victim: Victim) -> bytes:
        header = victim.header
        change(random, header, [name for name in header if name != "__metadata__"])
        return _with_header(json.dumps(header, separators=(",", ":"), ensure_ascii=False), victim)

    return damage


def _with_header(text: str, victim: Victim) -> bytes:
    encoded = text.encode()
    return file_of(encoded.ljust(-(-len(encoded) // 8) * 8), data_section(victim.content))


def _change_offsets(random: Random, header: dict, names: list[str]) -> None:
    offsets = header[random.choice(names)]["data_offsets"]
    offsets[random.randrange(2)] += random.choice((-(2**40), -2, -1, 1, 2, 64, 2**33, 2**64))


def _swap_offsets(random: Random, header: dict, names: list[str]) -> None:
    first, second = (header[name] for name in random.sample(names, 2))
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]


def _change_shape(random: Random, header: dict, names: list[str]) -> None:
    entry = header[random.choice(names)]
    shape = entry["shape"]
    entry["shape"] = random.choice((shape[::-1], [*shape, 1], [*shape, 0], [2, *shape], shape[1:], [-1], [2**62, 4]))


def _change_dtype(random: Random, header: dict, names: list[str]) -> None:
    other = ("F32", "I16", "U16", "F8_E4M3", "F64", "C64", "F4", "f16", "", None, 16)
    header[random.choice(names)]["dtype"] = random.choice(other)


def _change_width_of_exponent(random: Random, header: dict, names: list[str]) -> None:
    header[random.choice(names)]["dtype"] = "BF16"


def _rename(random: Random, header: dict, names: list[str]) -> None:
    name = random.choice(names)
    at = random.randrange(len(name))
    new = random.choice((name[:at] + name[at + 1 :], name + "x", name.replace("down", "up"), "../" + name, "a" * 600))
    if new not in header:
        header[new] = header.pop(name)


def _drop(random: Random, header: dict, names: list[str]) -> None:
    for name in random.sample(names, random.choice((1, 2, len(names)))):
        del header[name]


def _change_metadata(random: Random, header: dict, names: list[str]) -> None:
    table = header.setdefault("__metadata__", {})
    odd: list[object] = ["text", "", 1, None, {}, "\u2764", "1" * 1000]
    table[random.choice([*table, "ss_new"])] = random.choice(odd)


def _change_hash(random: Random, header: dict, names: list[str]) -> None:
    """The promise alone is damaged, or lost."""
    table = header.setdefault("__metadata__", {})
    if random.random() < 0.2:
        table.pop("sshs_model_hash", None)
    else:
        table["sshs_model_hash"] = random.choice((random.randbytes(32).hex(), "", "0" * 64))


def _reorder(random: Random, header: dict, names: list[str]) -> None:
    for name in random.sample(names, len(names)):
        header[name] = header.pop(name)


def _twice(random: Random, victim: Victim) -> bytes:
    """One key of the header twice, which a Python dict cannot hold."""
    header = victim.header
    name = random.choice(list(header))
    pair = f"{json.dumps(name)}:{json.dumps(header[name])}"
    return _with_header(victim.content[8 : victim.data_start].decode().rstrip()[:-1] + "," + pair + "}", victim)


DAMAGES: dict[str, Damage] = {
    "cut short": _truncated,
    "a bit of the length": _flipped(lambda v: 0, lambda v: 8),
    "a bit of the header": _flipped(lambda v: 8, lambda v: v.data_start),
    "a bit of the data": _flipped(lambda v: v.data_start, lambda v: len(v.content)),
    "a byte of the length": _changed(lambda v: 0, lambda v: 8),
    "a byte of the header": _changed(lambda v: 8, lambda v: v.data_start),
    "a byte of the data": _changed(lambda v: v.data_start, lambda v: len(v.content)),
    "a range inserted": _inserted,
    "a range removed": _removed,
    "a range doubled": _duplicated,
    "two ranges swapped": _swapped,
    "a range zeroed": _zeroed,
    "pages lost": _lost_pages,
    "the end lost": _lost_end,
    "a tail": _with_tail,
    "two files in one": _joined,
    "a block of an older version": _mixed,
    "a number that is none": _not_finite,
    "header: an offset": _edited(_change_offsets),
    "header: two offsets swapped": _edited(_swap_offsets),
    "header: a shape": _edited(_change_shape),
    "header: a dtype": _edited(_change_dtype),
    "header: BF16 for F16": _edited(_change_width_of_exponent),
    "header: a name": _edited(_rename),
    "header: tensors dropped": _edited(_drop),
    "header: the metadata": _edited(_change_metadata),
    "header: sshs_model_hash": _edited(_change_hash),
    "header: another order": _edited(_reorder),
    "header: a key twice": _twice,
}

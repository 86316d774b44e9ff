"""Names of files with a number in them: "checkpoint-{step}/*.safetensors" finds the files and reads the number.

`*` stands for any part of a name, `**` for any folders, `{epoch}` and `{step}` for digits.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

Unit = Literal["epoch", "step"]

_PARTS = re.compile(r"\*\*/|\*\*|\*|\{epoch\}|\{step\}")
_EXPRESSIONS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "{epoch}": r"(?P<epoch>\d+)", "{step}": r"(?P<step>\d+)"}
_GLOBS = {"{epoch}": "*", "{step}": "*"}


@dataclass(frozen=True)
class Match:
    """A file or folder that fits a pattern.

    Args:
        path: where it is.
        unit: what its number counts; None where the pattern asks for none.
        number: that number; 0 without one.
    """

    path: Path
    unit: Unit | None
    number: int


@dataclass(frozen=True)
class Pattern:
    """A pattern of paths below a folder.

    Raises:
        ValueError: it leaves the folder, or asks for more than one number.
    """

    text: str

    def __post_init__(self) -> None:
        path = PurePosixPath(self.text)
        if not self.text or path.is_absolute() or ".." in path.parts:
            raise ValueError("write a path below {output_dir}, without a leading / and without ..")
        if any("**" in part and part != "**" for part in path.parts):
            raise ValueError("write ** alone between two /, for any folders; within a name * is any part of it")
        if self.text.count("{epoch}") + self.text.count("{step}") > 1:
            raise ValueError("write {epoch} or {step}, once; * stands for other numbers")

    @property
    def unit(self) -> Unit | None:
        return "epoch" if "{epoch}" in self.text else "step" if "{step}" in self.text else None

    def find(self, folder: Path) -> list[Match]:
        """Return what fits below `folder`, the lowest number first; a missing folder has nothing."""
        parts = [part for part in re.split(f"({_PARTS.pattern})", self.text) if part]
        expression = re.compile("".join(_EXPRESSIONS.get(part, re.escape(part)) for part in parts))
        # The same for glob, to which ? and [ would be more than themselves.
        widely = "".join(_GLOBS.get(part, part if part in _EXPRESSIONS else glob.escape(part)) for part in parts)
        unit, found = self.unit, []
        for path in folder.glob(widely):
            if fits := expression.fullmatch(path.relative_to(folder).as_posix()):
                found.append(Match(path, unit, int(fits[unit]) if unit else 0))
        return sorted(found, key=lambda match: (match.number, match.path.name))

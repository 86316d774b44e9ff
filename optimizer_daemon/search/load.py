"""Reads search spaces from files: those that come with the program by name, a user's own by path."""

from __future__ import annotations

from pathlib import Path

from optimizer_daemon.search.space import SearchSpace, parse_space
from shared.errors import UserError

_PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Return the names of the search spaces that come with the program, oldest first."""
    return sorted(path.stem.replace("_", ".") for path in _PRESETS.glob("*.toml"))


def load_space(name_or_path: str | Path) -> SearchSpace:
    """Return a search space by preset name ("v2.1") or from a TOML file.

    A preset's name wins over a file of that name; "./v1" is always a path.

    Raises:
        UserError: neither a preset nor a readable file, or its content will not do.
    """
    name = str(name_or_path)
    path = _PRESETS / f"{name.replace('.', '_')}.toml" if name in preset_names() else Path(name_or_path)
    remedy = f"give a TOML file or one of the presets {', '.join(preset_names())}"
    text = read_text(path, "search space", remedy)
    return parse_space(text, str(path.name if path.parent == _PRESETS else path))


def read_text(path: Path, what: str, remedy: str) -> str:
    """Return the text of a file of the user's.

    Args:
        what: how messages call such a file.
        remedy: what to do where there is none.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors put a byte order mark in front
    except FileNotFoundError as error:
        raise UserError(f"no {what} {str(path)!r}: there is no such file; {remedy}") from error
    except OSError as error:
        raise UserError(f"{what} {str(path)!r} cannot be read ({error.strerror}); {remedy}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {str(path)!r}: byte {error.start} is not UTF-8; save it as UTF-8") from error

"""The prompts of an evaluation plan: from a file, in the forms sd-scripts takes, or drawn from the data set's captions.

Options mean what they mean in sd-scripts, but whatever is wrong is refused here: it ignores an option it does not know,
cuts a size to a multiple of 8, and a picture at other settings than asked for would be scored all the same.

Source: kohya-ss/sd-scripts, docs/train_network_advanced.md, "Format of Prompt File".
"""

from __future__ import annotations

import json
import math
import random
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import SettingsError
from shared.samplers import SAMPLER_TITLES, find_sampler
from shared.schemas import PromptOptions
from shared.schemas.plan import SEEDS_END

MULTIPLE_PX = 8
LARGEST_PX = 4096
MOST_STEPS = 1000
LARGEST_CFG_SCALE = 100.0


@dataclass(frozen=True)
class Prompt:
    """One prompt with its options.

    Args:
        where: file and line, for messages; two prompts may be equal without it.
    """

    text: str
    options: PromptOptions = field(default_factory=PromptOptions)
    where: str = field(default="--prompts", compare=False)


@dataclass(frozen=True)
class _Option:
    """One option in its three spellings."""

    field: str  # of PromptOptions
    letter: str  # behind -- in a line
    key: str  # in TOML and JSON


_OPTIONS = (
    _Option("negative_prompt", "n", "negative_prompt"),
    _Option("width", "w", "width"),
    _Option("height", "h", "height"),
    _Option("seed", "d", "seed"),
    _Option("cfg_scale", "l", "scale"),
    _Option("steps", "s", "sample_steps"),
    _Option("sampler", "ss", "sample_sampler"),
)
_RANGES = {  # field -> lowest and highest value
    "width": (MULTIPLE_PX, LARGEST_PX),
    "height": (MULTIPLE_PX, LARGEST_PX),
    "seed": (0, SEEDS_END - 1),
    "steps": (1, MOST_STEPS),
    "cfg_scale": (0.0, LARGEST_CFG_SCALE),
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_STARTS_OPTION = re.compile(r"(?:^|\s)--(?=\w)")  # a dash between blanks, as in "soft -- light", is part of the words


def draw_prompts(captions: Iterable[str], count: int, seed: int) -> tuple[str, ...]:
    """Draw `count` different captions; the same for the same captions in any order. Fewer when there are fewer.

    Raises:
        SettingsError: there is no caption at all.
    """
    known = sorted({" ".join(caption.split()) for caption in captions} - {""})
    if not known:
        raise SettingsError("--prompts", None, "the data set has no captions to draw prompts from; pass a prompt file")
    return tuple(random.Random(seed).sample(known, min(count, len(known))))


def read_prompt_file(path: Path) -> tuple[Prompt, ...]:
    """Return the prompts of a file: *.toml, *.json, and in any other one prompt a line.

    Raises:
        SettingsError: not readable text, no prompt, or one problem with file, line, option, value and remedy.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError("--prompts", str(path), f"name a readable UTF-8 text file ({error})") from error
    read = {".toml": _read_toml, ".json": _read_json}.get(path.suffix.lower(), _read_lines)
    prompts = read(text, path)
    if not prompts:
        raise SettingsError("--prompts", str(path), "it holds no prompt; write one a line")
    return tuple(prompts)


def parse_line(line: str, where: str) -> Prompt:
    """Return the prompt and the options of one line: words, then ` --w 768` and its like in any order.

    Raises:
        SettingsError: an option is unknown, doubled, or its value will not do; there are no words.
    """
    words, *options = _STARTS_OPTION.split(line)
    values: dict[str, Any] = {}
    for option in options:
        letter, _, value = option.strip().partition(" ")
        known = next((one for one in _OPTIONS if one.letter == letter.lower()), None)
        if known is None:
            raise SettingsError(
                where, f"--{letter}", f"there is no such option; {_known('--' + o.letter for o in _OPTIONS)}"
            )
        if known.field in values:
            raise SettingsError(f"{where} --{letter}", value.strip(), "the option is there twice; leave one out")
        if known.field == "negative_prompt" and not value.strip():
            raise SettingsError(f"{where} --{letter}", "", "write a text behind it")
        values[known.field] = _checked(known, value.strip(), f"{where} --{letter}")
    return _prompt(words, values, where)


def _read_lines(text: str, path: Path) -> list[Prompt]:
    lines = [(number, " ".join(line.split())) for number, line in enumerate(text.splitlines(), 1)]
    return [parse_line(line, f"{path} line {n}") for n, line in lines if line and not line.startswith("#")]


def _parsed(loads: Callable[[str], Any], text: str, path: Path, form: str) -> Any:
    try:
        document = loads(text)
        repr(document)  # a value that cannot be shown, such as 0xff... of thousands of digits, has no message either
    except RecursionError as error:
        raise SettingsError("--prompts", str(path), f"mend the {form} (it is nested too deeply)") from error
    except ValueError as error:
        why = str(error).partition("; use sys.")[0]  # advice for programmers
        raise SettingsError("--prompts", str(path), f"mend the {form} ({why})") from error
    return document


def _read_toml(text: str, path: Path) -> list[Prompt]:
    """[prompt] holds what all share, each [[prompt.subset]] one prompt; its own values win."""
    document = _parsed(tomllib.loads, text, path, "TOML")
    table = document.get("prompt")
    subsets = table.get("subset") if isinstance(table, dict) else None
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise SettingsError("--prompts", str(path), "write one [[prompt.subset]] table for each prompt")
    assert isinstance(table, dict)
    if strangers := sorted(document.keys() - {"prompt"}):
        raise SettingsError(
            f"{path}{_line_of(text, strangers[0])}", strangers[0], "only [prompt] is read; leave it out"
        )
    shared = {key: value for key, value in table.items() if key != "subset"}
    prompts = []
    for number, subset in enumerate(subsets, 1):
        lines = {key: _line_of(text, key, number if key in subset else 0) for key in {**shared, **subset}}
        prompts.append(_from_table({**shared, **subset}, f"{path} prompt {number}", lines, path))
    return prompts


def _read_json(text: str, path: Path) -> list[Prompt]:
    """A list of lines, or of tables as in TOML."""
    document = _parsed(json.loads, text, path, "JSON")
    if not isinstance(document, list):
        raise SettingsError("--prompts", str(path), "write a JSON list with one line or one object for each prompt")
    prompts = []
    for number, item in enumerate(document, 1):
        where = f"{path} prompt {number}"
        if half := _SURROGATE.search(json.dumps(item, ensure_ascii=False)):
            raise SettingsError(where, half[0], "that is half a character; write it whole, or both halves")
        if isinstance(item, str):
            prompts.append(parse_line(" ".join(item.split()), where))
        elif isinstance(item, dict):
            prompts.append(_from_table(item, where, {}, path))
        else:
            raise SettingsError(where, item, "write a string or an object")
    return prompts


def _from_table(table: Mapping[str, Any], where: str, lines: Mapping[str, str], path: Path) -> Prompt:
    """Return the prompt of one table.

    Args:
        lines: key -> " line N", where it is known.
    """
    values: dict[str, Any] = {}
    for key, value in table.items():
        at = f"{path}{lines[key]}" if lines.get(key) else where
        if key == "prompt":
            if not isinstance(value, str):
                raise SettingsError(f"{at}: prompt", value, "write the prompt as text")
            continue
        known = next((one for one in _OPTIONS if one.key == key), None)
        if known is None:
            raise SettingsError(at, key, f"there is no such option; {_known(['prompt', *(o.key for o in _OPTIONS)])}")
        values[known.field] = _checked(known, value, f"{at}: {key}")
    at = f"{path}{lines['prompt']}" if lines.get("prompt") else where
    return _prompt(table.get("prompt", ""), values, at)


def _prompt(words: str, values: dict[str, Any], where: str) -> Prompt:
    text = " ".join(words.split())
    if not text:
        raise SettingsError(where, words, "there are no words before the options; write a prompt")
    return Prompt(text, PromptOptions(**values), where)


def _checked(option: _Option, value: Any, where: str) -> Any:
    """Return an option's value in its type; text stands for a number, as in a line."""
    if option.field in ("negative_prompt", "sampler"):
        if not isinstance(value, str) or (not value.strip() and option.field == "sampler"):
            raise SettingsError(where, value, "write a text behind it")
        if option.field == "negative_prompt":
            return " ".join(value.split())
        return _known_sampler(value, where)
    number = _whole(value) if option.field != "cfg_scale" else _number(value)
    if number is None:
        kind = "a number" if option.field == "cfg_scale" else "a whole number"
        raise SettingsError(where, value, f"write {kind}")
    lowest, highest = _RANGES[option.field]
    if not lowest <= number <= highest:
        raise SettingsError(where, value, f"write a value from {lowest:g} to {_shown(highest)}")
    if option.field in ("width", "height") and number % MULTIPLE_PX:
        raise SettingsError(where, value, _multiple_remedy(int(number), MULTIPLE_PX))
    return number


def require_multiple(prompts: Iterable[Prompt], multiple_px: int) -> None:
    """Refuse a size that a base model's latents cannot have.

    Raises:
        SettingsError: with file and line.
    """
    for prompt in prompts:
        for name in ("width", "height"):
            size = getattr(prompt.options, name)
            if size is not None and size % multiple_px:
                raise SettingsError(f"{prompt.where}: {name}", size, _multiple_remedy(size, multiple_px))


def _multiple_remedy(size: int, multiple_px: int) -> str:
    below = size // multiple_px * multiple_px
    near = f"{below} or {below + multiple_px}" if below else str(multiple_px)
    return f"write a multiple of {multiple_px}, such as {near}"


def _known_sampler(name: str, where: str) -> str:
    found = find_sampler(name)
    if found is None:
        raise SettingsError(where, name, f"that sampler is not there; {_known(SAMPLER_TITLES)}")
    return found


def _known(names: Iterable[str]) -> str:
    return f"choose among {', '.join(names)}"


def _whole(value: Any) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,20}", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _line_of(text: str, key: str, subset: int = 0) -> str:
    """ " line N" of a key in the subset-th [[prompt.subset]], or before the first; nothing when written unusually."""
    seen = 0
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*\[\[\s*prompt\s*\.\s*subset\s*\]\]", line):
            seen += 1
        elif seen == subset and re.match(rf"\s*\[?[\"']?{re.escape(key)}[\"']?\s*[=.\]]", line):
            return f" line {number}"
    return ""

"""The TOML form of a search space, read into models; every refusal names file, field, value and remedy."""

from __future__ import annotations

import keyword
import re
import tomllib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from optimizer_daemon.search.constraints import CheckText, ConstraintText, Text
from optimizer_daemon.search.expressions import FUNCTIONS
from optimizer_daemon.search.parameters import PARAMETER_TYPES, Parameter
from optimizer_daemon.search.start_up import StartUp, Stratum
from shared.errors import SettingsError, UserError
from shared.schemas.base import Record

Document = TypeVar("Document", bound=Record)
KeysBeside = Callable[[Sequence[str | int]], Sequence[str]]

_PLAIN_REMEDIES = {
    "dict_type": "write a table",
    "model_type": "write a table",
    "model_attributes_type": "write a table",
    "tuple_type": "write a list",
    "string_type": "write a string",
    "bool_type": "write true or false",
    "int_type": "write a whole number",
    "float_type": "write a number",
    "finite_number": "write a finite number",
    "greater_than": "write a number above 0",
    "greater_than_equal": "write 1 or more",
    "too_short": "write at least one",
}


def _usable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or keyword.iskeyword(name) or name in FUNCTIONS:
        raise ValueError("expressions cannot use this name; write letters, digits and _, no word of the language")
    return name


ParameterName = Annotated[str, AfterValidator(_usable_name)]


class SpaceText(Record):
    """A whole file; expressions are still text."""

    name: Text
    parameters: Annotated[
        dict[ParameterName, Annotated[Parameter, Field(discriminator="type")]],
        Field(min_length=1),
    ]
    derived: dict[ParameterName, Text] = Field(default_factory=dict)
    constraints: Annotated[tuple[ConstraintText, ...], Field(strict=False)] = ()  # TOML gives a list
    start_up: StartUp | None = None


def parse_document(text: str, source: str) -> SpaceText:
    """Read the content of a search space file.

    Args:
        text: the TOML.
        source: the file as messages name it.

    Raises:
        UserError: no TOML, a field missing or unknown, or a value that will not do; the first fault is described.
    """
    return read_document(text, source, SpaceText, _keys_beside)


def read_document(text: str, source: str, model: type[Document], keys_beside: KeysBeside) -> Document:
    """Read TOML into a model.

    Args:
        text: the TOML.
        source: the file as messages name it.
        model: of the whole file.
        keys_beside: returns the known keys of the table that holds an unknown one, by the way to it.

    Raises:
        UserError: no TOML, a field missing or unknown, or a value that will not do; the first fault is described.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _not_toml(error, text, source) from error
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise _first_fault(error, table, source, keys_beside) from error


def place(steps: Sequence[str | int]) -> str:
    """Return the way to a field as people count: ("constraints", 5, "when") is "constraints #6 -> when"."""
    words: list[str] = []
    for step in steps:
        if isinstance(step, int):
            words[-1] += f" #{step + 1}"
        else:
            words.append(step)
    return " -> ".join(words)


def _not_toml(error: tomllib.TOMLDecodeError, text: str, source: str) -> UserError:
    message = str(error)
    position = re.search(r" \(at line (\d+), column (\d+)\)", message)
    if position is None:
        return UserError(f"{source}: {message}; mend the TOML there")
    number, column = map(int, position.groups())
    line = text.split("\n")[number - 1].strip()
    problem = message[: position.start()]
    once = "write each name once" if "twice" in problem or "overwrite" in problem else "mend the TOML there"
    return UserError(f"{source}: line {number}, character {column}, {line!r}: {problem}; {once}")


def _first_fault(error: ValidationError, table: dict[str, Any], source: str, keys_beside: KeysBeside) -> UserError:
    # A misspelt key comes first: it explains why another one is missing.
    fault, *others = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    steps, value = _follow(fault["loc"], table)
    kind, context = fault["type"], fault.get("ctx", {})
    more = f" (and {len(others)} more)" if others else ""
    if kind == "missing" or kind == "union_tag_not_found":
        name = "type" if kind == "union_tag_not_found" else str(fault["loc"][-1])
        return UserError(f"{source}: {place([*steps, name])} is missing; add it{more}")
    if kind == "extra_forbidden":
        remedy = f"there is no such key; the keys here are {', '.join(keys_beside(fault['loc']))}"
    elif kind == "union_tag_invalid":
        steps, value = [*steps, "type"], context["tag"]
        remedy = f"choose one of {', '.join(PARAMETER_TYPES)}"
    else:
        remedy = _PLAIN_REMEDIES.get(kind, fault["msg"].removeprefix("Value error, "))
    if fault["loc"][-1] == "[key]":
        value = steps[-1]
    return SettingsError(f"{source}: {place(steps)}", value, remedy + more)


def _follow(location: Sequence[Any], value: Any) -> tuple[list[str | int], Any]:
    """Return the steps of `location` that exist in the file, and the value they lead to; others name union members."""
    steps: list[str | int] = []
    for step in location:
        inside = step in value if isinstance(value, dict) else isinstance(value, list) and isinstance(step, int)
        if inside:
            value = value[step]
            steps.append(step)
    return steps, value


def _keys_beside(location: Sequence[str | int]) -> list[str]:
    """Return the keys of the table that holds an unknown one."""
    match location:
        case ("parameters", _, tag, *_):
            model: type[Record] = PARAMETER_TYPES[str(tag)]
        case ("constraints", _, "requires", _, _):
            model = CheckText
        case ("constraints", *_):
            model = ConstraintText
        case ("start_up", "strata", *_):
            model = Stratum
        case ("start_up", *_):
            model = StartUp
        case _:
            model = SpaceText
    return list(model.model_fields)

"""Text with {placeholders}: the command lines and files that the command trainer fills in for a trial.

`{name}` is the value; `{name:json}` is it as JSON writes it, a text with its quotation marks. `{{name}}` stays as
`{name}`. All other braces are ordinary characters, so that JSON and YAML need no escapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from optimizer_daemon.lora_training.toml_file import closest
from shared.errors import SettingsError
from shared.schemas.base import Scalar

_PLACEHOLDER = re.compile(r"\{\{(?P<literal>[\w.]+(?::\w+)?)\}\}|\{(?P<name>[A-Za-z_][\w.]*)(?::(?P<form>\w+))?\}")


def names_in(template: str) -> set[str]:
    """Return the placeholders that a template uses."""
    return {match["name"] for match in _PLACEHOLDER.finditer(template) if match["name"] is not None}


def fill(template: str, values: Mapping[str, Scalar], where: str) -> str:
    """Return the text with the values in their places.

    Args:
        where: the setting that holds the template, for messages.
    Raises:
        SettingsError: a placeholder has no value, or asks for a form there is not.
    """

    def value_of(match: re.Match[str]) -> str:
        if match["literal"] is not None:
            return "{" + match["literal"] + "}"
        name, form = match["name"], match["form"]
        if name not in values:
            raise SettingsError(where, match[0], f"there is no such placeholder{_instead(name, values)}")
        if form not in (None, "json"):
            raise SettingsError(where, match[0], f"the only form is {{{name}:json}}; correct it")
        return written(values[name], as_json=form == "json")

    return _PLACEHOLDER.sub(value_of, template)


def written(value: Scalar, *, as_json: bool = False) -> str:
    """Return a value as command lines, JSON, TOML and YAML read it.

    A float always has its point: YAML 1.1 takes 1e-05 for a text.
    """
    match value:
        case bool():
            return "true" if value else "false"
        case float():
            mantissa, exponent, power = repr(value).partition("e")
            return (mantissa if "." in mantissa or not exponent else f"{mantissa}.0") + exponent + power
        case str() if as_json:
            return json.dumps(value, ensure_ascii=False)
    return str(value)


def _instead(name: str, known: Iterable[str]) -> str:
    return closest(name, known) or f"; choose one of {', '.join(sorted(known))}, or write {{{{{name}}}}} for the text"

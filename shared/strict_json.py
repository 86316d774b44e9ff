"""JSON without the liberties the standard library takes, and validation errors as one sentence."""

from __future__ import annotations

import codecs
import json
import math
from typing import Any, NoReturn

from pydantic import ValidationError

_LONGEST_QUOTE = 80  # characters of a wrong value shown in a message


def parse_object(content: bytes) -> dict[str, Any]:
    """Return the JSON object `content` is.

    Raises:
        ValueError: not UTF-8, a byte order mark, not JSON, something behind the object, a key twice in one object,
            NaN or an infinity, nested too deeply, or no object at all.
    """
    if content.startswith(codecs.BOM_UTF8):
        raise ValueError("starts with a byte order mark; save it as plain UTF-8")
    try:
        payload = json.loads(
            content.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(payload, dict):
        raise ValueError(f"holds {_quote(payload)} where a JSON object is expected")  # noqa: TRY004  wrong content
    return payload


def first_fault(error: ValidationError, payload: Any) -> str:
    """Return the first validation error as "a -> b -> field: value will not do; what was expected".

    Args:
        error: what the model says.
        payload: the object it was given.
    """
    fault, *others = error.errors(include_url=False)
    steps: list[str] = []
    for step in fault["loc"]:
        # The location also names members of a union, which are no part of the file.
        if _has(payload, step):
            payload = payload[step]
            steps.append(str(step))
    expected = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        sentence = f"{' -> '.join([*steps, str(fault['loc'][-1])])} is missing"
    elif steps:
        sentence = f"{' -> '.join(steps)}: {_quote(payload)} will not do; {expected}"
    else:
        sentence = expected
    return f"{sentence} (and {len(others)} more)" if others else sentence


def _has(payload: Any, step: str | int) -> bool:
    if isinstance(payload, dict):
        return step in payload
    return isinstance(payload, list) and isinstance(step, int)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
    return unique


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large for a number")
    return number


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."

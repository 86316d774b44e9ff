"""The three kinds of parameter: a real range or grid, a grid of whole numbers, a list of choices.

Grid values are computed from the decimal text of `low` and `step`, so the ratios 0.25 .. 0.9 are the numbers people
write; 0.8500000000000001, which binary steps add up to, is recognised and becomes 0.85.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from fractions import Fraction
from functools import cached_property
from random import Random
from typing import Annotated, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from optimizer_daemon.search.expressions import Kind, Value, is_number, kind_of, same_number, same_value
from shared.schemas.base import Record

MOST_GRID_VALUES = 100_000
Number = TypeVar("Number", int, float)


def _scalar(choice: object) -> object:
    if kind_of(choice) is None or (isinstance(choice, float) and not math.isfinite(choice)):
        raise ValueError("a choice is a finite number, a string, true or false")
    return choice


Choice = Annotated[bool | int | float | str, BeforeValidator(_scalar)]


class FloatParameter(Record):
    """A real number from `low` to `high`, both included; only low, low + step .. high where there is a step."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False
    step: float | None = None

    @field_validator("high")
    @classmethod
    def _check_high(cls, high: float, info: ValidationInfo) -> float:
        _refuse_below_low(high, info)
        return high

    @field_validator("log")
    @classmethod
    def _check_log(cls, log: bool, info: ValidationInfo) -> bool:
        low = info.data.get("low", 1.0)
        if log and low <= 0:
            raise ValueError(f"a logarithmic range needs low > 0, here low = {low!r}; raise low or drop log")
        return log

    @field_validator("step")
    @classmethod
    def _check_step(cls, step: float | None, info: ValidationInfo) -> float | None:
        if step is None:
            return None
        if info.data.get("log"):
            raise ValueError("a logarithmic range has no steps; drop step or log")
        _refuse_bad_step(step, info)
        return step

    @property
    def ends(self) -> tuple[Value, ...]:
        """The least and the greatest value."""
        return (self.low, self.high)

    @property
    def kind(self) -> Kind:
        """Kind of its values in expressions."""
        return "number"

    @cached_property
    def grid(self) -> tuple[float, ...] | None:
        """Every value it may take, ascending; None where it is continuous."""
        return None if self.step is None else tuple(map(float, _grid(self.low, self.high, self.step)))

    def snap(self, value: Value) -> Value:
        """Return the declared value that `value` equals within the tolerance, else `value` unchanged."""
        if not is_number(value):
            return value
        if self.grid is not None:
            number = _on_grid(self.grid, value)
            return value if number is None else number
        inside = min(max(value, self.low), self.high)
        return float(inside) if same_number(value, inside) else value

    def problem(self, value: Value) -> str | None:
        """Say why `value` is none of the declared values; None when it is one."""
        return _range_problem(self, value)

    def draw(self, rng: Random, low: float | None = None, high: float | None = None) -> float:
        """Draw uniformly, or log-uniformly as `log` says; `low` and `high` bound the draw to a part of the range."""
        low = self.low if low is None else low
        high = self.high if high is None else high
        if self.grid is not None:
            return rng.choice(_part(self.grid, low, high))
        if self.log:
            return min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)  # exp(log(x)) may miss x
        return rng.uniform(low, high)

    def __str__(self) -> str:
        shape = " log" if self.log else "" if self.step is None else f" step {self.step!r}"
        return f"{self.low!r}..{self.high!r}{shape}"


class IntParameter(Record):
    """A whole number: low, low + step .. high."""

    type: Literal["int"]
    low: int
    high: int
    step: Annotated[int, Field(validate_default=True)] = 1

    @field_validator("high")
    @classmethod
    def _check_high(cls, high: int, info: ValidationInfo) -> int:
        _refuse_below_low(high, info)
        return high

    @field_validator("step")
    @classmethod
    def _check_step(cls, step: int, info: ValidationInfo) -> int:
        _refuse_bad_step(step, info)
        return step

    @property
    def ends(self) -> tuple[Value, ...]:
        """The least and the greatest value."""
        return (self.low, self.high)

    @property
    def kind(self) -> Kind:
        """Kind of its values in expressions."""
        return "number"

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Every value it may take, ascending."""
        return tuple(map(int, _grid(self.low, self.high, self.step)))

    def snap(self, value: Value) -> Value:
        """Return the declared value that `value` equals within the tolerance, else `value` unchanged."""
        number = _on_grid(self.grid, value) if is_number(value) else None
        return value if number is None else number

    def problem(self, value: Value) -> str | None:
        """Say why `value` is none of the declared values; None when it is one."""
        return _range_problem(self, value)

    def draw(self, rng: Random, low: float | None = None, high: float | None = None) -> int:
        """Draw one value, each equally likely; `low` and `high` bound the draw to a part of the range."""
        return rng.choice(_part(self.grid, self.low if low is None else low, self.high if high is None else high))

    def __str__(self) -> str:
        return f"{self.low}..{self.high} step {self.step}"


class CategoricalParameter(Record):
    """One of several numbers, of several strings, or true and false."""

    type: Literal["categorical"]
    choices: Annotated[tuple[Choice, ...], Field(strict=False, min_length=1)]  # TOML gives a list

    @field_validator("choices")
    @classmethod
    def _check_choices(cls, choices: tuple[Value, ...]) -> tuple[Value, ...]:
        if len({kind_of(choice) for choice in choices}) > 1:
            raise ValueError("choices are of one kind; write numbers only, strings only, or true and false")
        for index, choice in enumerate(choices):
            if choice in choices[:index]:
                raise ValueError(f"{choice!r} occurs twice; write each choice once")
        return choices

    @property
    def ends(self) -> tuple[Value, ...]:
        """Every choice: none lies between others."""
        return self.choices

    @property
    def kind(self) -> Kind:
        """Kind of its values in expressions."""
        kind = kind_of(self.choices[0])
        assert kind is not None
        return kind

    def snap(self, value: Value) -> Value:
        """Return the choice that `value` equals within the tolerance, else `value` unchanged."""
        if self._is_choice(value):
            return value
        return next((choice for choice in self.choices if same_value(choice, value)), value)

    def problem(self, value: Value) -> str | None:
        """Say why `value` is none of the choices; None when it is one."""
        if self._is_choice(value) or any(same_value(choice, value) for choice in self.choices):
            return None
        return f"{value!r} is not one of {self}"

    def draw(self, rng: Random) -> Value:
        """Draw one choice, each equally likely."""
        return rng.choice(self.choices)

    def _is_choice(self, value: Value) -> bool:
        """Tell whether `value` is one of the choices exactly, of its very type: what nearly always is so."""
        return any(value == choice and type(value) is type(choice) for choice in self.choices)

    def __str__(self) -> str:
        return ", ".join(str(choice) for choice in self.choices)


NumericParameter = FloatParameter | IntParameter
Parameter = FloatParameter | IntParameter | CategoricalParameter
PARAMETER_TYPES: dict[str, type[Record]] = {
    "float": FloatParameter,
    "int": IntParameter,
    "categorical": CategoricalParameter,
}


def only(value: Value) -> CategoricalParameter:
    """Return a parameter with one value."""
    return CategoricalParameter(type="categorical", choices=(value,))


def with_range(parameter: NumericParameter, low: float, high: float) -> NumericParameter:
    """Return a parameter with a part of its range, drawn as the whole one is; both ends are values of its grid."""
    return type(parameter).model_validate({**parameter.model_dump(), "low": low, "high": high})


def _refuse_below_low(high: float, info: ValidationInfo) -> None:
    low = info.data.get("low", high)
    if high < low:
        raise ValueError(f"it is below low = {low!r}; swap the two")


def _refuse_bad_step(step: float, info: ValidationInfo) -> None:
    if step <= 0:
        raise ValueError("a step is positive; choose one that divides high - low")
    low, high = info.data.get("low"), info.data.get("high")
    if low is None or high is None:  # already refused
        return
    intervals = (_exact(high) - _exact(low)) / _exact(step)
    if intervals.denominator != 1:
        raise ValueError(f"it does not divide high - low, {low!r}..{high!r}; change step or high")
    if intervals >= MOST_GRID_VALUES:
        raise ValueError(f"it makes more than {MOST_GRID_VALUES:,} values; choose a larger step")


def _exact(number: float) -> Fraction:
    """Return the decimal number people wrote, not the binary one nearest to it."""
    return Fraction(repr(number))


def _grid(low: float, high: float, step: float) -> list[Fraction]:
    first, width = _exact(low), _exact(step)
    return [first + index * width for index in range(int((_exact(high) - first) / width) + 1)]


def _part(grid: tuple[Number, ...], low: float, high: float) -> tuple[Number, ...]:
    return grid[bisect_left(grid, low) : bisect_right(grid, high)]


def _on_grid(grid: tuple[Number, ...], value: float) -> Number | None:
    """Return the grid value that `value` equals within the tolerance."""
    behind = bisect_left(grid, value)
    return next((number for number in grid[max(behind - 1, 0) : behind + 1] if same_number(number, value)), None)


def _range_problem(parameter: NumericParameter, value: Value) -> str | None:
    if not is_number(value):
        return f"{value!r} is no number in {parameter}"
    snapped = parameter.snap(value)
    assert is_number(snapped)
    if not parameter.low <= snapped <= parameter.high:  # NaN too
        return f"{value!r} is outside {parameter}"
    if parameter.grid is not None and _on_grid(parameter.grid, snapped) is None:
        return f"{value!r} is not on the grid {parameter}"
    return None

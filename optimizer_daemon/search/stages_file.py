"""The TOML form of a staged search: how many trials each stage has, how long they train, what they are drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, field_validator

from optimizer_daemon.search.constraints import Text
from optimizer_daemon.search.document import ParameterName, place, read_document
from optimizer_daemon.search.expressions import Value, is_number
from optimizer_daemon.search.parameters import CategoricalParameter, Choice, NumericParameter, Parameter, with_range
from optimizer_daemon.search.space import SearchSpace
from optimizer_daemon.search.stage import EPOCHS, Stage
from shared.errors import SettingsError, UserError
from shared.schemas.base import Record

Positive = Annotated[int, Field(ge=1)]


class PartText(Record):
    """A part of a parameter's values: of a number `low`, `high` or both, else `choices`."""

    low: float | None = None
    high: float | None = None
    choices: Annotated[tuple[Choice, ...] | None, Field(strict=False, min_length=1)] = None  # TOML gives a list


class StageText(Record):
    """A stage as the file declares it."""

    name: Text
    trials: Positive
    epochs: Positive
    around_best: Positive | None = None
    parameters: dict[ParameterName, PartText] = Field(default_factory=dict)


class StagesText(Record):
    """A whole file."""

    stages: Annotated[tuple[StageText, ...], Field(strict=False, min_length=1)]  # TOML gives a list

    @field_validator("stages")
    @classmethod
    def _names_differ(cls, stages: tuple[StageText, ...]) -> tuple[StageText, ...]:
        names = [stage.name for stage in stages]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the name {twice[0]!r} occurs twice; give each stage its own")
        if stages[0].around_best is not None:
            raise ValueError("around_best of the first stage: no stage comes before it; leave it out there")
        return stages


def parse_stages(text: str, source: str, space: SearchSpace) -> tuple[Stage, ...]:
    """Read the stages of a study; docs/stages.md describes the format.

    Args:
        text: the TOML.
        source: the file as messages name it.
        space: the study's search space.

    Raises:
        UserError: a field will not do, or a stage has nothing to draw from; the message names file, field, value and
            remedy.
    """
    document = read_document(text, source, StagesText, _keys_beside)
    if EPOCHS not in space.parameters:
        raise UserError(
            f"{source}: stages say how many epochs a trial trains, but search space {space.name!r} has no {EPOCHS}; "
            "declare it there"
        )
    stages: list[Stage] = []
    for index, declared in enumerate(document.stages):
        where = f"{source}: {place(('stages', index))}"
        narrowed = _narrowed(declared.parameters, space, where)
        try:
            stage = Stage.of(space, name=declared.name, pinned={EPOCHS: declared.epochs}, narrowed=narrowed)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        earlier = tuple(known.name for known in stages if known.name is not None)
        stages.append(replace(stage, trials=declared.trials, around_best=declared.around_best, earlier=earlier))
    return tuple(stages)


def _narrowed(parts: Mapping[str, PartText], space: SearchSpace, where: str) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    for name, part in parts.items():
        at = f"{where} -> parameters -> {name}"
        parameter = space.parameters.get(name)
        if name == EPOCHS:
            raise SettingsError(at, name, "a stage has one number of epochs; leave it out here")
        if parameter is None:
            known = ", ".join(known for known in space.parameters if known != EPOCHS)
            raise SettingsError(at, name, f"search space {space.name!r} has no such parameter; it has {known}")
        if isinstance(parameter, CategoricalParameter):
            found[name] = _some_choices(parameter, part, at)
        else:
            found[name] = _part_of_range(parameter, part, at)
    return found


def _some_choices(parameter: CategoricalParameter, part: PartText, at: str) -> Parameter:
    if part.choices is None or part.low is not None or part.high is not None:
        raise SettingsError(at, _written(part), f"it is one of {parameter}; write choices = [...] with some of them")
    for choice in part.choices:
        if parameter.problem(choice):
            raise SettingsError(f"{at} -> choices", choice, f"the space has {parameter}; take some of these")
    return CategoricalParameter(type="categorical", choices=tuple(dict.fromkeys(map(parameter.snap, part.choices))))


def _part_of_range(parameter: NumericParameter, part: PartText, at: str) -> Parameter:
    if part.choices is not None or (part.low is None and part.high is None):
        raise SettingsError(at, _written(part), f"it is a number in {parameter}; write low, high or both")
    low = parameter.low if part.low is None else part.low
    high = parameter.high if part.high is None else part.high
    for name, value in (("low", low), ("high", high)):
        if problem := parameter.problem(value):
            raise SettingsError(f"{at} -> {name}", value, f"{problem}; stay within what the space declares")
    low, high = _number(parameter.snap(low)), _number(parameter.snap(high))
    if low > high:
        raise SettingsError(f"{at} -> high", high, f"it is below low = {low!r}; swap the two")
    return with_range(parameter, low, high)


def _number(value: Value) -> float:
    assert is_number(value), "it was checked"
    return value


def _written(part: PartText) -> dict[str, Any]:
    return part.model_dump(exclude_none=True)


def _keys_beside(location: Sequence[str | int]) -> list[str]:
    match location:
        case ("stages", _, "parameters", _, _):
            model: type[Record] = PartText
        case ("stages", *_):
            model = StageText
        case _:
            model = StagesText
    return list(model.model_fields)

"""A stage: the part of a search space that some trials of a study are drawn from, and how many epochs they train.

The study's parameters stay what they are declared to be; a stage only says what may be drawn. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Self

from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.lint import Unreachable, unreachable
from optimizer_daemon.search.parameters import CategoricalParameter, Parameter, only, with_range
from optimizer_daemon.search.space import SearchSpace
from shared.errors import UserError

EPOCHS = "max_train_epochs"


@dataclass(frozen=True)
class Stage:
    """One stage of a study, or a study without any as its only one.

    Args:
        name: recorded with each of its trials; None for a study without stages.
        declared: the study's search space.
        space: what is drawn from: the declared space, narrowed, without the values that no configuration can have.
        pinned: parameters that have one value, whatever is declared; Optuna does not know them.
        dropped: the values that `space` therefore lacks.
        spared: smallest values that rules let pass, for nothing was left otherwise.
        trials: finished trials to reach; None where the settings say it.
        around_best: how many of the best trials of earlier stages most draws stay near; None for anywhere.
        earlier: names of the stages before.
    """

    name: str | None
    declared: SearchSpace
    space: SearchSpace
    pinned: Mapping[str, Value] = field(default_factory=dict)
    dropped: tuple[Unreachable, ...] = ()
    spared: tuple[Unreachable, ...] = ()
    trials: int | None = None
    around_best: int | None = None
    earlier: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        declared: SearchSpace,
        *,
        name: str | None = None,
        pinned: Mapping[str, Value] | None = None,
        narrowed: Mapping[str, Parameter] | None = None,
    ) -> Self:
        """Return the stage with what is left to draw from.

        Args:
            narrowed: parameters with a part of their values.
        Raises:
            UserError: nothing is left.
        """
        pinned = dict(pinned or {})
        space = declared.with_parameters(
            {**(narrowed or {}), **{known: only(value) for known, value in pinned.items()}}
        )
        try:
            dropped, left = _fitted(space)
            return cls(name, declared, left, pinned, dropped)
        except UserError as error:
            spared = _spared(space)
            if spared:
                with suppress(UserError):
                    dropped, left = _fitted(_sparing(space, spared))
                    return cls(name, declared, left, pinned, dropped, spared)
            raise UserError(f"stage {name!r}: {error}") if name is not None else error from error

    @property
    def epochs(self) -> int | None:
        """Epochs of each of its trials; None where they are drawn."""
        epochs = self.pinned.get(EPOCHS)
        return epochs if isinstance(epochs, int) else None

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"stage {self.name!r}"

    def fixed_at(self, values: Mapping[str, Value]) -> SearchSpace:
        """Return what is drawn from when some parameters have one value, which may lie outside the stage's part."""
        return self.space.with_parameters({name: only(value) for name, value in values.items()})

    @property
    def askable(self) -> SearchSpace:
        """What a person may ask for: all that is declared, with the pinned values and the stage's rules."""
        whole = self.declared.with_parameters({name: only(value) for name, value in self.pinned.items()})
        return replace(whole, constraints=self.space.constraints)


def _fitted(space: SearchSpace) -> tuple[tuple[Unreachable, ...], SearchSpace]:
    """Return the values that no configuration has, and the space without them.

    Raises:
        UserError: nothing is left.
    """
    dropped = unreachable(space)
    left = _without(space, dropped)
    left.draw(Random(0))
    return dropped, left


def _spared(space: SearchSpace) -> tuple[Unreachable, ...]:
    """Return the smallest values that rules of the space let pass where nothing is left otherwise."""
    names = {rule.spares_least_of: rule.reason for rule in space.constraints if rule.spares_least_of is not None}
    return tuple(
        Unreachable(name, min(space.parameters[name].ends, key=float), reason) for name, reason in names.items()
    )


def _sparing(space: SearchSpace, spared: Iterable[Unreachable]) -> SearchSpace:
    least = {known.parameter: known.value for known in spared}
    rules = (
        rule if rule.spares_least_of is None else rule.sparing(least[rule.spares_least_of])
        for rule in space.constraints
    )
    return replace(space, constraints=tuple(rules))


def _without(space: SearchSpace, dropped: tuple[Unreachable, ...]) -> SearchSpace:
    """Return a space without some of its values; where none of a parameter would be left, all of them stay."""
    gone: dict[str, list[Value]] = {}
    for known in dropped:
        gone.setdefault(known.parameter, []).append(known.value)
    changed = {
        name: part
        for name, values in gone.items()
        if (part := _without_values(space.parameters[name], values)) is not None
    }
    return space.with_parameters(changed)


def _without_values(parameter: Parameter, gone: list[Value]) -> Parameter | None:
    if isinstance(parameter, CategoricalParameter):
        left = tuple(choice for choice in parameter.choices if choice not in gone)
        return CategoricalParameter(type="categorical", choices=left) if left else None
    assert parameter.grid is not None, "only values of grids and choices are dropped"
    kept = [value for value in parameter.grid if value not in gone]
    # Between two values that stay the rules alone keep one from being drawn.
    return with_range(parameter, kept[0], kept[-1]) if kept else None

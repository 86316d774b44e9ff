"""Rules that say which combinations are unsafe, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from optimizer_daemon.search.expressions import Expression, Kind, Value, parse_expression
from shared.schemas.base import Record

FAILED = "{failed}"  # in a reason: the names of the failed checks


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it is blank; write it out")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]


class CheckText(Record):
    """A check as the file declares it."""

    name: Text
    check: Text


class ConstraintText(Record):
    """A constraint as the file declares it."""

    when: Text
    requires: Annotated[tuple[CheckText, ...], Field(strict=False, min_length=1)] = ()  # TOML gives a list
    reason: Text

    @field_validator("requires")
    @classmethod
    def _names_differ(cls, requires: tuple[CheckText, ...]) -> tuple[CheckText, ...]:
        names = [check.name for check in requires]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the name {twice[0]!r} occurs twice; give each check its own")
        return requires

    @field_validator("reason")
    @classmethod
    def _names_failed_checks(cls, reason: str, info: ValidationInfo) -> str:
        if "requires" not in info.data:  # already refused
            return reason
        if info.data["requires"] and FAILED not in reason:
            raise ValueError(f"with requires it must name the failed checks; put {FAILED} where they belong")
        if not info.data["requires"] and FAILED in reason:
            raise ValueError(f"without requires there are no checks {FAILED} could name; drop it or add requires")
        return reason


@dataclass(frozen=True)
class Constraint:
    """A rule over completed parameters.

    Args:
        when: refuses where it is true; with `requires` only where a check fails too.
        requires: (name, check) pairs, in the order in which failures are named.
        reason: why, for people.
        spares_least_of: the parameter whose smallest value it lets pass where nothing would be left otherwise.
    """

    when: Expression
    requires: tuple[tuple[str, Expression], ...]
    reason: str
    spares_least_of: str | None = None

    @classmethod
    def parse(cls, text: ConstraintText, kinds: Mapping[str, Kind], where: str) -> Self:
        """Check the expressions of one constraint of a file.

        Args:
            text: the constraint.
            kinds: kind of every parameter, derived ones too.
            where: file and table, for messages.

        Raises:
            SettingsError: an expression is outside the language or is no condition.
        """
        when = parse_expression(text.when, kinds, f"{where} -> when", expected="condition")
        requires = tuple(
            (item.name, parse_expression(item.check, kinds, f"{where} -> requires #{number} -> check", "condition"))
            for number, item in enumerate(text.requires, start=1)
        )
        return cls(when, requires, text.reason)

    def sparing(self, least: Value) -> Constraint:
        """Return the rule that lets no value but the smallest of its parameter pass, whatever the others are."""
        name = self.spares_least_of
        assert name is not None, "only some rules give way"
        when = parse_expression(f"{name} > {least}", {name: "number"}, self.when.where, "condition")
        return Constraint(when, (), self.reason)

    @property
    def shown_reason(self) -> str:
        """The reason with every check named, for where no single configuration is meant."""
        return self.reason.replace(FAILED, ", ".join(name for name, _ in self.requires))

    def objection(self, params: Mapping[str, Value]) -> str | None:
        """Return the reason with every failed check named; None where these parameters are safe."""
        if not self.when(params):
            return None
        if not self.requires:
            return self.reason
        failed = [name for name, check in self.requires if not check(params)]
        return self.reason.replace(FAILED, ", ".join(failed)) if failed else None

"""A search space: declared parameters, values derived from them, and the rules their combinations must keep.

One object serves the sampler, the queue of configurations to try, the resumption of a study and the checks of its
declaration, so that all of them agree on what is feasible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random

from optimizer_daemon.search.constraints import Constraint
from optimizer_daemon.search.document import SpaceText, parse_document, place
from optimizer_daemon.search.expressions import Expression, Kind, Value, kind_of, parse_expression, same_value
from optimizer_daemon.search.parameters import CategoricalParameter, Parameter, only
from optimizer_daemon.search.start_up import StartUp
from shared.errors import SettingsError, UserError

TRIES_PER_START = 1_000
STARTS = 10


@dataclass(frozen=True)
class SearchSpace:
    """What may be drawn; two spaces that declare the same are equal, whatever file they come from.

    Args:
        name: how reports call it.
        parameters: the declared parameters by name, in the order of the file.
        derived: expressions by name, computed one after the other; one may replace a declared parameter.
        constraints: the rules, over declared and derived values.
        start_up: how draws are spread; None where every value is equally likely before the rules.
    """

    name: str
    parameters: Mapping[str, Parameter]
    derived: Mapping[str, Expression]
    constraints: tuple[Constraint, ...]
    start_up: StartUp | None = None

    def rules(self) -> dict[str, str]:
        """Return what is declared beside the parameters, as text by name: equal for spaces that draw alike."""
        texts = {f"derived {name}": expression.text for name, expression in self.derived.items()}
        for number, rule in enumerate(self.constraints, start=1):
            checks = "".join(f" and requires {check.text}" for _, check in rule.requires)
            texts[f"constraint {number}"] = f"when {rule.when.text}{checks}"
        if self.start_up is not None:
            texts["start_up"] = self.start_up.model_dump_json()
        return texts

    def complete(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return what the trainer sees: each value on its grid, the derived ones added or put in place.

        Ranges and rules are not looked at; `validate` does that. Derived values among `values` are computed anew.

        Raises:
            UserError: a parameter is missing, unknown or of the wrong kind, or a derived value cannot be computed.
        """
        if faults := self._misnamed(values) + self._mistyped(values):
            raise UserError(f"search space {self.name!r}: {'; '.join(faults)}")
        return self._derive(values)

    def validate(self, values: Mapping[str, Value]) -> list[str]:
        """Return all that is wrong with a configuration: names and ranges first, then the reason of each failing rule.

        Derived values may be among `values`, as in params.json; they must be the computed ones. Rules are looked at
        when every parameter is there with the right kind of value.
        """
        problems = self._misnamed(values)
        for name, parameter in self.parameters.items():
            if name in values and (problem := parameter.problem(values[name])):
                problems.append(f"{name}: {problem}")
        if self._mistyped(values) or not self.parameters.keys() <= values.keys():
            return problems
        try:
            params = self._derive(values)
            return problems + self._disagreements(values, params) + [*self._objections(params)]
        except SettingsError as error:  # arithmetic that values outside the ranges can break
            return [*problems, str(error)]

    def is_feasible(self, values: Mapping[str, Value]) -> bool:
        """Tell whether a configuration is inside its ranges and breaks no rule: whether `validate` finds nothing.

        Models ask this a thousand times for one draw, so it ends with the first problem.
        """
        if values.keys() != self.parameters.keys():
            return not self.validate(values)
        if any(parameter.problem(values[name]) is not None for name, parameter in self.parameters.items()):
            return False
        try:
            return next(self._objections(self._derive(values)), None) is None
        except SettingsError:
            return False

    def draw(self, rng: Random) -> dict[str, Value]:
        """Draw one feasible configuration of the declared parameters.

        The parameter of `start_up` is drawn first, by strata; the others are redrawn around it until no rule objects.
        Only a value around which nothing is feasible is given up for another one.

        Raises:
            UserError: nothing feasible was found; the space looks empty.
        """
        objections: Counter[str] = Counter()
        for _ in range(STARTS):
            first = self._draw_first(rng)
            for _ in range(TRIES_PER_START):
                values = {
                    name: first[name] if name in first else parameter.draw(rng)
                    for name, parameter in self.parameters.items()
                }
                objection = next(self._objections(self.with_derived(values)), None)
                if objection is None:
                    return values
                objections[objection] += 1
        ((reason, count),) = objections.most_common(1)
        raise UserError(
            f"search space {self.name!r}: none of {objections.total():,} draws is feasible, {count:,} of them because "
            f"of {reason!r}; loosen that rule or widen the ranges"
        )

    def samples(self, rng: Random) -> Iterator[dict[str, Value]]:
        """Draw feasible configurations that hold every choice and both ends of every range between them.

        A value around which nothing is feasible is left out, for it is never drawn.

        Raises:
            UserError: nothing is feasible at all.
        """
        first = self.draw(rng)
        yield first
        for name, parameter in self.parameters.items():
            for value in parameter.ends:
                values = {**first, name: value}
                if next(self._objections(self.with_derived(values)), None) is not None:
                    try:
                        values = self.with_parameters({name: only(value)}).draw(rng)
                    except UserError:
                        continue
                yield values

    def with_parameters(self, changed: Mapping[str, Parameter]) -> SearchSpace:
        """Return the space in which some parameters have narrower ranges, fewer choices, or one value.

        The exploration plan keeps its proportions in what is left of the range it divides.
        """
        start_up = self.start_up
        if start_up is not None and start_up.parameter in changed:
            whole, part = self.parameters[start_up.parameter], changed[start_up.parameter]
            if isinstance(whole, CategoricalParameter) or isinstance(part, CategoricalParameter):
                start_up = None  # one value is left
            else:
                start_up = start_up.within(whole, part)
        return replace(self, parameters={**self.parameters, **changed}, start_up=start_up)

    def _draw_first(self, rng: Random) -> dict[str, Value]:
        if self.start_up is None:
            return {}
        parameter = self.parameters[self.start_up.parameter]
        assert not isinstance(parameter, CategoricalParameter)
        return {self.start_up.parameter: self.start_up.draw(rng, parameter)}

    def _derive(self, values: Mapping[str, Value]) -> dict[str, Value]:
        return self.with_derived({name: parameter.snap(values[name]) for name, parameter in self.parameters.items()})

    def with_derived(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return a configuration with its derived values; the declared ones are taken as they are."""
        params = dict(values)
        for name, expression in self.derived.items():
            params[name] = expression(params)
        return params

    def _objections(self, params: Mapping[str, Value]) -> Iterator[str]:
        return (text for rule in self.constraints if (text := rule.objection(params)) is not None)

    def _disagreements(self, values: Mapping[str, Value], params: Mapping[str, Value]) -> list[str]:
        return [
            f"{name}: {values[name]!r} is not {expression.text}, which is {params[name]!r}; leave it out"
            for name, expression in self.derived.items()
            if name in values and name not in self.parameters and not same_value(values[name], params[name])
        ]

    def _misnamed(self, values: Mapping[str, Value]) -> list[str]:
        missing = [f"{name} is missing; give it a value" for name in self.parameters if name not in values]
        unknown = [
            f"there is no parameter {name!r}; the parameters are {', '.join(self.parameters)}"
            for name in values
            if name not in self.parameters and name not in self.derived
        ]
        return missing + unknown

    def _mistyped(self, values: Mapping[str, Value]) -> list[str]:
        return [
            f"{name}: {parameter.problem(values[name])}"
            for name, parameter in self.parameters.items()
            if name in values and kind_of(values[name]) != parameter.kind
        ]


def parse_space(text: str, source: str) -> SearchSpace:
    """Read a search space from TOML; docs/search_spaces.md describes the format.

    Args:
        text: the TOML.
        source: the file as messages name it.

    Raises:
        UserError: the message names file, field, value and remedy.
    """
    document = parse_document(text, source)
    kinds: dict[str, Kind] = {name: parameter.kind for name, parameter in document.parameters.items()}
    derived = {
        name: _parse_derived(name, expression, kinds, f"{source}: {place(('derived', name))}")
        for name, expression in document.derived.items()
    }
    constraints = tuple(
        Constraint.parse(constraint, kinds, f"{source}: {place(('constraints', index))}")
        for index, constraint in enumerate(document.constraints)
    )
    _check_start_up(document, source)
    return SearchSpace(document.name, document.parameters, derived, constraints, document.start_up)


def format_parameters(params: Mapping[str, Value]) -> list[str]:
    """Return one line for each parameter, for logs; network_alpha with its ratio to network_dim.

    >>> format_parameters({"network_dim": 128, "network_alpha": 96})
    ['  network_dim: 128', '  network_alpha: 96 (ratio: 0.750)']
    """
    return [
        f"  {name}: {value}{_alpha_ratio(params) if name == 'network_alpha' else ''}" for name, value in params.items()
    ]


def _alpha_ratio(params: Mapping[str, Value]) -> str:
    ratio, alpha, dim = (params.get(name) for name in ("network_alpha_ratio", "network_alpha", "network_dim"))
    if ratio is None and isinstance(alpha, int | float) and isinstance(dim, int | float) and dim:
        ratio = alpha / dim
    return f" (ratio: {ratio:.3f})" if isinstance(ratio, int | float) else ""


def _parse_derived(name: str, text: str, kinds: dict[str, Kind], where: str) -> Expression:
    """Check one derived value and make its name known to the expressions after it."""
    expression = parse_expression(text, kinds, where, expected=kinds.get(name))
    kinds[name] = expression.kind
    return expression


def _check_start_up(document: SpaceText, source: str) -> None:
    start_up = document.start_up
    if start_up is None:
        return
    parameter = document.parameters.get(start_up.parameter)
    if parameter is None or isinstance(parameter, CategoricalParameter):
        numeric = [name for name, known in document.parameters.items() if not isinstance(known, CategoricalParameter)]
        remedy = f"name a declared float or int: {', '.join(numeric) or 'there is none'}"
        raise SettingsError(f"{source}: start_up -> parameter", start_up.parameter, remedy)
    if misfit := start_up.misfit(parameter):
        bounds = ", ".join(f"{stratum.low!r}..{stratum.high!r}" for stratum in start_up.strata)
        raise SettingsError(f"{source}: start_up -> strata", bounds, misfit)

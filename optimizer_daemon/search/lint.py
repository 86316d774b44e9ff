"""What a search space's rules do to it: how much they leave, which of them never fire, which values nobody can reach.

Rules see a parameter only through what they compare it with. Where every rule compares a continuous parameter with
plain numbers, the points at and between these numbers stand for the whole range, and a finding is a proof; otherwise it
is what many draws have shown.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from random import Random

from optimizer_daemon.search.constraints import Constraint
from optimizer_daemon.search.expressions import Expression, Value, is_number
from optimizer_daemon.search.parameters import CategoricalParameter, FloatParameter, NumericParameter
from optimizer_daemon.search.space import SearchSpace

DRAWS = 10_000
MOST_COMBINATIONS = 300_000
MOST_GRID_VALUES = 60
FIRST_DRAWS = 300


@dataclass(frozen=True)
class Unreachable:
    """A value that is in no feasible configuration, and the reason of the rule that objects to it most often."""

    parameter: str
    value: Value
    reason: str


@dataclass(frozen=True)
class Lint:
    """What was found.

    Args:
        feasible_fraction: share of uniform draws that break no rule.
        dead_rules: rules that never fire, by their number in the file, counted from 1.
        unreachable: (parameter, value) that is in no feasible configuration.
        proved: the last two hold for every configuration, not only for those that were tried.
        tried: how many configurations that were.
    """

    feasible_fraction: float
    dead_rules: dict[int, Constraint]
    unreachable: tuple[tuple[str, Value], ...]
    proved: bool
    tried: int


def lint(space: SearchSpace, seed: int = 0) -> Lint:
    """Look at a space; equal arguments give equal findings."""
    rng = Random(seed)
    feasible = sum(not _objections(space, _uniform(space, rng)) for _ in range(DRAWS))
    candidates, proved = _candidates(space)
    size = math.prod(len(values) for values in candidates.values())
    combinations: Iterator[dict[str, Value]]
    if size <= MOST_COMBINATIONS:
        combinations = (
            dict(zip(candidates, values, strict=True)) for values in itertools.product(*candidates.values())
        )
        tried = size
    else:
        proved, tried = False, DRAWS
        combinations = ({name: rng.choice(values) for name, values in candidates.items()} for _ in range(DRAWS))
    fired, reached = _sweep(space, combinations)
    return Lint(
        feasible_fraction=feasible / DRAWS,
        dead_rules={number: rule for number, rule in enumerate(space.constraints, start=1) if number not in fired},
        unreachable=tuple(
            (name, value)
            for name, values in candidates.items()
            if not _is_continuous(space, name)
            for value in values
            if (name, value) not in reached
        ),
        proved=proved,
        tried=tried,
    )


def unreachable(space: SearchSpace) -> tuple[Unreachable, ...]:
    """Return the values of grids and choices that provably are in no feasible configuration.

    Much quicker than `lint` where most values are in one. Of a space without any, only one parameter's are returned.
    """
    candidates, proved = _candidates(space)
    if not proved or math.prod(len(values) for values in candidates.values()) > MOST_COMBINATIONS:
        return ()
    rng, others = Random(0), _others(space)
    left = {
        (name, value): None
        for name, values in candidates.items()
        if not _is_continuous(space, name)
        for value in values
    }
    for _ in range(FIRST_DRAWS):
        values = {**others, **{name: rng.choice(values) for name, values in candidates.items()}}
        if not _objections(space, values):
            for known in values.items():
                left.pop(known, None)
    found = []
    for name, value in left:
        combinations = itertools.product(*({**candidates, name: [value]}).values())
        objections: Counter[int] = Counter()
        for combination in combinations:
            against = _objections(space, {**others, **dict(zip(candidates, combination, strict=True))})
            if not against:
                break
            objections.update(against)
        else:
            ((rule, _),) = objections.most_common(1)
            found.append(Unreachable(name, value, space.constraints[rule - 1].shown_reason))
            if sum(known.parameter == name for known in found) == len(candidates[name]):
                break
    return tuple(found)


def _others(space: SearchSpace) -> dict[str, Value]:
    """Return a value of every parameter, for those that no rule looks at."""
    return {name: known.ends[0] for name, known in space.parameters.items()}


def _sweep(space: SearchSpace, combinations: Iterable[Mapping[str, Value]]) -> tuple[set[int], set[tuple[str, Value]]]:
    """Return which rules fired somewhere, and which values were part of something feasible."""
    others = _others(space)
    fired: set[int] = set()
    reached: set[tuple[str, Value]] = set()
    for values in combinations:
        objections = _objections(space, {**others, **values})
        fired.update(objections)
        if not objections:
            reached.update(values.items())
    return fired, reached


def _objections(space: SearchSpace, values: dict[str, Value]) -> list[int]:
    params = space.with_derived(values)
    return [number for number, rule in enumerate(space.constraints, start=1) if rule.objection(params) is not None]


def _uniform(space: SearchSpace, rng: Random) -> dict[str, Value]:
    return {name: parameter.draw(rng) for name, parameter in space.parameters.items()}


def _candidates(space: SearchSpace) -> tuple[dict[str, list[Value]], bool]:
    """Return the values to try of each parameter that a rule looks at, and whether they stand for all."""
    expressions = [expression for rule in space.constraints for expression in _expressions(rule)]
    looked_at = {name for expression in expressions for name in expression.names}
    for name, derived in reversed(list(space.derived.items())):
        if name in looked_at:
            looked_at |= derived.names
    trees = [ast.parse(expression.text.strip(), mode="eval") for expression in expressions]
    trees += [ast.parse(known.text.strip(), mode="eval") for name, known in space.derived.items() if name in looked_at]
    candidates: dict[str, list[Value]] = {}
    proved = True
    for name, parameter in space.parameters.items():
        if name not in looked_at:
            continue
        if isinstance(parameter, CategoricalParameter):
            candidates[name] = list(parameter.choices)
        elif parameter.grid is not None and len(parameter.grid) <= MOST_GRID_VALUES:
            candidates[name] = list(parameter.grid)
        else:
            bounds = _compared_with(name, trees)
            proved = proved and bounds is not None
            candidates[name] = _around(parameter, bounds if bounds is not None else _spread(parameter))
    return candidates, proved


def _expressions(rule: Constraint) -> list[Expression]:
    return [rule.when, *(check for _, check in rule.requires)]


def _compared_with(name: str, trees: Iterable[ast.AST]) -> list[float] | None:
    """Return the numbers that a parameter is compared with; None where it is part of a computation."""
    numbers: list[float] = []
    for tree in trees:
        uses = sum(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Compare):
                continue
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Name) and side.id == name for side in sides):
                others = [_constant(side) for side in sides if not (isinstance(side, ast.Name) and side.id == name)]
                if any(other is None for other in others):
                    return None
                numbers += [other for other in others if other is not None]
                uses -= len(sides) - len(others)
        if uses:
            return None
    return numbers


def _constant(node: ast.AST) -> float | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _constant(node.operand)
        return None if inner is None else -inner
    return node.value if isinstance(node, ast.Constant) and is_number(node.value) else None


def _spread(parameter: NumericParameter) -> list[float]:
    low, high = parameter.low, parameter.high
    return [low + (high - low) * part / 10 for part in range(1, 10)]


def _around(parameter: NumericParameter, bounds: Iterable[float]) -> list[Value]:
    """Return values at, between and beyond these bounds, as far as they are the parameter's."""
    inside = sorted({parameter.low, parameter.high, *(b for b in bounds if parameter.low <= b <= parameter.high)})
    values = [*inside, *(left + (right - left) / 2 for left, right in itertools.pairwise(inside))]
    grid = parameter.grid
    if grid is None:
        return sorted(values)
    near = {grid[place] for value in values for place in _neighbours(grid, value)}
    return sorted(near)


def _neighbours(grid: tuple[float, ...] | tuple[int, ...], value: float) -> range:
    place = min(range(len(grid)), key=lambda known: abs(grid[known] - value))
    return range(max(place - 1, 0), min(place + 2, len(grid)))


def _is_continuous(space: SearchSpace, name: str) -> bool:
    parameter = space.parameters[name]
    return isinstance(parameter, FloatParameter) and parameter.grid is None

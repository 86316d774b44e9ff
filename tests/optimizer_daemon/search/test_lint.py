"""What the linter says about the presets and about spaces made to be wrong."""

from __future__ import annotations

from random import Random

import pytest

from optimizer_daemon.search.lint import lint
from optimizer_daemon.search.load import load_space
from optimizer_daemon.search.space import parse_space


def space(parameters: str, *rules: str, derived: str = ""):
    constraints = "".join(f'[[constraints]]\nwhen = "{rule}"\nreason = "because"\n' for rule in rules)
    return parse_space(f'name = "s"\n{parameters}\n{derived}\n{constraints}', "s.toml")


RATE = '[parameters.rate]\ntype = "float"\nlow = 1e-5\nhigh = 1e-3\nlog = true\n'
DIM = '[parameters.dim]\ntype = "categorical"\nchoices = [4, 8, 16]\n'
KIND = '[parameters.kind]\ntype = "categorical"\nchoices = ["a", "b"]\n'


def test_v2_1_has_two_dead_rules_and_no_dead_value_and_two_fifths_of_it_are_forbidden():
    found = lint(load_space("v2.1"))
    assert found.proved
    assert list(found.dead_rules) == [1, 2]
    assert found.dead_rules[1].reason == "High LR (>0.00012) + AdamW8bit = unstable"
    assert found.unreachable == ()
    assert 1 - found.feasible_fraction == pytest.approx(0.397, abs=0.015)


def test_v1_forbids_nothing():
    found = lint(load_space("v1"))
    assert (found.feasible_fraction, dict(found.dead_rules), found.unreachable) == (1.0, {}, ())


def test_a_value_that_every_rule_together_forbids_is_unreachable():
    found = lint(space(RATE + DIM + KIND, "dim == 16 and kind == 'a'", "dim > 8 and kind == 'b'"))
    assert found.proved
    assert found.unreachable == (("dim", 16),)
    assert not found.dead_rules


def test_a_rule_that_fires_in_a_narrow_gap_of_a_range_only_is_not_dead():
    found = lint(space(RATE + DIM, "rate > 5.00e-4 and rate < 5.01e-4", "rate == 7e-4", "rate > 1e-3", "0.5 < rate"))
    assert found.proved
    assert list(found.dead_rules) == [3, 4]


def test_rules_over_derived_values_and_long_grids_are_proved_too():
    steps = '[parameters.steps]\ntype = "int"\nlow = 0\nhigh = 5000\nstep = 10\n'
    derived = '[derived]\ntwice = "2 * dim"\n'
    found = lint(space(steps + DIM, "twice >= 32 and steps < 200", "steps > 4990", "twice > 32", derived=derived))
    assert found.proved
    assert list(found.dead_rules) == [3]


@pytest.mark.parametrize(
    "rule", ["rate * dim > 1e-3", "rate > 1e-4 + 0 * dim", "max(rate, 1e-4) > 2e-4"], ids=["product", "sum", "function"]
)
def test_a_continuous_parameter_inside_a_computation_is_tried_and_nothing_is_claimed(rule):
    found = lint(space(RATE + DIM, rule))
    assert not found.proved
    assert not found.dead_rules, "it fires, and that was seen"


def test_too_many_combinations_are_sampled():
    many = "".join(f'[parameters.p{n}]\ntype = "int"\nlow = 1\nhigh = 50\n' for n in range(4))
    found = lint(space(many, "p0 + p1 + p2 + p3 > 150"))
    assert not found.proved
    assert found.tried == 10_000


def test_what_is_said_to_be_dead_never_fires_in_many_draws():
    known = load_space("v2.1")
    rng = Random(1)
    dead = lint(known).dead_rules.values()
    for _ in range(5_000):
        values = known.with_derived({name: parameter.draw(rng) for name, parameter in known.parameters.items()})
        assert all(rule.objection(values) is None for rule in dead)

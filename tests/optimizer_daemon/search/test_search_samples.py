"""Configurations that hold every choice and both ends of every range: what a trainer is asked about before a study."""

from __future__ import annotations

from random import Random

import pytest

from optimizer_daemon.search.load import load_space
from optimizer_daemon.search.parameters import CategoricalParameter
from optimizer_daemon.search.space import parse_space
from shared.errors import UserError


@pytest.mark.parametrize("preset", ["v1", "v2.1"])
def test_every_choice_and_both_ends_of_every_range_are_among_the_samples(preset):
    space = load_space(preset)
    samples = list(space.samples(Random(1)))
    assert all(space.is_feasible(values) for values in samples)
    for name, parameter in space.parameters.items():
        ends = parameter.choices if isinstance(parameter, CategoricalParameter) else (parameter.low, parameter.high)
        assert set(ends) <= {values[name] for values in samples}, name


def test_a_choice_that_the_rules_never_allow_is_left_out():
    space = parse_space(
        'name = "s"\n[parameters.dim]\ntype = "categorical"\nchoices = [4, 8, 16]\n'
        '[[constraints]]\nwhen = "dim > 8"\nreason = "too big"\n',
        "s.toml",
    )
    assert {values["dim"] for values in space.samples(Random(1))} == {4, 8}


def test_a_space_without_any_feasible_value_is_refused():
    text = (
        'name = "s"\n[parameters.dim]\ntype = "int"\nlow = 1\nhigh = 2\n'
        '[[constraints]]\nwhen = "dim > 0"\nreason = "no"\n'
    )
    with pytest.raises(UserError, match="loosen that rule"):
        next(parse_space(text, "s.toml").samples(Random(1)))

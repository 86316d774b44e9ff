"""What a loaded space does: complete, validate, draw, print."""

import math
from collections import Counter
from random import Random

import pytest

from optimizer_daemon.search.space import format_parameters, parse_space
from shared.errors import UserError

SPACE = """
name = "mine"

[parameters.rate]
type = "float"
low = 1e-5
high = 1e-3
log = true

[parameters.ratio]
type = "float"
low = 0.25
high = 0.9
step = 0.05

[parameters.dim]
type = "categorical"
choices = [4, 8, 16]

[parameters.alpha]
type = "int"
low = 2
high = 20
step = 2

[parameters.kind]
type = "categorical"
choices = ["A", "B"]

[parameters.cached]
type = "categorical"
choices = [true, false]

[derived]
alpha = "min(alpha, dim)"
share = "alpha / dim"
steps = "int(dim * ratio)"

[[constraints]]
when = "kind == 'B' and cached"
reason = "B keeps no cache"

[[constraints]]
when = "ratio >= 0.85"
requires = [
    { name = "dim > 4", check = "dim > 4" },
    { name = "rate <= 1e-4", check = "rate <= 1e-4" },
    { name = "kind = A", check = "kind == 'A'" },
]
reason = "A ratio of 0.85 wants {failed} {or less}"
"""
GOOD = {"rate": 1e-4, "ratio": 0.5, "dim": 8, "alpha": 6, "kind": "A", "cached": False}


@pytest.fixture(scope="module")
def space():
    return parse_space(SPACE, "my.toml")


def test_derived_values_are_added_in_order_and_may_replace_a_declared_one(space):
    assert space.complete({**GOOD, "alpha": 20}) == {**GOOD, "alpha": 8, "share": 1.0, "steps": 4}


def test_completed_parameters_keep_the_order_of_the_file(space):
    shuffled = dict(reversed(GOOD.items()))
    assert list(space.complete(shuffled)) == [*GOOD, "share", "steps"]


@pytest.mark.parametrize(
    ("name", "given", "snapped"),
    [
        pytest.param("ratio", 0.25 + 12 * 0.05, 0.85, id="the sum of binary steps is the decimal grid value"),
        pytest.param("ratio", 0.51, 0.51, id="a value beside the grid stays what it is"),
        pytest.param("rate", math.exp(math.log(1e-3)), 1e-3, id="rounding at the upper end stays inside"),
        pytest.param("rate", 5e-5, 5e-5, id="a value inside is untouched"),
        pytest.param("dim", 8.0, 8, id="a float equal to a choice becomes the choice"),
        pytest.param("alpha", 6.0, 6, id="a float equal to a grid number becomes whole"),
    ],
)
def test_values_are_put_on_their_grid(space, name, given, snapped):
    completed = space.complete({**GOOD, "dim": 16, name: given})[name]
    assert (completed, type(completed)) == (snapped, type(snapped))


def test_the_grid_of_ratios_is_the_decimal_numbers_people_write(space):
    assert space.parameters["ratio"].grid == (
        0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"width": 3}, "there is no parameter 'width'; the parameters are rate, ratio", id="unknown name"),
        pytest.param({"dim": "8"}, "dim: '8' is not one of 4, 8, 16", id="a string for a number"),
        pytest.param({"rate": True}, "rate: True is no number in 1e-05..0.001 log", id="true for a number"),
        pytest.param({"kind": None}, "kind: None is not one of A, B", id="nothing at all"),
        pytest.param({"alpha": [6]}, "alpha: [6] is no number in 2..20 step 2", id="a list"),
    ],
)
def test_values_no_expression_can_read_are_refused(space, changes, said):
    with pytest.raises(UserError) as refusal:
        space.complete({**GOOD, **changes})
    assert said in str(refusal.value)
    assert said in space.validate({**GOOD, **changes})[0]


def test_every_missing_parameter_is_named(space):
    given = {name: GOOD[name] for name in GOOD if name not in ("dim", "kind")}
    missing = ["dim is missing; give it a value", "kind is missing; give it a value"]
    assert space.validate(given) == missing
    with pytest.raises(UserError, match=r"dim is missing.*kind is missing"):
        space.complete(given)


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        pytest.param({}, [], id="a good one has none"),
        pytest.param({"ratio": 0.8500000000000001, "rate": 9e-5}, [], id="binary rounding is none"),
        pytest.param({"rate": 0.002}, ["rate: 0.002 is outside 1e-05..0.001 log"], id="above its range"),
        pytest.param({"rate": math.nan}, ["rate: nan is outside 1e-05..0.001 log"], id="not a number"),
        pytest.param({"rate": math.inf}, ["rate: inf is outside 1e-05..0.001 log"], id="infinite"),
        pytest.param({"ratio": 0.51}, ["ratio: 0.51 is not on the grid 0.25..0.9 step 0.05"], id="beside the grid"),
        pytest.param({"ratio": 0.2}, ["ratio: 0.2 is outside 0.25..0.9 step 0.05"], id="below the grid"),
        pytest.param({"alpha": 7}, ["alpha: 7 is not on the grid 2..20 step 2"], id="beside the whole numbers"),
        pytest.param({"alpha": 10**400}, [f"alpha: {10**400} is outside 2..20 step 2"], id="beyond every float"),
        pytest.param({"dim": 5}, ["dim: 5 is not one of 4, 8, 16"], id="no choice"),
        pytest.param({"kind": "B", "cached": True}, ["B keeps no cache"], id="a rule's reason"),
        pytest.param(
            {"ratio": 0.9, "dim": 4, "rate": 2e-4},
            ["A ratio of 0.85 wants dim > 4, rate <= 1e-4 {or less}"],
            id="each failed check by name, in order, other braces untouched",
        ),
        pytest.param(
            {"rate": 0.5, "dim": 7, "ratio": 0.9, "kind": "B", "cached": True},
            [
                "rate: 0.5 is outside 1e-05..0.001 log",
                "dim: 7 is not one of 4, 8, 16",
                "B keeps no cache",
                "A ratio of 0.85 wants rate <= 1e-4, kind = A {or less}",
            ],
            id="everything at once: ranges first, then every rule",
        ),
    ],
)
def test_all_problems_are_reported(space, changes, problems):
    assert space.validate({**GOOD, **changes}) == problems
    assert space.is_feasible({**GOOD, **changes}) is (not problems)


def test_a_completed_configuration_is_valid_again_and_a_wrong_derived_value_is_not(space):
    completed = space.complete({**GOOD, "alpha": 20})
    assert space.validate(completed) == []
    assert space.validate({**completed, "steps": 5}) == ["steps: 5 is not int(dim * ratio), which is 4; leave it out"]


def test_arithmetic_broken_by_a_value_outside_is_a_problem_too(space):
    problems = space.validate({**GOOD, "dim": 0})
    assert problems[0] == "dim: 0 is not one of 4, 8, 16"
    assert "my.toml: derived -> share: 'alpha / dim' will not do; division by zero" in problems[1]


def test_spaces_that_declare_the_same_are_equal(space):
    assert space == parse_space(SPACE + "# a comment", "elsewhere.toml")
    assert space != parse_space(SPACE.replace("[4, 8, 16]", "[4, 8, 32]"), "my.toml")
    assert space != parse_space(SPACE.replace("rate <= 1e-4", "rate <= 2e-4"), "my.toml")


# ------------------------------------------------------------------------------------------------------------- draws


def test_draws_are_feasible_complete_and_repeatable(space):
    draws = [space.draw(Random(seed)) for seed in range(300)]
    assert [space.validate(values) for values in draws] == [[]] * 300
    assert {tuple(values) for values in draws} == {tuple(GOOD)}
    assert draws == [space.draw(Random(seed)) for seed in range(300)]
    assert len({values["rate"] for values in draws}) == 300


def test_a_logarithmic_range_is_drawn_evenly_by_decades():
    space = parse_space('name = "a"\n[parameters.x]\ntype = "float"\nlow = 1e-6\nhigh = 1e-2\nlog = true', "a.toml")
    rng = Random(1)
    decades = Counter(math.floor(math.log10(space.draw(rng)["x"])) for _ in range(4000))
    assert sorted(decades) == [-6, -5, -4, -3]
    assert all(abs(count - 1000) < 120 for count in decades.values())


def test_a_continuous_range_is_drawn_evenly():
    space = parse_space('name = "a"\n[parameters.x]\ntype = "float"\nlow = -2\nhigh = 2', "a.toml")
    rng = Random(1)
    quarters = Counter(math.floor(space.draw(rng)["x"]) for _ in range(4000))
    assert sorted(quarters) == [-2, -1, 0, 1]
    assert all(abs(count - 1000) < 120 for count in quarters.values())


@pytest.mark.parametrize(
    ("declaration", "values"),
    [
        pytest.param('type = "int"\nlow = -1\nhigh = 2', {-1, 0, 1, 2}, id="whole numbers with both ends"),
        pytest.param('type = "int"\nlow = 10\nhigh = 10', {10}, id="a range of one"),
        pytest.param('type = "float"\nlow = 0.1\nhigh = 0.7\nstep = 0.2', {0.1, 0.3, 0.5, 0.7}, id="a decimal grid"),
        pytest.param('type = "float"\nlow = 1\nhigh = 3\nstep = 1', {1.0, 2.0, 3.0}, id="a grid of floats"),
        pytest.param('type = "categorical"\nchoices = ["a", "b"]', {"a", "b"}, id="choices"),
    ],
)
def test_every_value_of_a_grid_is_drawn_equally_often(declaration, values):
    space = parse_space(f'name = "a"\n[parameters.x]\n{declaration}', "a.toml")
    rng = Random(1)
    drawn = Counter(space.draw(rng)["x"] for _ in range(1000 * len(values)))
    assert drawn.keys() == values
    assert {type(value) for value in drawn} == {type(value) for value in values}
    assert all(abs(count - 1000) < 120 for count in drawn.values())


STRATA = """
[start_up]
parameter = "ratio"
strata = [
    { low = 0.25, high = 0.8, weight = 1 },
    { low = 0.85, high = 0.9, weight = 3 },
]
"""


def test_strata_keep_their_weights_under_rules_that_starve_one():
    space, rng = parse_space(SPACE + STRATA, "my.toml"), Random(1)
    ratios = Counter(space.draw(rng)["ratio"] >= 0.85 for _ in range(1000))
    assert abs(ratios[True] - 750) < 60


def test_strata_divide_a_continuous_range():
    text = """
name = "a"
[parameters.x]
type = "float"
low = 1e-4
high = 1
log = true
[start_up]
parameter = "x"
strata = [ { low = 1e-4, high = 1e-1, weight = 1 }, { low = 1e-1, high = 1, weight = 1 } ]
"""
    space, rng = parse_space(text, "a.toml"), Random(1)
    drawn = [space.draw(rng)["x"] for _ in range(2000)]
    assert abs(sum(x > 0.1 for x in drawn) - 1000) < 120
    assert abs(sum(x < 1e-3 for x in drawn) - 333) < 80  # log-uniform inside a stratum


def test_a_value_nothing_is_feasible_around_is_given_up():
    rule = '[[constraints]]\nwhen = "ratio > 0.5"\nreason = "too high"\n'
    space, rng = parse_space(SPACE + rule + STRATA.replace("weight = 3", "weight = 0.1"), "my.toml"), Random(1)
    assert all(space.draw(rng)["ratio"] <= 0.5 for _ in range(5))


def test_an_empty_space_says_so_and_names_the_rule_that_empties_it():
    space = parse_space(SPACE + '[[constraints]]\nwhen = "dim > 0"\nreason = "no dim is safe"\n', "my.toml")
    with pytest.raises(UserError, match=r"'mine': none of 10,000 draws is feasible, .* 'no dim is safe'; loosen"):
        space.draw(Random(1))


# ------------------------------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize(
    ("params", "line"),
    [
        pytest.param({"network_dim": 128, "network_alpha": 96}, "  network_alpha: 96 (ratio: 0.750)", id="computed"),
        pytest.param(
            {"network_dim": 64, "network_alpha_ratio": 0.7, "network_alpha": 44},
            "  network_alpha: 44 (ratio: 0.700)",
            id="the declared ratio wins over the cut one",
        ),
        pytest.param({"network_alpha": 96}, "  network_alpha: 96", id="no dim, no ratio"),
        pytest.param({"network_dim": 0, "network_alpha": 96}, "  network_alpha: 96", id="no ratio to nothing"),
        pytest.param({"lr_scheduler": "cosine"}, "  lr_scheduler: cosine", id="a string without quotes"),
        pytest.param({"learning_rate": 8.5e-5}, "  learning_rate: 8.5e-05", id="a learning rate in full"),
    ],
)
def test_parameters_are_printed_one_to_a_line(params, line):
    lines = format_parameters(params)
    assert lines[-1] == line
    assert len(lines) == len(params)

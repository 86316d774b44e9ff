"""What a stage may draw, read from a file or from a number of epochs, and what is said of files that will not do."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from optimizer_daemon.search.load import load_space
from optimizer_daemon.search.space import parse_space
from optimizer_daemon.search.stage import Stage
from optimizer_daemon.search.stages_file import parse_stages
from shared.errors import UserError

ROOT = Path(__file__).parents[3]
SPACE = """
name = "small"
[parameters.rate]
type = "float"
low = 1e-5
high = 1e-3
log = true
[parameters.share]
type = "float"
low = 0.25
high = 0.9
step = 0.05
[parameters.dim]
type = "categorical"
choices = [4, 8, 16]
[parameters.steps]
type = "int"
low = 10
high = 50
step = 10
[parameters.max_train_epochs]
type = "categorical"
choices = [4, 8]
[[constraints]]
when = "dim >= 16 and max_train_epochs < 8"
reason = "too short for 16"
[[constraints]]
when = "steps == 30 and max_train_epochs < 8"
reason = "not thirty"
"""
ONE = '[[stages]]\nname = "one"\ntrials = 2\nepochs = 8\n'


@pytest.fixture(scope="module")
def space():
    return parse_space(SPACE, "space.toml")


def test_the_example_is_the_search_guides():
    coarse, fine, validation = parse_stages(
        (ROOT / "examples/stages_v1.toml").read_text(), "stages_v1.toml", load_space("v1")
    )
    assert [(stage.trials, stage.epochs) for stage in (coarse, fine, validation)] == [(10, 8), (20, 12), (5, 15)]
    assert str(fine.space.parameters["learning_rate"]) == "8e-05..0.00015 log"
    assert str(fine.space.parameters["network_dim"]) == "128, 192, 256"
    changed = {"learning_rate", "network_dim", "max_train_epochs"}
    for stage, narrowed in ((coarse, set()), (fine, changed), (validation, set())):
        assert stage.dropped == ()
        for name in stage.declared.parameters.keys() - narrowed - {"max_train_epochs"}:
            assert stage.space.parameters[name] == stage.declared.parameters[name]
        values = [stage.space.draw(Random(seed)) for seed in range(200)]
        assert {known["max_train_epochs"] for known in values} == {stage.epochs}
    assert validation.earlier == ("coarse", "fine")


@pytest.mark.parametrize("epochs", [8, 12, 15])
def test_epochs_that_contradict_rules_3_and_6_of_v2_1_drop_five_values_and_keep_the_rest_of_the_plan(epochs):
    stage = Stage.of(load_space("v2.1"), name="short", pinned={"max_train_epochs": epochs})
    assert [(known.parameter, known.value, known.reason.partition(" (")[0]) for known in stage.dropped] == [
        ("network_dim", 256, "High dim"),
        *(("network_alpha_ratio", ratio, "High alpha") for ratio in (0.75, 0.8, 0.85, 0.9)),
    ]
    draws = [stage.space.draw(Random(seed)) for seed in range(2000)]
    assert all(stage.declared.with_parameters({}).constraints == stage.space.constraints for _ in range(1))
    assert {known["network_dim"] for known in draws} == {64, 128}
    low = sum(known["network_alpha_ratio"] <= 0.4 for known in draws) / len(draws)
    assert low == pytest.approx(0.4, abs=0.04), "4 : 6, as between the two strata that are left"


def test_epochs_that_no_rule_minds_drop_nothing():
    assert Stage.of(load_space("v2.1"), pinned={"max_train_epochs": 16}).dropped == ()


def test_a_value_between_two_others_is_dropped_by_its_rule_alone(space):
    stage = Stage.of(space, name="short", pinned={"max_train_epochs": 4})
    assert [(known.parameter, known.value) for known in stage.dropped] == [("dim", 16), ("steps", 30)]
    assert str(stage.space.parameters["steps"]) == "10..50 step 10"
    assert {stage.space.draw(Random(seed))["steps"] for seed in range(200)} == {10, 20, 40, 50}


def test_only_a_stage_with_nothing_left_is_refused(space):
    text = ONE + "[stages.parameters.dim]\nchoices = [16]\n"
    (stage,) = parse_stages(text, "s.toml", space)
    assert {stage.space.draw(Random(seed))["dim"] for seed in range(50)} == {16}
    with pytest.raises(UserError) as caught:
        parse_stages(text.replace("epochs = 8", "epochs = 4"), "s.toml", space)
    assert str(caught.value).startswith("s.toml: stage 'one': search space 'small': none of 10,000 draws is feasible")
    assert "too short for 16" in str(caught.value)


def test_a_narrower_range_keeps_the_plans_proportions():
    (stage,) = parse_stages(
        '[[stages]]\nname = "high"\ntrials = 1\nepochs = 16\n[stages.parameters.network_alpha_ratio]\nlow = 0.6\n',
        "s.toml",
        load_space("v2.1"),
    )
    assert stage.space.start_up is not None
    # .6, .65 and .7 of a stratum of six with weight 6; .75 .. .9 with weight 4
    assert [(known.low, known.high, known.weight) for known in stage.space.start_up.strata] == [
        (0.6, 0.7, 3.0),
        (0.75, 0.9, 4.0),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("", "s.toml: stages is missing; add it", id="nothing"),
        pytest.param("stages = []", "s.toml: stages: [] will not do; write at least one", id="no stage"),
        pytest.param(
            ONE.replace("trials = 2", "trials = 0"), "stages #1 -> trials: 0 will not do; write 1 or more", id="none"
        ),
        pytest.param(ONE.replace("epochs = 8\n", ""), "s.toml: stages #1 -> epochs is missing; add it", id="no epochs"),
        pytest.param(
            ONE + "colour = 1\n",
            "stages #1 -> colour: 1 will not do; there is no such key; the keys here are name, trials, epochs, ",
            id="unknown key",
        ),
        pytest.param(ONE + ONE, "the name 'one' occurs twice; give each stage its own", id="a name twice"),
        pytest.param(ONE + "around_best = 3\n", "no stage comes before it; leave it out there", id="around what"),
        pytest.param(
            ONE + "[stages.parameters.colour]\nlow = 1\n",
            "stages #1 -> parameters -> colour: 'colour' will not do; search space 'small' has no such parameter",
            id="unknown parameter",
        ),
        pytest.param(
            ONE + "[stages.parameters.max_train_epochs]\nchoices = [8]\n",
            "a stage has one number of epochs; leave it out here",
            id="epochs twice",
        ),
        pytest.param(
            ONE + "[stages.parameters.rate]\nhigh = 2e-3\n",
            "rate -> high: 0.002 will not do; 0.002 is outside 1e-05..0.001 log; stay within what the space declares",
            id="wider",
        ),
        pytest.param(
            ONE + "[stages.parameters.rate]\nlow = 5e-4\nhigh = 4e-4\n",
            "rate -> high: 0.0004 will not do; it is below low = 0.0005; swap the two",
            id="swapped",
        ),
        pytest.param(
            ONE + "[stages.parameters.steps]\nlow = 15\n",
            "steps -> low: 15.0 will not do; 15.0 is not on the grid 10..50 step 10",
            id="beside the grid",
        ),
        pytest.param(
            ONE + "[stages.parameters.dim]\nchoices = [4, 5]\n",
            "dim -> choices: 5 will not do; the space has 4, 8, 16; take some of these",
            id="another choice",
        ),
        pytest.param(
            ONE + "[stages.parameters.dim]\nlow = 4\n",
            "dim: {'low': 4.0} will not do; it is one of 4, 8, 16; write choices = [...] with some of them",
            id="a range of choices",
        ),
        pytest.param(
            ONE + "[stages.parameters.rate]\nlog = true\n",
            "rate -> log: True will not do; there is no such key; the keys here are low, high, choices",
            id="how it is drawn",
        ),
        pytest.param(
            ONE + "[stages.parameters.rate]\n", "rate: {} will not do; it is a number in 1e-05..0.001 log", id="empty"
        ),
    ],
)
def test_what_will_not_do_is_named_with_its_place(space, text, says):
    with pytest.raises(UserError) as caught:
        parse_stages(text, "s.toml", space)
    assert says in str(caught.value)
    assert str(caught.value).startswith("s.toml: ")


def test_a_space_without_epochs_has_no_stages():
    space = parse_space('name = "line"\n[parameters.x]\ntype = "float"\nlow = 0.0\nhigh = 1.0\n', "x.toml")
    with pytest.raises(UserError, match="search space 'line' has no max_train_epochs; declare it there"):
        parse_stages(ONE, "s.toml", space)

"""Every sampler draws feasible configurations only, whatever lies behind it, and the same ones after a restart."""

from __future__ import annotations

import statistics
from random import Random
from statistics import median

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from optimizer_daemon.optuna_adapter.draws import DRAW
from optimizer_daemon.optuna_adapter.feasible import FeasibleSpace, distribution_of
from optimizer_daemon.optuna_adapter.history import History
from optimizer_daemon.optuna_adapter.models import SAMPLERS
from optimizer_daemon.optuna_adapter.sampler import FeasibleSampler, _learnable
from optimizer_daemon.search.load import load_space
from optimizer_daemon.search.space import SearchSpace, parse_space
from optimizer_daemon.search.stage import Stage

SLOW_MODELS = ("auto", "gp")
LINE = """
name = "line"
[parameters.x]
type = "float"
low = 0.0
high = 1.0
[parameters.kind]
type = "categorical"
choices = ["a", "b", "c"]
[parameters.max_train_epochs]
type = "categorical"
choices = [8]
[[constraints]]
when = "kind == 'b' and x < 0.6"
reason = "only there"
"""


def trial(space: SearchSpace, values: dict, state: TrialState, value: float | None = None, **more) -> FrozenTrial:
    distributions = {name: distribution_of(known) for name, known in space.parameters.items()}
    return create_trial(
        state=state,
        value=value if state is TrialState.COMPLETE else None,
        params=values,
        distributions=distributions,
        user_attrs={DRAW: {"stage": None, "values": values}},
        **more,
    )


@pytest.fixture(scope="module")
def studies() -> list[optuna.Study]:
    """Twenty studies: 0 to 200 ended trials, stopped, failed and out of their gate among them; 0 to 8 running."""
    space, made = load_space("v2.1"), []
    for number in range(20):
        rng = Random(number)
        study = optuna.create_study()
        trials = []
        for _ in range(number * 200 // 19):
            values = space.draw(rng)
            score = rng.random() + 1e3 * float(values["learning_rate"])
            epochs = int(values["max_train_epochs"])
            curve = {epoch: score + 0.1 * (1 - epoch / epochs) for epoch in range(2, epochs + 1, 2)}
            kind = rng.random()
            if kind < 1 / 6:
                part = {epoch: value for epoch, value in curve.items() if epoch <= epochs / 2}
                trials.append(trial(space, values, TrialState.PRUNED, intermediate_values=part))
            elif kind < 0.2:
                trials.append(trial(space, values, TrialState.FAIL))
            else:
                gate = {"gate": 1.0} if kind > 0.9 else None
                trials.append(
                    trial(space, values, TrialState.COMPLETE, score, intermediate_values=curve, constraints=gate)
                )
        trials += [trial(space, space.draw(rng), TrialState.RUNNING) for _ in range(number % 9)]
        study.add_trials(trials)
        made.append(study)
    return made


def asked(study: optuna.Study) -> FrozenTrial:
    number = len(study.trials)
    return FrozenTrial(
        number=number,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=None,
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=number,
    )


@pytest.mark.parametrize("name", SAMPLERS.names)
@pytest.mark.parametrize("asks", ["few", pytest.param("many", marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_no_draw_breaks_a_rule_whatever_the_history(studies, name, asks):
    """The slow form asks 10,000 times, 500 times where a Gaussian process is fitted."""
    space, model = load_space("v2.1"), SAMPLERS.load(name)
    each = {"few": 1 if name in SLOW_MODELS else 3, "many": 25 if name in SLOW_MODELS else 500}[asks]
    stage = Stage.of(space)
    for study in studies[:: 6 if asks == "few" and name in SLOW_MODELS else 1]:
        for seed in range(each):
            sampler = FeasibleSampler(stage, seed, model)  # a new one, as after a restart
            values = sampler.draw(study, asked(study))
            assert space.validate(values) == [], (name, len(study.trials), seed)


@pytest.mark.parametrize("name", SAMPLERS.names)
def test_a_draw_is_a_function_of_seed_and_history(studies, name):
    space, model = load_space("v2.1"), SAMPLERS.load(name)
    study = studies[3]
    first, again, other = (
        FeasibleSampler(Stage.of(space), seed, model).draw(study, asked(study)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", [name for name in SAMPLERS.names if name != "random"])
def test_a_model_finds_the_good_part_of_a_line_and_the_rule_that_bounds_it(name):
    """The best is kind b just above 0.6, where the rule begins: one of twelve draws at random is as near."""
    space, model = parse_space(LINE, "test.toml"), SAMPLERS.load(name)
    study = optuna.create_study()
    rng = Random(5)
    for _ in range(60):
        values = space.draw(rng)
        score = abs(values["x"] - 0.6) + (0.0 if values["kind"] == "b" else 0.5)
        study.add_trial(trial(space, values, TrialState.COMPLETE, score))
    count = 8 if name in SLOW_MODELS else 30
    draws = [FeasibleSampler(Stage.of(space), seed, model).draw(study, asked(study)) for seed in range(count)]
    assert all(space.is_feasible(values) for values in draws)
    near = sum(values["kind"] == "b" and values["x"] < 0.8 for values in draws)
    # NSGA-II, which mutates every second parameter here, comes there less often than the others
    assert near >= (0.2 if name == "nsga2" else 0.5) * count, draws


def test_a_stopped_trial_teaches_by_what_it_would_have_reached():
    space = parse_space(LINE, "test.toml")
    study = optuna.create_study()
    seen = []

    class Spy:
        start_up_trials = 1
        objectives = 1

        def propose(self, history: History, space: FeasibleSpace, seed: int) -> dict:
            seen.extend(history.finished)
            return space.draw(Random(seed))

    values = {"x": 0.7, "kind": "a", "max_train_epochs": 8}
    for final in (0.2, 0.3):
        curve = {2: final + 0.4, 4: final + 0.4, 8: final}
        study.add_trial(trial(space, values, TrialState.COMPLETE, final, intermediate_values=curve))
    worse = {2: 0.1, 4: 0.1}  # failed its gate, so it tells nothing of how trials go on
    study.add_trial(
        trial(space, values, TrialState.COMPLETE, 5.0, intermediate_values={**worse, 8: 5.0}, constraints={"gate": 1.0})
    )
    study.add_trial(trial(space, values, TrialState.PRUNED, intermediate_values={2: 1.0, 4: 1.2}))
    FeasibleSampler(Stage.of(space), 0, Spy()).draw(study, asked(study))
    # The peers fell by 0.4 and 0.2 from their middles to their smoothed ends, the last two checkpoints' mean.
    assert [known.value for known in seen] == [
        pytest.approx(statistics.fmean([0.6 - 0.2, 0.6 - 0.2, 0.2])),
        pytest.approx(statistics.fmean([0.7 - 0.2, 0.7 - 0.2, 0.3])),
        5.0,
        pytest.approx(1.1 - 0.2),
    ]


def test_a_finished_trial_without_a_curve_or_with_another_value_than_its_last_score_counts_by_its_value():
    space = parse_space(LINE, "test.toml")
    study = optuna.create_study()
    values = {"x": 0.7, "kind": "a", "max_train_epochs": 8}
    study.add_trial(trial(space, values, TrialState.COMPLETE, 0.4))
    study.add_trial(trial(space, values, TrialState.COMPLETE, 0.4, intermediate_values={4: 0.9, 8: 0.5}))
    assert [known.value for known in _learnable(study.trials)] == [0.4, 0.4]


def test_the_gp_finds_its_way_where_nearly_every_point_is_forbidden():
    narrow = LINE.replace("kind == 'b' and x < 0.6", "abs(x - 0.25) > 0.002")
    space = parse_space(narrow, "test.toml")
    study = optuna.create_study()
    rng = Random(2)
    for _ in range(12):
        values = space.draw(rng)
        study.add_trial(trial(space, values, TrialState.COMPLETE, values["x"]))
    for seed in range(3):
        assert space.is_feasible(FeasibleSampler(Stage.of(space), seed, SAMPLERS.load("gp")).draw(study, asked(study)))


@pytest.mark.parametrize("name", [name for name in SAMPLERS.names if SAMPLERS.load(name).objectives > 1])
def test_two_objectives(name):
    space, model = load_space("v2.1"), SAMPLERS.load(name)
    study = optuna.create_study(directions=["minimize", "minimize"])
    rng = Random(1)
    for _ in range(25):
        values = space.draw(rng)
        known = trial(space, values, TrialState.COMPLETE, 0.0)
        known.values = [rng.random(), rng.random()]
        study.add_trial(known)
    assert space.validate(FeasibleSampler(Stage.of(space), 1, model).draw(study, asked(study))) == []


def test_nearest_changes_no_more_than_the_rules_ask():
    space = load_space("v2.1")
    feasible = FeasibleSpace.of(Stage.of(space))
    values = {**space.draw(Random(0)), "network_dim": 256, "max_train_epochs": 12, "network_alpha_ratio": 0.3}
    assert not space.is_feasible(values)
    near = feasible.nearest(values, Random(1))
    assert space.is_feasible(near)
    assert sum(near[name] != value for name, value in values.items()) == 1


def test_the_newest_of_a_long_history_holds_its_best_and_latest_and_what_runs():
    space = parse_space(LINE, "test.toml")
    values = {"x": 0.7, "kind": "a", "max_train_epochs": 8}
    trials = []
    for number in range(300):
        known = trial(space, values, TrialState.COMPLETE, 1000 - number if number < 150 else 2000 + number)
        known.number = number
        trials.append(known)
    running = trial(space, values, TrialState.RUNNING)
    running.number = 300
    kept = History([optuna.study.StudyDirection.MINIMIZE], [*trials, running]).newest(20)
    numbers = [known.number for known in kept.get_trials()]
    assert numbers == [*range(140, 150), *range(290, 301)]


@pytest.mark.parametrize("name", ["gp", "tpe"])
def test_a_running_trial_repels_the_next_draw(name):
    """Without it the same model draws at the same place again."""
    space, model = parse_space(LINE, "test.toml"), SAMPLERS.load(name)

    def study(*running: dict) -> optuna.Study:
        made, rng = optuna.create_study(), Random(5)
        for _ in range(12):
            values = space.draw(rng)
            score = abs(values["x"] - 0.6) + (0.0 if values["kind"] == "b" else 0.5)
            made.add_trial(trial(space, values, TrialState.COMPLETE, score))
        for values in running:
            made.add_trial(trial(space, values, TrialState.RUNNING))
        return made

    def distance(one: dict, other: dict) -> float:
        return abs(one["x"] - other["x"]) + (one["kind"] != other["kind"])

    def draw(seed: int, *running: dict) -> dict:
        return FeasibleSampler(Stage.of(space), seed, model).draw(study(*running), asked(study(*running)))

    alone, beside = [], []
    for seed in range(3 if name in SLOW_MODELS else 9):
        first = draw(seed)
        alone.append(distance(first, draw(seed + 100)))
        beside.append(distance(first, draw(seed + 100, first)))
    assert median(alone) < 0.05 < median(beside), (alone, beside)

"""A study of several objectives: values, directions and curves in the database, and what its samplers learn from."""

from __future__ import annotations

from pathlib import Path
from random import Random

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from optimizer_daemon.optuna_adapter.draws import DRAW
from optimizer_daemon.optuna_adapter.feasible import FeasibleSpace
from optimizer_daemon.optuna_adapter.history import History
from optimizer_daemon.optuna_adapter.importances import importances
from optimizer_daemon.optuna_adapter.models import SAMPLERS, load_sampler
from optimizer_daemon.optuna_adapter.sampler import FeasibleSampler
from optimizer_daemon.optuna_adapter.several import SCORE, VALUES, directions_of, name_objectives
from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.search.load import load_space
from optimizer_daemon.search.space import SearchSpace, parse_space
from optimizer_daemon.search.stage import Stage
from shared.errors import SettingsError, StudyMismatchError
from shared.schemas import Objective

BRIGHTNESS = Objective(name="brightness", direction="minimise", target=0.5)
LIKENESS = Objective(name="likeness", direction="maximise")
OBJECTIVES = (BRIGHTNESS, LIKENESS)
ABLE = [name for name in SAMPLERS.names if SAMPLERS.load(name).objectives > 1]
SLOW_MODELS = ("auto", "gp")
SPACE = """
name = "line"
[parameters.rate]
type = "float"
low = 0.0
high = 1.0
[parameters.max_train_epochs]
type = "categorical"
choices = [8]
"""


@pytest.fixture
def space() -> SearchSpace:
    return parse_space(SPACE, "test.toml")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def opened(url: str, space: SearchSpace, **changes) -> TuningStudy:
    return TuningStudy.open("s", url, space, **{"seed": 7, "folder_id": "a", "objectives": OBJECTIVES, **changes})


def stored(url: str) -> optuna.Study:
    return optuna.load_study(study_name="s", storage=url)


def test_optuna_knows_the_names_the_directions_and_the_values_in_their_order(url, space):
    study = opened(url, space)
    draw = study.ask()
    study.tell_complete(draw.number, 0.7, None, {"likeness": 0.3, "brightness": 0.1})
    study.tell_complete(draw.number, 0.9, None, {"likeness": 0.9, "brightness": 0.9})
    loaded = stored(url)
    assert loaded.metric_names == ["brightness", "likeness"]
    assert [direction.name for direction in loaded.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert loaded.trials[0].values == [0.1, 0.3]
    assert [trial.number for trial in loaded.best_trials] == [0]
    (ended,) = opened(url, space).ended()
    assert (ended.value, ended.values) == (0.7, {"brightness": 0.1, "likeness": 0.3})


def test_a_trial_that_failed_its_gate_is_not_on_optuna_s_front(url, space):
    study = opened(url, space)
    first, second = study.ask(), study.ask()
    study.tell_complete(first.number, 0.0, "image 0 is black", {"brightness": 0.0, "likeness": 0.9})
    study.tell_complete(second.number, 0.5, None, {"brightness": 0.4, "likeness": 0.2})
    assert [trial.number for trial in stored(url).best_trials] == [second.number]


@pytest.mark.parametrize(
    ("objectives", "says"),
    [
        ((BRIGHTNESS, Objective(name="contrast", direction="minimise")), r"brightness, likeness -> brightness, contra"),
        ((LIKENESS, BRIGHTNESS), r"brightness, likeness -> likeness, brightness"),
        ((), r"brightness, likeness -> one score"),
    ],
)
def test_a_study_of_other_objectives_is_refused_naming_both(url, space, objectives, says):
    opened(url, space)
    with pytest.raises(StudyMismatchError, match=says):
        opened(url, space, objectives=objectives)


def test_a_study_of_one_score_stays_one(url, space):
    opened(url, space, objectives=())
    with pytest.raises(StudyMismatchError, match="one score -> brightness, likeness"):
        opened(url, space)


def test_a_study_cut_short_before_its_names_were_written_gets_them(url, space, monkeypatch):
    monkeypatch.setattr(optuna.Study, "set_metric_names", _crash)
    with pytest.raises(KeyboardInterrupt):
        opened(url, space)
    monkeypatch.undo()
    opened(url, space).close()
    assert stored(url).metric_names == ["brightness", "likeness"]


def _crash(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_sampler_for_one_objective_is_refused_with_the_names_of_the_others(url, space):
    with pytest.raises(SettingsError, match=r"--sampler: 'cmaes' will not do; .* take one of auto, gp, nsga2, random"):
        opened(url, space, sampler="cmaes")
    assert load_sampler("cmaes", 1)


def measure(study: TuningStudy, number: int, curve: dict[int, tuple[float, float, float]]) -> None:
    """Report (score, brightness, likeness) at each epoch."""
    for epoch, (score, brightness, likeness) in curve.items():
        study.report(number, epoch, score, {"brightness": brightness, "likeness": likeness})


def test_curves_of_the_score_prune_and_each_objective_is_kept_by_epoch(url, space):
    study = opened(url, space)
    draw = study.ask()
    measure(study, draw.number, {2: (0.9, 0.5, 0.1), 4: (0.8, 0.4, 0.2)})
    measure(study, draw.number, {4: (0.7, 0.3, 0.3)})  # a second value for an epoch replaces the first
    study.tell_pruned(draw.number, "losing")
    trial = stored(url).trials[0]
    assert (trial.state.name, trial.values) == ("PRUNED", None)
    assert trial.intermediate_values == {2: 0.9, 4: 0.7}
    (ended,) = opened(url, space).ended()
    assert ended.pruned
    assert ended.values_by_epoch[4] == {"brightness": 0.3, "likeness": 0.3}
    (peer,) = study.peers()
    assert (peer.final, peer.points) == (None, ((2, 0.9), (4, 0.7)))


def test_a_stopped_trial_teaches_each_objective_by_what_it_would_have_reached(url, space, monkeypatch):
    seen = []

    class Spy:
        start_up_trials = 1
        objectives = 2

        def propose(self, history: History, space: FeasibleSpace, seed: int) -> dict:
            seen[:] = history.finished
            return space.draw(Random(seed))

    study = opened(url, space)
    for _ in range(2):
        draw = study.ask()
        measure(study, draw.number, {2: (0.9, 0.5, 0.1), 4: (0.9, 0.5, 0.1), 8: (0.5, 0.2, 0.7)})
        study.tell_complete(draw.number, 0.5, None, {"brightness": 0.2, "likeness": 0.7})
    infeasible, pruned, silent = study.ask(), study.ask(), study.ask()
    measure(study, infeasible.number, {4: (0.1, 0.9, 0.9), 8: (9.0, 9.0, 9.0)})
    study.tell_complete(infeasible.number, 9.0, "black", {"brightness": 9.0, "likeness": 9.0})
    measure(study, pruned.number, {2: (1.0, 0.8, 0.0), 4: (1.0, 0.8, 0.0)})
    study.tell_pruned(pruned.number, "losing")
    study.tell_pruned(silent.number, "stopped before its first score")
    FeasibleSampler(Stage.of(space), 0, Spy()).draw(study._study, study._frozen(study.ask().number))
    assert [trial.number for trial in seen] == [0, 1, infeasible.number, pruned.number]
    assert seen[-1].values == pytest.approx([0.8 - 0.3, 0.0 + 0.6])


@pytest.mark.parametrize("name", ABLE)
@pytest.mark.parametrize("asks", ["few", pytest.param("many", marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_no_draw_breaks_a_rule_and_a_restart_draws_the_same(name, asks):
    """On histories of 0 to 200 ended trials and up to 8 running; the slow form asks 500 times."""
    space, model = load_space("v2.1"), SAMPLERS.load(name)
    histories, each = {
        "few": ((25,), 1) if name in SLOW_MODELS else ((0, 40, 120), 5),
        "many": ((0, 11, 30, 75, 120, 200), 84),
    }[asks]
    for count in histories:
        study = random_history(space, count)
        for seed in range(each):
            drawn = FeasibleSampler(Stage.of(space), seed, model).draw(study, asked(count))
            assert space.validate(drawn) == [], (count, seed)
            if seed == 0:  # as after a restart
                assert FeasibleSampler(Stage.of(space), seed, model).draw(study, asked(count)) == drawn


def asked(number: int) -> FrozenTrial:
    trial = create_trial(state=TrialState.RUNNING)
    trial.number = 1000 + number
    return trial


def random_history(space: SearchSpace, count: int) -> optuna.Study:
    """A study of this many ended trials, a sixth of them stopped, a tenth out of their gate; some still run."""
    rng = Random(count)
    rows = []
    for _ in range(count):
        values = space.draw(rng)
        found = [rng.random(), rng.random() + 1e3 * float(values["learning_rate"])]
        kind = rng.random()
        rows.append((values, found, "pruned" if kind < 1 / 6 else "black" if kind > 0.9 else ""))
    rows += [(space.draw(rng), None, "running") for _ in range(min(8, count // 10))]
    return history_of(space, OBJECTIVES, rows)


def history_of(space: SearchSpace, objectives, rows) -> optuna.Study:
    """A study in memory, as TuningStudy writes them: (drawn values, objectives' values, what became of it) each."""
    distributions = FeasibleSpace.of(Stage.of(space)).distributions
    study = optuna.create_study(directions=directions_of(objectives))
    name_objectives(study, objectives)
    names = [known.name for known in objectives]
    for drawn, values, kind in rows:
        half = int(drawn["max_train_epochs"]) // 2
        measured = values is not None
        study.add_trial(
            create_trial(
                state={"pruned": TrialState.PRUNED, "running": TrialState.RUNNING}.get(kind, TrialState.COMPLETE),
                values=values if measured and kind != "pruned" else None,
                params=drawn,
                distributions=distributions,
                user_attrs={
                    DRAW: {"stage": None, "values": drawn},
                    **({VALUES: {str(half): dict(zip(names, values, strict=True))}, SCORE: sum(values)} if measured
                       else {}),
                },
                intermediate_values={half: sum(values)} if measured else {},
                constraints={"gate": 1.0} if kind == "black" else None,
            )
        )  # fmt: skip
    return study


@pytest.mark.parametrize("name", [name for name in ABLE if name != "random"])
def test_a_model_comes_to_the_trade_offs_of_a_line_and_keeps_out_of_the_infeasible_part(name):
    """Distances to 0.2 and to 0.4: every trade-off lies between them; below 0.3 trials fail their gate."""
    idle = '[parameters.idle]\ntype = "float"\nlow = 0.0\nhigh = 1.0\n'
    space, model, rng = parse_space(SPACE + idle, "t"), SAMPLERS.load(name), Random(3)
    objectives = tuple(Objective(name=each, direction="minimise") for each in ("first", "second"))
    rows = []
    for _ in range(60):
        values = space.draw(rng)
        rate = float(values["rate"])
        rows.append((values, [abs(rate - 0.2), abs(rate - 0.4)], "black" if rate < 0.3 else ""))
    study = history_of(space, objectives, rows)
    count = 8 if name in SLOW_MODELS else 30
    rates = [FeasibleSampler(Stage.of(space), seed, model).draw(study, asked(60))["rate"] for seed in range(count)]
    near = sum(0.28 <= rate <= 0.42 for rate in rates)
    # One of seven draws at random; NSGA-II draws every second parameter of two anew.
    assert near >= (0.3 if name == "nsga2" else 0.5) * count, sorted(rates)


def test_the_newest_of_a_long_history_holds_its_first_fronts():
    space = parse_space(SPACE, "t")
    distributions = FeasibleSpace.of(Stage.of(space)).distributions
    trials = []
    for number in range(40):
        layer = (39 - number) // 10  # the last ten are the best front
        values = [float(number % 10) + layer, float(9 - number % 10) + layer]
        trial = create_trial(values=values, params={"rate": 0.5, "max_train_epochs": 8}, distributions=distributions)
        trial.number = 39 - number  # and the earliest, so that they are not kept for being late
        trials.append(trial)
    trials.sort(key=lambda trial: trial.number)
    kept = History([optuna.study.StudyDirection.MINIMIZE] * 2, trials).newest(20)
    assert [trial.number for trial in kept.get_trials()] == [*range(10), *range(30, 40)]


def test_importances_are_about_the_score(url, space):
    study = opened(url, parse_space(SPACE + '[parameters.idle]\ntype = "float"\nlow = 0.0\nhigh = 1.0\n', "t"))
    for _ in range(8):
        draw = study.ask()
        study.tell_complete(draw.number, draw.values["rate"], None, {"brightness": 0.1, "likeness": 0.1})
    assert next(iter(importances("s", url))) == "rate"

"""The Optuna study on a real SQLite file: feasible draws, no lost and no doubled trial, whatever was cut short."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import optuna
import pytest

from optimizer_daemon.optuna_adapter.models import SAMPLERS
from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.search.load import load_space
from optimizer_daemon.search.space import SearchSpace, parse_space
from optimizer_daemon.search.stage import Stage
from shared.errors import ResourceError, SettingsError, StudyMismatchError

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
[parameters.epochs]
type = "int"
low = 2
high = 8
step = 2
[derived]
alpha = "int(dim * share)"
[[constraints]]
when = "dim >= 8 and rate > 1e-4"
reason = "too hot"
[[constraints]]
when = "share >= 0.5 and epochs < 6"
reason = "too short"
"""


@pytest.fixture
def space() -> SearchSpace:
    return parse_space(SPACE, "test.toml")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def opened(url: str, space: SearchSpace, **changes) -> TuningStudy:
    return TuningStudy.open("small", url, space, **{"seed": 42, "folder_id": "a", **changes})


def stored(url: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="small", storage=url).trials


def test_every_draw_is_feasible_by_start_up_and_by_the_model_and_optuna_holds_the_same_values(url, space, monkeypatch):
    monkeypatch.setattr(SAMPLERS.load("tpe"), "start_up_trials", 3)
    study = opened(url, space)
    for _ in range(6):
        draw = study.ask()
        assert space.validate(draw.values) == []
        study.tell_complete(draw.number, draw.values["rate"], None)
        assert stored(url)[draw.number].params == draw.values


@pytest.mark.slow
def test_the_model_learns_once_the_start_up_draws_are_told(url, monkeypatch):
    space = parse_space('name = "line"\n[parameters.x]\ntype = "float"\nlow = 0.0\nhigh = 1.0\n', "test.toml")
    study = TuningStudy.open("small", url, space, seed=1, folder_id="a")
    distances = []
    for _ in range(30):
        draw = study.ask()
        distances.append(abs(draw.values["x"] - 0.3))
        study.tell_complete(draw.number, distances[-1], None)
    assert sum(distances[20:]) / 10 < 0.75 * sum(distances[:10]) / 10


def test_v2_1_yields_feasible_draws_with_its_grid_values_exact(url):
    space = load_space("v2.1")
    study = opened(url, space)
    for _ in range(2):
        draw = study.ask()
        assert space.validate(draw.values) == []
        assert draw.values["network_alpha_ratio"] == round(draw.values["network_alpha_ratio"], 2)


def test_draws_depend_on_seed_and_number_only(tmp_path, space):
    first = opened(f"sqlite:///{tmp_path / '1.db'}", space)
    whole = [first.ask().values for _ in range(2)]
    resumed = f"sqlite:///{tmp_path / '2.db'}"
    cut = [opened(resumed, space).ask().values for _ in range(2)]  # a daemon restarted before each draw
    other = opened(f"sqlite:///{tmp_path / '3.db'}", space, seed=43).ask().values
    assert whole == cut
    assert len({str(values) for values in whole}) == 2
    assert other != whole[0]


def test_a_trial_cut_short_after_its_draw_keeps_it_and_one_before_is_drawn_under_its_number(url, space, monkeypatch):
    study = opened(url, space)
    monkeypatch.setattr(optuna.trial.Trial, "suggest_int", _crash)
    with pytest.raises(KeyboardInterrupt):
        study.ask()  # the draw is stored, its last parameter is not suggested
    monkeypatch.setattr(optuna.trial.Trial, "set_user_attr", _crash)
    with pytest.raises(KeyboardInterrupt):
        study.ask()  # not even the draw is stored
    monkeypatch.undo()
    kept = stored(url)[0].user_attrs["draw"]["values"]
    found = opened(url, space).running()
    assert [draw.number for draw in found] == [0, 1]
    assert found[0].values == kept
    assert stored(url)[0].params == kept
    assert space.is_feasible(found[1].values)
    assert len(stored(url)) == 2


def _crash(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_telling_twice_changes_nothing_and_an_infeasible_trial_keeps_its_value_but_never_wins(url, space):
    study = opened(url, space)
    first, second = study.ask(), study.ask()
    study.tell_complete(first.number, 0.1, "image 0 is black")
    study.tell_complete(first.number, 9.9, None)
    study.tell_complete(second.number, 0.5, None)
    study.tell_failed(second.number, "late")
    loaded = optuna.load_study(study_name="small", storage=url)
    assert [trial.value for trial in loaded.trials] == [0.1, 0.5]
    assert loaded.trials[0].user_attrs["reason"] == "image 0 is black"
    assert loaded.best_trial.number == 1


def test_a_tell_cut_short_after_its_constraint_is_completed_without_a_warning(url, space, monkeypatch):
    study = opened(url, space)
    draw = study.ask()
    monkeypatch.setattr(optuna.Study, "tell", _crash)
    with pytest.raises(KeyboardInterrupt):
        study.tell_complete(draw.number, 0.2, "black")
    monkeypatch.undo()
    opened(url, space).tell_complete(draw.number, 0.2, "black")
    assert stored(url)[0].value == 0.2


def test_a_failed_trial_has_no_value_and_its_reason(url, space):
    study = opened(url, space)
    study.tell_failed(study.ask().number, "out of memory")
    assert stored(url)[0].state is optuna.trial.TrialState.FAIL
    assert stored(url)[0].user_attrs["reason"] == "out of memory"


def test_a_second_value_for_an_epoch_replaces_the_first(url, space):
    study = opened(url, space)
    draw = study.ask()
    study.report(draw.number, 2, 0.4)
    study.report(draw.number, 2, 0.3)
    study.report(draw.number, 4, 0.2)
    assert stored(url)[0].intermediate_values == {2: 0.3, 4: 0.2}


def test_pinned_epochs_stay_out_of_the_model_and_a_stage_is_kept_with_the_draw(url, space):
    opened(url, space).ask()
    staged = opened(url, space, stage=Stage.of(space, name="7 epochs", pinned={"epochs": 7}))
    draw = staged.ask()
    assert (draw.values["epochs"], draw.stage) == (7, "7 epochs")
    assert "epochs" not in stored(url)[1].params
    assert opened(url, space).ask().values["epochs"] in (2, 4, 6, 8)


def test_a_trial_drawn_with_pinned_epochs_goes_on_where_they_are_free_again(url, space):
    drawn = opened(url, space, stage=Stage.of(space, name="3 epochs", pinned={"epochs": 3})).ask()
    assert drawn.values["epochs"] == 3
    assert opened(url, space).running() == [drawn]
    assert "epochs" not in stored(url)[0].params


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("int(dim * share)", "int(2 * dim * share)", "derived alpha: int(dim * share) -> int(2 * dim * share)"),
        ("dim >= 8 and", "dim >= 16 and", "constraint 1: when dim >= 8 and rate > 1e-4 -> when dim >= 16"),
    ],
    ids=["a derived value", "a rule"],
)
def test_a_space_that_computes_or_forbids_otherwise_is_refused(url, space, before, after, says):
    opened(url, space).ask()
    changed = parse_space(SPACE.replace(before, after), "test.toml")
    with pytest.raises(StudyMismatchError, match=re.escape(says)):
        opened(url, changed)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"folder_id": "b"}, "belongs to folder a, not to b", id="another folder"),
        pytest.param(
            {"space": parse_space(SPACE.replace("[4, 8, 16]", "[4, 8]"), "t")},
            "dim: 4, 8, 16 -> 4, 8",
            id="other choices",
        ),
    ],
)
def test_a_study_made_otherwise_is_refused_before_a_trial_is_drawn(url, space, changes, says):
    opened(url, space)
    with pytest.raises(StudyMismatchError) as caught:
        opened(url, **{"space": space, **changes})
    assert says in str(caught.value)
    assert stored(url) == []


@pytest.mark.parametrize("bad", ["sqlite:////no/such/folder/study.db", "no-url", "nosql://x"])
def test_a_storage_that_does_not_open_is_named_with_its_flag(space, bad):
    with pytest.raises(SettingsError, match="--storage"):
        opened(bad, space)


def test_the_database_keeps_a_write_ahead_log_so_that_a_reader_does_not_stop_us(url, space, tmp_path):
    study = opened(url, space)
    with sqlite3.connect(tmp_path / "study.db") as reader:
        assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM trials").fetchone()
        study.ask()
        reader.execute("COMMIT")
    reader.close()


def test_a_database_that_fails_is_a_missing_resource_with_a_remedy(url, space, tmp_path):
    study = opened(url, space)
    with sqlite3.connect(tmp_path / "study.db") as damage:
        damage.execute("DROP TABLE trial_user_attributes")
    damage.close()
    with pytest.raises(ResourceError, match="the same command goes on"):
        study.ask()

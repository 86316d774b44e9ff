"""Every registered sampler draws feasible configurations, the same ones for the same seed."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from optimizer_daemon.optuna_adapter.models import SAMPLERS
from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.search.space import SearchSpace, parse_space
from shared.errors import UnknownPluginError

SPACE = """
name = "small"
[parameters.rate]
type = "float"
low = 1e-5
high = 1e-3
log = true
[parameters.dim]
type = "categorical"
choices = [4, 8, 16]
[[constraints]]
when = "dim >= 8 and rate > 1e-4"
reason = "too hot"
"""

SIX = """
name = "six"
[parameters.dim]
type = "categorical"
choices = [4, 8, 16]
[parameters.kind]
type = "categorical"
choices = ["a", "b"]
"""


@pytest.fixture
def space() -> SearchSpace:
    return parse_space(SPACE, "test.toml")


def draws(folder: Path, space: SearchSpace, name: str) -> list[dict]:
    folder.mkdir()
    study = TuningStudy.open("s", f"sqlite:///{folder / 's.db'}", space, seed=3, folder_id="a", sampler=name)
    found = []
    for _ in range(5):
        draw = study.ask()
        study.tell_complete(draw.number, draw.values["rate"], None)
        found.append(draw.values)
    return found


@pytest.mark.parametrize("name", ["nsga2", "random", "tpe"])
def test_a_sampler_draws_feasible_values_and_repeats_them_for_its_seed(tmp_path, space, monkeypatch, name):
    monkeypatch.setattr(SAMPLERS.load("tpe"), "start_up_trials", 2)
    found = draws(tmp_path / "one", space, name)
    assert all(space.is_feasible(values) for values in found)
    assert draws(tmp_path / "two", space, name) == found


def test_random_never_learns_and_tpe_does(tmp_path, space, monkeypatch):
    monkeypatch.setattr(SAMPLERS.load("tpe"), "start_up_trials", 2)
    plain = [space.draw(Random(f"3/{number}")) for number in range(5)]
    assert draws(tmp_path / "random", space, "random") == plain
    assert draws(tmp_path / "tpe", space, "tpe")[2:] != plain[2:]


def test_an_unknown_sampler_is_refused_before_the_database_is_made(tmp_path, space):
    file = tmp_path / "s.db"
    with pytest.raises(UnknownPluginError, match="no sampler named 'grid'; choose one of auto, cmaes, gp, "):
        TuningStudy.open("s", f"sqlite:///{file}", space, seed=3, folder_id="a", sampler="grid")
    assert not file.exists()


@pytest.mark.parametrize("name", SAMPLERS.names)
def test_two_drawn_before_one_is_told_are_never_the_same(tmp_path, monkeypatch, name):
    """Of six configurations, so that chance and a model that insists would both repeat one."""
    monkeypatch.setattr(SAMPLERS.load(name), "start_up_trials", 4 if name != "random" else None)
    space = parse_space(SIX, "test.toml")
    study = TuningStudy.open("s", f"sqlite:///{tmp_path / 's.db'}", space, seed=3, folder_id="a", sampler=name)
    for _ in range(6):
        pair = study.ask(), study.ask()
        assert pair[0].values != pair[1].values
        for draw in pair:
            study.tell_complete(draw.number, draw.values["dim"] + (draw.values["kind"] == "b"), None)


def test_a_space_that_has_no_more_configurations_repeats_one(tmp_path):
    space = parse_space(SIX, "test.toml")
    study = TuningStudy.open("s", f"sqlite:///{tmp_path / 's.db'}", space, seed=3, folder_id="a", sampler="random")
    draws = [study.ask().values for _ in range(7)]
    assert len({tuple(values.items()) for values in draws[:6]}) == 6
    assert draws[6] in draws[:6]

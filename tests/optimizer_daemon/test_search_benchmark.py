"""The search benchmark's own parts: frozen tasks, faults, regret, intervals, pairs, and a run that goes on."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from optuna.pruners import NopPruner

from benchmarks.search import compare
from benchmarks.search.compare import Cache, interval, summary, text
from benchmarks.search.strategies import Point, Run, _Ledger, optuna_s, ours, repaired, strategies
from benchmarks.search.tasks import CRASHES, FAMILIES, FAULTY, UNSCORED, Task, Training, space

FROZEN = {
    "bowl": "556d3b63dd0d36e2",
    "corner": "99c72bbc45fd3d99",
    "interactions": "6889eb9243a7c1e8",
    "flat": "f9e0f9ea973b6dfd",
    "cliff": "e80a1e6dc76eb1b7",
    "rugged": "b3a26d176bc685f5",
    "crossing": "22204cff171d9423",
    "faulty": "887c2a79ee218ed8",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tasks_are_those_that_the_recorded_figures_come_from(family):
    """Who changes a family makes every recorded figure of it worthless; a new idea is a new family."""
    task, rng, lines = Task(family, 0), Random(f"frozen/{family}"), []
    for number in range(20):
        values = space().draw(rng)
        training = task.training(values, Random(number))
        scores = " ".join(f"{then}/{epoch}/{score:.9f}" for then, epoch, score in training.scores)
        lines.append(f"{task.final(values):.9f} {training.epochs} {training.crashed} {scores}")
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == FROZEN[family]


def test_regret_is_0_at_the_best_and_1_on_average():
    task, rng = Task("bowl", 3), Random(1)
    finals = [task.final(space().draw(rng)) for _ in range(1_000)]
    assert min(finals) >= 0.0
    assert np.mean(finals) == pytest.approx(1.0, abs=0.1)


def test_too_few_studies_are_called_neither_better_nor_worse():
    default, other = list(strategies())[:2]
    table = summary([result(default, 0, 0.2), result(other, 0, 0.1)], 480)
    assert f"| {other} | 1 | 0.100 | 0.100 |" in text(table)


def test_a_faulty_family_crashes_leaves_out_and_is_late():
    task, rng = Task(FAULTY, 0), Random(2)
    trainings = [task.training(space().draw(rng), rng) for _ in range(600)]
    crashed = [training for training in trainings if training.crashed]
    assert len(crashed) / 600 == pytest.approx(CRASHES, abs=0.04)
    assert all(training.final is None for training in crashed)
    scores = [known for training in trainings for known in training.scores]
    assert np.mean([math.isnan(score) for _, _, score in scores]) == pytest.approx(UNSCORED, abs=0.02)
    for training in trainings:
        assert all(epoch < then or epoch == then == training.epochs for then, epoch, _ in training.scores)
    sound = Task("bowl", 0).training(space().draw(rng), rng)
    assert not sound.crashed
    assert [then for then, _, _ in sound.scores] == [epoch for _, epoch, _ in sound.scores]


def test_a_training_that_is_cut_is_judged_by_its_last_checkpoint():
    whole = Training([(2, 2, 0.9), (4, 4, 0.6), (6, 6, 0.5)], 6)
    cut = whole.cut(5)
    assert (cut.epochs, cut.final) == (4, 0.6)
    assert whole.final == 0.5


def test_a_run_tells_its_regret_at_a_time_and_since_when_it_is_that_good():
    run = Run([Point(10, 0.5), Point(20, 0.1), Point(30, 0.25), Point(40, 0.2)], 4, 0)
    assert [run.at(epochs) for epochs in (5, 10, 29, 30, 99)] == [1.0, 0.5, 0.1, 0.25, 0.2]
    assert run.epochs_to(0.3) == 20
    assert run.epochs_to(0.2) == 40
    assert run.epochs_to(0.1) == math.inf


def test_the_repetitions_of_the_best_decide_and_what_exceeds_the_budget_does_not_count():
    task, rng = Task("bowl", 0), Random(0)
    lucky, good, late = (space().draw(rng) for _ in range(3))
    ledger = _Ledger(task, 40)
    ledger.add(lucky, 10, 0.1)
    ledger.add(good, 10, 0.2)
    assert ledger.points[-1].regret == task.final(lucky)
    ledger.add(lucky, 10, 0.6, again=0)
    ledger.add(good, 10, 0.3, again=1)
    assert ledger.points[-1] == Point(40, task.final(good))
    ledger.add(late, 10, -5.0)
    assert ledger.points[-1] == Point(40, task.final(good))


def test_an_interval_holds_the_mean_and_narrows_with_more_seeds():
    rng = np.random.default_rng(1)
    few, many = rng.normal(2.0, 1.0, 20), rng.normal(2.0, 1.0, 2_000)
    mean, low, high = interval(few)
    assert low < mean < high
    assert mean == pytest.approx(few.mean())
    assert high - low == pytest.approx(2 * 1.96 * few.std() / math.sqrt(20), rel=0.15)
    _, least, most = interval(many)
    assert most - least < (high - low) / 5
    assert interval(few) == (mean, low, high)


def result(strategy: str, seed: int, regret: float) -> dict:
    return {
        "strategy": strategy,
        "family": "bowl",
        "seed": seed,
        "epochs": 480,
        "regret": [1.0, 0.5, regret],
        "epochs_to": [100, None, None],
        "trials": 30,
        "infeasible": 3,
        "cpu_s": 1.0,
    }


def test_strategies_are_compared_on_the_seeds_that_both_have_done():
    default, other = list(strategies())[:2]
    results = [result(default, seed, 0.1 + 0.1 * seed) for seed in range(15)]
    results += [result(other, seed, 0.05 + 0.1 * seed) for seed in range(3, 18)]
    table = summary(results, 480)
    row = table["families"]["bowl"][other]
    assert row["studies"] == 15
    assert row["difference"] == pytest.approx(-0.05)
    assert row["difference_interval"] == pytest.approx([-0.05, -0.05])
    assert row["share_of_default"][0] == pytest.approx(0.9 / 0.95)
    assert row["epochs_to"] == [100.0, None, None]
    assert f"| {other} | 15 | **1.050** | **1.050** |" in text(table)
    assert f"| {other} | 15 | 1.000 / 0.500 / 1.050 |" in text(table)
    assert "| -0.050 (-0.050..-0.050) | 95% (" in text(table)


@pytest.mark.parametrize("family", ["bowl", FAULTY])
def test_every_kind_of_strategy_spends_its_budget_on_what_breaks_no_rule(family):
    known = strategies()
    task = Task(family, 1)
    for name in ("Optuna default: TPE + Median", "random, twice the budget", "every training cut at half"):
        assert_sound(known[name](task, 100, 1))
    assert_sound(ours("random", "median", True, task, 100, 1))
    random = known["random"].args[0]  # type: ignore[attr-defined]
    plain, moved = optuna_s(random, NopPruner, task, 100, 1), repaired(random, task, 100, 1)
    assert_sound(plain)
    assert_sound(moved)
    assert plain.infeasible > 0


def assert_sound(run: Run) -> None:
    epochs = [point.epochs for point in run.points]
    assert epochs == sorted(epochs)
    assert 60 <= epochs[-1] <= 100
    assert all(point.regret >= 0 for point in run.points)


def test_a_run_that_was_ended_goes_on_with_what_is_missing(tmp_path, monkeypatch, capsys):
    default, other = "Optuna default: TPE + Median", "random"
    asked = []

    class Here:
        """A pool of processes that runs nothing."""

        def __init__(self, jobs: int) -> None: ...

        def __enter__(self):
            return self

        def __exit__(self, *exc: object) -> None: ...

        def imap_unordered(self, run, jobs):
            for family, seed, epochs, names in jobs:
                asked.append((family, seed, names))
                yield [{**result(name, seed, 0.1), "family": family, "epochs": epochs} for name in names]

    monkeypatch.setattr(compare.multiprocessing, "get_context", lambda kind: SimpleNamespace(Pool=Here))
    Cache(tmp_path / "studies.jsonl").add([result(default, 0, 0.2), result(other, 1, 0.3)])
    arguments = [
        "compare",
        "--seeds",
        "2",
        "--families",
        "bowl",
        "--strategies",
        default,
        other,
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    compare.main()
    assert asked == [("bowl", 0, [other]), ("bowl", 1, [default])]
    assert len((tmp_path / "studies.jsonl").read_text().splitlines()) == 4
    rows = json.loads((tmp_path / "comparison.json").read_text())["families"]["bowl"]
    assert rows[other]["studies"] == 2
    assert (tmp_path / "comparison.png").stat().st_size > 1_000
    asked.clear()
    compare.main()
    assert asked == []
    assert "| random | 2 |" in capsys.readouterr().out

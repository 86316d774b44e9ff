"""The two pictures of results/, for studies with nothing, little and enough to show."""

from __future__ import annotations

from datetime import datetime

import pytest

from optimizer_daemon.analysis.plots import history_figure, importances_figure
from optimizer_daemon.optuna_adapter.importances import importances
from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.results import ranked, winner
from optimizer_daemon.search.space import parse_space
from shared.schemas import AllTrials, TrialResult

NOW = datetime.now().astimezone()


def trials(*values: float | None, infeasible: tuple[int, ...] = ()) -> AllTrials:
    """One trial for each value; None failed."""
    results = [
        TrialResult(
            trial=number, optuna_number=number - 1, value=value, parameters={"rate": 0.1},
            state="failed" if value is None else "complete", reason="out of memory" if value is None else None,
            feasible=None if value is None else number not in infeasible,
        )
        for number, value in enumerate(values, 1)
    ]  # fmt: skip
    return AllTrials(
        study_name="s", updated=NOW, objective="combined_score", direction="minimise", trials=tuple(results)
    )


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_the_history_shows_measured_infeasible_and_failed_trials_and_the_best_so_far():
    axes = history_figure(trials(0.4, None, 0.1, 0.3, infeasible=(3,))).axes[0]
    shown = {artist.get_label(): artist for artist in axes.collections}
    assert shown["measured"].get_offsets().tolist() == [[1, 0.4], [4, 0.3]]
    assert shown["failed its gate"].get_offsets().tolist() == [[3, 0.1]]
    assert shown["failed, no score"].get_offsets().tolist() == [[2, 0.1]]
    (best,) = axes.lines
    assert list(zip(*best.get_data(), strict=True)) == [(1, 0.4), (4, 0.3)]


@pytest.mark.parametrize(
    ("study", "says"),
    [(trials(), "no trial has a score yet"), (trials(None), "no trial has a score yet")],
    ids=["no trial", "one failed trial"],
)
def test_a_history_without_scores_says_so(study, says):
    assert texts(history_figure(study)) == [says]


def test_importances_need_two_trials_that_passed_their_gate_and_say_so():
    (sentence,) = texts(importances_figure(trials(0.4, 0.3, infeasible=(1,)), {}))
    assert "there are 1" in sentence


def test_the_parameter_that_decides_is_the_most_important_one_and_infeasible_trials_do_not_count(tmp_path):
    text = "".join(f'[parameters.{name}]\ntype = "float"\nlow = 0.0\nhigh = 1.0\n' for name in ("idle", "rate"))
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = TuningStudy.open("s", url, parse_space('name = "s"\n' + text, "t"), seed=1, folder_id="a")
    for _ in range(6):
        draw = study.ask()
        study.tell_complete(draw.number, draw.values["rate"], None)
        if draw.number == 0:
            assert importances("s", url) == {}
    draw = study.ask()
    study.tell_complete(draw.number, -100.0, "black")
    shares = importances("s", url)
    assert next(iter(shares)) == "rate"
    assert all(one.low <= one.share <= one.high for one in shares.values())
    axes = importances_figure(trials(0.1, 0.2), shares).axes[0]
    bars, found = axes.containers[0], [shares[name] for name in reversed(shares)]
    assert [round(bar.get_width(), 6) for bar in bars] == [round(one.share, 6) for one in found]
    assert [list(line.get_xdata()) for line in axes.lines] == [[one.low, one.high] for one in found]


def test_a_trial_that_failed_its_gate_is_ranked_last_and_never_wins():
    study = trials(0.4, 0.1, 0.3, None, infeasible=(2,))
    assert [trial.trial for trial in ranked(study)] == [3, 1, 2]
    assert winner(study).trial == 3
    assert winner(trials(0.1, infeasible=(1,))) is None

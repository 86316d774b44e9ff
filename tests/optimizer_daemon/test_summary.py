"""The live line and the time left, with one training and with several."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from optimizer_daemon.summary import progress_parts, seconds_left
from shared.progress_bar import Progress
from shared.schemas import AllTrials, TrialResult

BEGIN = datetime(2025, 11, 15, 10, tzinfo=UTC)


def ended(*took_s: float) -> AllTrials:
    """A study whose finished trials took so long."""
    trials = tuple(
        TrialResult(
            trial=number, optuna_number=number - 1, state="complete", value=0.1, feasible=True, parameters={},
            started=BEGIN, ended=BEGIN + timedelta(seconds=took),
        )
        for number, took in enumerate(took_s, 1)
    )  # fmt: skip
    return AllTrials(study_name="s", updated=BEGIN, objective="score", direction="minimise", trials=trials)


def training(number: int) -> Any:
    return SimpleNamespace(
        number=number,
        state=SimpleNamespace(state="training"),
        progress=Progress(2, 12, 48, 0.125, 0.5, 18.0),
        params=SimpleNamespace(max_train_epochs=8),
    )


@pytest.mark.parametrize(
    ("slots", "left", "seconds"),
    [
        pytest.param(1, 3, 300.0, id="one after the other"),
        pytest.param(2, 4, 200.0, id="two at once"),
        pytest.param(4, 1, 100.0, id="the last one has the machine to itself and is no faster for it"),
        pytest.param(2, 0, 0.0, id="nothing left"),
        pytest.param(2, -1, 0.0, id="more than asked for"),
    ],
)
def test_the_time_left_counts_slots(slots, left, seconds):
    assert seconds_left(ended(80.0, 120.0), left, slots) == seconds


def test_the_line_says_less_of_each_where_several_train():
    one = progress_parts([training(3)], ended(100.0), 2, 5, slots=2, paused=False)
    assert one == [
        "2/5 trials",
        "trial 3 training: epoch 2/8, step 12/48, loss 0.125, s_per_step 0.5, eta 18 s",
        "about 2:30 left",
    ]
    two = progress_parts([training(3), training(4)], ended(100.0), 2, 5, slots=2, paused=True)
    assert two[:4] == [
        "2/5 trials",
        "paused",
        "trial 3 training: epoch 2/8, eta 18 s",
        "trial 4 training: epoch 2/8, eta 18 s",
    ]

"""The loss on display: what a watcher may stop a training for."""

from __future__ import annotations

import io
import math
import sys

import pytest
import torch

from optimizer_daemon.lora_training.reporting import MeanLoss, Reporter
from optimizer_daemon.lora_training.state import Position
from shared.progress_bar import parse_bar


@pytest.mark.parametrize(
    ("losses", "mean"),
    [
        pytest.param([1.0, 3.0], 2.0, id="numbers"),
        pytest.param([1.0, math.nan, 3.0, math.inf], 2.0, id="a step that overflowed is left out"),
        pytest.param([math.nan], math.nan, id="nothing but overflows"),
        pytest.param([], math.nan, id="nothing yet"),
    ],
)
def test_the_mean_is_of_the_losses_that_are_numbers(losses: list[float], mean: float):
    assert MeanLoss(losses).value == pytest.approx(mean, nan_ok=True)


def test_the_bar_says_nan_of_the_latest_step_only(monkeypatch: pytest.MonkeyPatch):
    output = io.StringIO()
    monkeypatch.setattr(sys, "stderr", output)
    shown = []
    with Reporter(epochs=1, total_steps=9, start=Position(), losses=(), logging_dir=None, rate_names=()) as reporter:
        for step, loss in enumerate([2.0, math.nan, 4.0], 1):
            reporter.step(step, [step - 1], [torch.tensor(loss)], [])
            reporter.catch_up()
            progress = parse_bar(output.getvalue())
            assert progress is not None and progress.step == step
            shown.append(progress.loss)
    assert shown == pytest.approx([2.0, math.nan, 3.0], nan_ok=True)

"""The training benchmark's arithmetic, and what it reads from a progress bar."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from benchmarks.training.compare import Figures, ratio_interval, table
from benchmarks.training.watching import Training


def test_the_ratio_is_of_the_totals_and_lies_in_its_interval():
    ratio, low, high = ratio_interval([2.0, 4.0, 3.0], [1.0, 1.0, 1.0])

    assert ratio == 3.0
    assert 2.0 <= low < ratio < high <= 4.0


def test_equal_rounds_leave_no_doubt():
    assert ratio_interval([3.0] * 5, [2.0] * 5) == (1.5, 1.5, 1.5)


def test_each_round_stays_with_its_pair():
    """A loaded round slows both: the ratio of such pairs is sure, that of shuffled ones is not."""
    loads = [1.0, 5.0, 2.0, 9.0]

    assert ratio_interval([2 * load for load in loads], loads) == (2.0, 2.0, 2.0)


def test_the_table_says_how_much_faster_and_sooner_ours_is():
    ours = Figures(start_s=[2.0], start_cpu_s=[1.0], wall_s=[1.0, 1.0], cpu_s=[1.0, 1.0], peak_bytes=2**30)
    theirs = Figures(start_s=[20.0], start_cpu_s=[9.0], wall_s=[1.5, 1.5], cpu_s=[3.0, 3.0], peak_bytes=2**31)

    *_, native, other = table({"64 px": {"native": ours, "sd-scripts": theirs}}).splitlines()

    assert native == "| 64 px | native | 2.0 (1.0) |  | 1.00 (1.00) |  |  | 1.0 GB |"
    assert "| 20.0 (9.0) | 10.00x (once) |" in other
    assert "| 1.50x (1.50 to 1.50) | 3.00x (3.00 to 3.00) | 2.0 GB |" in other


@pytest.mark.parametrize("name", ["steps", "Steps"])  # sd-scripts and we, the diffusers example
def test_steps_and_losses_are_read_from_the_bar(tmp_path, name):
    log = tmp_path / "training.log"
    log.write_text(
        f"{name}:   0%| | 0/8 [00:00<?, ?it/s]\r{name}:  25%| | 2/8 [00:02<00:06, 1.00s/it, avr_loss=0.31]\r"
        f"{name}:  38%| | 3/8 [00:03<00:05, 1.00s/it, avr_loss=2.5e-01]"
    )
    training = Training(log)
    training.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        training.wait_for_step(3)

        assert (training.step, training.losses) == (3, {2: 0.31, 3: 0.25})
        assert training.peak_bytes > 2**20
        training.pause()
        os.waitid(os.P_PID, training.process.pid, os.WSTOPPED | os.WNOWAIT)
    finally:
        training.process.send_signal(signal.SIGKILL)
        training.process.wait()


def test_a_training_that_ended_says_its_last_lines(tmp_path):
    log = tmp_path / "training.log"
    log.write_text("ValueError: no such model")
    training = Training(log)
    training.process = subprocess.Popen([sys.executable, "-c", ""])
    try:
        with pytest.raises(RuntimeError, match="no such model"):
            training.wait_for_step(1)
    finally:
        training.process.wait()

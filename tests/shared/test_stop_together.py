"""Several trainings are stopped at once: it takes as long as the slowest, and a second signal need not wait for it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from shared.layout import TrialLayout
from shared.supervised import SupervisedProcess, start_supervised, stop_together
from tests.shared.process_trees import (  # noqa: F401  no_process_left is an autouse fixture
    PATIENCE_S,
    no_process_left,
    wait_until,
)

COUNT = 3


def trainings(root: Path, on_term: str) -> list[SupervisedProcess]:
    """Some that do something on SIGTERM; they have set that up when this returns."""
    script = f'trap "{on_term}" TERM; touch ready; while :; do sleep 0.1; done'
    started = []
    for number in range(1, COUNT + 1):
        trial = TrialLayout(root / f"trial_{number:04d}")
        trial.folder.mkdir()
        started.append(start_supervised(["sh", "-c", script], directory=trial.folder))
        wait_until((trial.folder / "ready").exists, "the trap")
    return started


def test_all_get_sigterm_before_anybody_is_waited_for(tmp_path):
    """Each ends only when all have been told."""
    told = " && ".join(f"[ -e ../trial_{number:04d}/told ]" for number in range(1, COUNT + 1))
    started = trainings(tmp_path, f"touch told; until {told}; do sleep 0.05; done; exit 0")
    stop_together(started, term_timeout_s=PATIENCE_S, kill_timeout_s=PATIENCE_S)
    assert [training.exit_record().exit_status for training in started] == [0] * COUNT
    stop_together(started, term_timeout_s=PATIENCE_S, kill_timeout_s=PATIENCE_S)  # harmless when repeated
    stop_together([], term_timeout_s=PATIENCE_S, kill_timeout_s=PATIENCE_S)


def test_a_signal_meanwhile_is_not_kept_waiting_and_the_next_stop_kills(tmp_path):
    started = trainings(tmp_path, "touch told")  # deaf

    def interrupt(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGUSR1, interrupt)
    killer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGUSR1])
    begin = time.monotonic()
    try:
        killer.start()
        with pytest.raises(InterruptedError):
            stop_together(started, term_timeout_s=PATIENCE_S, kill_timeout_s=PATIENCE_S)
    finally:
        signal.signal(signal.SIGUSR1, before)
        stop_together(started, term_timeout_s=0.0, kill_timeout_s=PATIENCE_S)
    assert not any(training.is_alive for training in started)
    assert time.monotonic() - begin < PATIENCE_S

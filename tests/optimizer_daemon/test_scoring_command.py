"""The evaluator's command as the optimizer runs it: one at a time, tried again with growing pauses, never for ever."""

from __future__ import annotations

import sys
import time

import pytest

from optimizer_daemon.scoring_command import FIRST_PAUSE_S, MOST_FAILURES, ScoringCommand
from shared.errors import ResourceError
from shared.layout import StudyLayout


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def trial(tmp_path):
    trial = StudyLayout(tmp_path).trial(3)
    trial.folder.mkdir()
    return trial


def finish(scoring: ScoringCommand) -> None:
    while scoring.scored_now is not None:
        scoring.poll()
        time.sleep(0.02)


def test_the_command_gets_the_trial_and_the_device_and_scores_one_at_a_time(trial):
    code = "import sys, pathlib; pathlib.Path(sys.argv[3], 'seen').write_text(' '.join(sys.argv[1:]))"
    scoring = ScoringCommand((sys.executable, "-S", "-c", code), 1, Clock())
    scoring.start(trial, "cpu")
    assert (scoring.scored_now, scoring.ready) == (trial, False)
    finish(scoring)
    assert scoring.ready
    assert (trial.folder / "seen").read_text() == f"evaluate --trial {trial.folder} --device cpu"


def test_a_failure_is_tried_again_after_growing_pauses_and_the_last_one_quotes_what_was_said(trial):
    clock = Clock()
    scoring = ScoringCommand((sys.executable, "-S", "-c", "import sys; sys.exit('no such model')"), 1, clock)
    for failure in range(MOST_FAILURES - 1):
        scoring.start(trial, "cpu")
        finish(scoring)
        pause = FIRST_PAUSE_S * 2**failure
        clock.now += pause - 0.1
        assert not scoring.ready
        clock.now += 0.2
        assert scoring.ready
    scoring.start(trial, "cpu")
    with pytest.raises(ResourceError, match=r"failed 3 times in a row \(exit status 1\).*it said: no such model"):
        finish(scoring)


def test_a_success_forgets_the_failures_before_it(trial):
    flag = trial.folder / "model"
    code = f"import sys, pathlib; sys.exit(not pathlib.Path({str(flag)!r}).exists())"
    clock = Clock()
    scoring = ScoringCommand((sys.executable, "-S", "-c", code), 1, clock)
    for there in (False, False, True, False, False):
        flag.touch() if there else flag.unlink(missing_ok=True)
        scoring.start(trial, "cpu")
        finish(scoring)
        clock.now += 1000


def test_stop_ends_the_command_and_leaves_nothing_running(trial):
    scoring = ScoringCommand((sys.executable, "-S", "-c", "import time; time.sleep(600)"), 1, Clock())
    scoring.start(trial, "cpu")
    begin = time.monotonic()
    scoring.stop()
    assert time.monotonic() - begin < 60
    assert scoring.scored_now is None

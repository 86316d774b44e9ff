"""What to do next with a trial: a total function over a frozen view of it. Pure: no files, no clock, no processes.

drawn -> training -> trained (its score is pending) -> complete | failed
training -> interrupted -> training      by an orderly stop and the next start
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from shared.schemas import TERMINAL_STATES, TrainerExit, TrialStateName

MOST_ATTEMPTS = 4  # the first one and three redos from zero
MOST_RESUMES = 20  # of one attempt; a training that is killed more often than that is not going to end

Ending = Literal["finished", "stopped", "failed", "unknown"]
"""How a training ended: by itself and well, by somebody's signal, by itself and badly; unknown when even its supervisor
was killed, or when it never started."""

Scoring = Literal["pending", "scored", "unscorable"]


class Action(Enum):
    """What the runner can do with a trial."""

    TRAIN = "start the training, from zero"
    RESUME = "start the training again, from its saved state"
    REDO = "set the remains aside and start the training again, from zero"
    WATCH = "let it train"
    STOP_HUNG = "end a training that no longer moves"
    MARK_TRAINED = "record that the training is done"
    EVALUATE = "score its checkpoints"
    WAIT = "somebody scores its checkpoints"
    COMPLETE = "record its score"
    FAIL = "record that it failed"
    TELL = "tell the study"
    NOTHING = "it is over"


@dataclass(frozen=True)
class TrialView:
    """A trial as it stands.

    Args:
        state: as in trial_state.json.
        told: the study knows its end.
        attempt: which attempt this is, counted from 1.
        resumes: how often this attempt went on from its saved state.
        trainer_alive: something of the trainer lives.
        ending: how the training ended; of no meaning while it lives.
        resumable: there is a saved state to go on from.
        final_complete: the final checkpoint is there and whole.
        last_progress: when the training last moved, in seconds of the monotonic clock.
        patience_s: how long it may stand still.
        scoring: whether the final checkpoint has its score, and every other complete one its record.
        evaluator_busy: somebody scores, or will without us: a living manager, our own command.
    """

    state: TrialStateName
    told: bool = False
    attempt: int = 1
    resumes: int = 0
    trainer_alive: bool = False
    ending: Ending = "unknown"
    resumable: bool = False
    final_complete: bool = False
    last_progress: float = 0.0
    patience_s: float = 600.0
    scoring: Scoring = "pending"
    evaluator_busy: bool = False


def next_action(view: TrialView, now: float) -> Action:
    """Return what to do next.

    Args:
        view: the trial.
        now: seconds of the monotonic clock.
    """
    if view.state in TERMINAL_STATES:
        return Action.NOTHING if view.told else Action.TELL
    if view.state == "trained":
        return _next_of_trained(view)
    if view.trainer_alive:
        return Action.STOP_HUNG if now - view.last_progress > view.patience_s else Action.WATCH
    if view.state == "drawn":
        return Action.TRAIN
    if view.ending == "failed":
        return Action.FAIL
    if view.ending == "finished":
        return Action.MARK_TRAINED if view.final_complete else Action.FAIL
    if view.ending == "unknown" and view.final_complete:
        return Action.MARK_TRAINED  # the final checkpoint is the last thing a training writes
    if view.resumable and view.resumes < MOST_RESUMES:
        return Action.RESUME
    # Our own stop is not the training's fault, even when it came before anything was saved.
    return Action.REDO if view.state == "interrupted" or view.attempt < MOST_ATTEMPTS else Action.FAIL


def _next_of_trained(view: TrialView) -> Action:
    if view.scoring == "scored":
        return Action.COMPLETE
    if view.scoring == "unscorable":
        return Action.FAIL
    return Action.WAIT if view.evaluator_busy else Action.EVALUATE


def ending_of(record: TrainerExit | None) -> Ending:
    """Judge a trainer's exit record; a shell or wrapper reports a signal as 128 + its number."""
    if record is None:
        return "unknown"
    if record.exit_status == 0:
        return "finished"
    signal_number = record.signal if record.signal is not None else (record.exit_status or 0) - 128
    # SIGINT, SIGKILL, SIGTERM, SIGHUP come from outside; SIGSEGV, SIGBUS and SIGABRT are the trainer's own doing.
    return "stopped" if signal_number in (1, 2, 9, 15) else "failed"

"""What to do next with a trial: a total function over a frozen view of it. Pure: no files, no clock, no processes.

drawn -> training -> trained (its score is pending) -> complete | failed
training -> pruned                       its scores say that it is losing; told when its checkpoints are recorded
training -> interrupted -> training      by an orderly stop and the next start; once when memory ran short beside others
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from shared.schemas import TERMINAL_STATES, TrainerExit, TrialStateName

MOST_ATTEMPTS = 4  # the first one and three redos from zero
MOST_RESUMES = 20  # of one attempt; a training that is killed more often than that is not going to end
MOST_NOT_FINITE = 20  # steps in a row whose loss is NaN or infinite; sd-scripts' mean never recovers from a single one

Ending = Literal["finished", "stopped", "squeezed", "failed", "unknown"]
"""How a training ended: by itself and well; by somebody's signal; out of memory that others used too; by itself and
badly; unknown when even its supervisor was killed, or when it never started."""

Scoring = Literal["pending", "scored", "unscorable"]


class Action(Enum):
    """What the runner can do with a trial."""

    TRAIN = "start the training, from zero"
    RESUME = "start the training again, from its saved state"
    REDO = "set the remains aside and start the training again, from zero"
    WATCH = "let it train"
    STOP_HUNG = "end a training that no longer moves"
    STOP_DIVERGED = "end a training whose loss is no number"
    PRUNE = "end a training that is losing"
    EXCUSE = "record that memory ran short beside others, and let it begin again with the GPU to itself"
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
        not_finite_steps: how many steps in a row had a loss that is no number.
        losing: the pruner objects to its scores so far.
        excused: memory ran short beside others once before.
        all_recorded: every complete checkpoint has its record.
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
    not_finite_steps: int = 0
    losing: bool = False
    excused: bool = False
    all_recorded: bool = True
    scoring: Scoring = "pending"
    evaluator_busy: bool = False


def next_action(view: TrialView, now: float) -> Action:
    """Return what to do next.

    Args:
        view: the trial.
        now: seconds of the monotonic clock.
    """
    if view.state in TERMINAL_STATES:
        if view.told:
            return Action.NOTHING
        if view.state == "pruned" and not view.all_recorded:
            return Action.WAIT if view.evaluator_busy else Action.EVALUATE
        return Action.TELL
    if view.state == "trained":
        return _next_of_trained(view)
    if view.trainer_alive:
        if view.not_finite_steps >= MOST_NOT_FINITE:
            return Action.STOP_DIVERGED
        if view.losing and view.state == "training":
            return Action.PRUNE
        return Action.STOP_HUNG if now - view.last_progress > view.patience_s else Action.WATCH
    return Action.TRAIN if view.state == "drawn" else _next_of_ended(view)


def _next_of_ended(view: TrialView) -> Action:
    """A training that failed by itself would fail again; one that others ended goes on."""
    if view.final_complete and view.ending in ("finished", "stopped", "unknown"):
        return Action.MARK_TRAINED  # the final checkpoint is the last thing a training writes
    # Our own stop is never the training's fault, however it took it and even when nothing was saved yet.
    ours = view.state == "interrupted"
    if not ours and view.ending in ("finished", "failed"):
        return Action.FAIL
    if not ours and view.ending == "squeezed":
        return Action.FAIL if view.excused else Action.EXCUSE
    if view.resumable and view.resumes < MOST_RESUMES:
        return Action.RESUME
    return Action.REDO if ours or view.attempt < MOST_ATTEMPTS else Action.FAIL


def _next_of_trained(view: TrialView) -> Action:
    if view.scoring == "scored":
        return Action.COMPLETE
    if view.scoring == "unscorable":
        return Action.FAIL
    return Action.WAIT if view.evaluator_busy else Action.EVALUATE


def ending_of(record: TrainerExit | None, *, gpu_memory_ran_out: bool = False) -> Ending:
    """Judge a trainer's exit record.

    Args:
        record: None where the supervisor left none.
        gpu_memory_ran_out: its last lines say so.
    """
    if record is None:
        return "unknown"
    if record.exit_status == 0:
        return "finished"
    number = signal_of(record)
    if number == signal.SIGKILL and record.oom_kills:
        return "squeezed"
    # These come from outside; SIGSEGV, SIGBUS and SIGABRT are the trainer's own doing.
    if number in (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        return "stopped"
    return "squeezed" if gpu_memory_ran_out and record.evaluators_on else "failed"


def signal_of(record: TrainerExit) -> int | None:
    """Return the signal that ended a training; a shell or wrapper reports it as 128 + its number."""
    if record.signal is not None or record.exit_status is None or record.exit_status <= 128:
        return record.signal
    return record.exit_status - 128

"""The decision table: what happens next with a trial, for every situation it can be found in."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import datetime

import pytest

from optimizer_daemon.lifecycle import (
    MOST_ATTEMPTS,
    MOST_NOT_FINITE,
    MOST_RESUMES,
    Action,
    TrialView,
    ending_of,
    next_action,
)
from shared.schemas import TERMINAL_STATES, TrainerExit

NOW = 1000.0
TRAINING = TrialView("training", last_progress=NOW)
DEAD = replace(TRAINING, resumable=True)
TRAINED = TrialView("trained", final_complete=True)

TABLE = [
    ("a drawn trial is trained", TrialView("drawn"), Action.TRAIN),
    ("a living trainer is watched", replace(TRAINING, trainer_alive=True), Action.WATCH),
    ("a trainer found alive after a crash before the state was written is watched",
     TrialView("drawn", trainer_alive=True, last_progress=NOW), Action.WATCH),
    ("a trainer that stands still too long is stopped",
     replace(TRAINING, trainer_alive=True, last_progress=NOW - 601), Action.STOP_HUNG),
    ("a trainer with slow steps gets more patience",
     replace(TRAINING, trainer_alive=True, last_progress=NOW - 601, patience_s=900), Action.WATCH),
    ("one whose loss is no number for 20 steps is stopped",
     replace(TRAINING, trainer_alive=True, not_finite_steps=MOST_NOT_FINITE), Action.STOP_DIVERGED),
    ("one step less may be an overflow that fp16 leaves out",
     replace(TRAINING, trainer_alive=True, not_finite_steps=MOST_NOT_FINITE - 1), Action.WATCH),
    ("one that is losing is ended", replace(TRAINING, trainer_alive=True, losing=True), Action.PRUNE),
    ("a training that ended is trained, losing or not",
     replace(TRAINING, ending="finished", final_complete=True, losing=True), Action.MARK_TRAINED),
    ("a finished training with its final checkpoint is trained",
     replace(TRAINING, ending="finished", final_complete=True), Action.MARK_TRAINED),
    ("a finished training without one has failed", replace(TRAINING, ending="finished"), Action.FAIL),
    ("a training that failed by itself has failed, final checkpoint or not",
     replace(TRAINING, ending="failed", final_complete=True), Action.FAIL),
    ("one that failed by itself would fail again from its saved state", replace(DEAD, ending="failed"), Action.FAIL),
    ("memory that others used too is excused", replace(DEAD, ending="squeezed"), Action.EXCUSE),
    ("but only once", replace(DEAD, ending="squeezed", excused=True), Action.FAIL),
    ("an excused training goes on from its state",
     replace(DEAD, state="interrupted", ending="squeezed", excused=True), Action.RESUME),
    ("an excused training without a state is redone, and no attempt is counted",
     TrialView("interrupted", ending="squeezed", excused=True, attempt=MOST_ATTEMPTS), Action.REDO),
    ("a training somebody killed goes on from its state", replace(DEAD, ending="stopped"), Action.RESUME),
    ("so does one whose supervisor was killed, too", DEAD, Action.RESUME),
    ("without a state it is redone", replace(DEAD, resumable=False), Action.REDO),
    ("a supervisor killed after the last checkpoint changes nothing", replace(DEAD, final_complete=True),
     Action.MARK_TRAINED),
    ("nor does a trainer killed after it", replace(DEAD, ending="stopped", final_complete=True), Action.MARK_TRAINED),
    ("a training that never started is redone", TrialView("training"), Action.REDO),
    ("after three redos it has failed", replace(DEAD, resumable=False, attempt=MOST_ATTEMPTS), Action.FAIL),
    ("one that is killed again and again is redone at last", replace(DEAD, resumes=MOST_RESUMES), Action.REDO),
    ("an interrupted trial goes on from its state", replace(DEAD, state="interrupted", ending="stopped"),
     Action.RESUME),
    ("an interrupted trial without a state is redone, however often",
     TrialView("interrupted", ending="stopped", attempt=MOST_ATTEMPTS), Action.REDO),
    ("an interrupted trial whose trainer took our stop for a failure goes on",
     replace(DEAD, state="interrupted", ending="failed"), Action.RESUME),
    ("or for its end", replace(DEAD, state="interrupted", ending="finished"), Action.RESUME),
    ("a training that ended well while it was being stopped is trained",
     TrialView("interrupted", ending="finished", final_complete=True), Action.MARK_TRAINED),
    ("a trained trial is scored by ourselves when nobody else does", TRAINED, Action.EVALUATE),
    ("it waits for a living evaluator", replace(TRAINED, evaluator_busy=True), Action.WAIT),
    ("its score completes it", replace(TRAINED, scoring="scored", evaluator_busy=True), Action.COMPLETE),
    ("a final checkpoint that cannot be scored fails it", replace(TRAINED, scoring="unscorable"), Action.FAIL),
    ("a complete trial that the study has not heard of is told", TrialView("complete"), Action.TELL),
    ("a failed one, too", TrialView("failed"), Action.TELL),
    ("a pruned one, too", TrialView("pruned"), Action.TELL),
    ("but first its last checkpoints are scored", TrialView("pruned", all_recorded=False), Action.EVALUATE),
    ("by whoever lives", TrialView("pruned", all_recorded=False, evaluator_busy=True), Action.WAIT),
    ("a told trial is over", TrialView("complete", told=True), Action.NOTHING),
]  # fmt: skip


@pytest.mark.parametrize(("view", "action"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_the_decision_table(view, action):
    assert next_action(view, NOW) is action


def test_every_action_is_in_the_table():
    assert {row[2] for row in TABLE} == set(Action)


def test_every_view_has_an_action_and_a_living_trainer_is_never_joined_by_another():
    states = ("drawn", "training", "trained", "complete", "pruned", "failed", "interrupted")
    flags = itertools.product(
        states, (False, True), (1, MOST_ATTEMPTS), (0, MOST_RESUMES), (False, True),
        ("finished", "stopped", "squeezed", "failed", "unknown"), (False, True), (False, True), (0.0, NOW),
        (0, MOST_NOT_FINITE), (False, True), (False, True), (False, True),
        ("pending", "scored", "unscorable"), (False, True),
    )  # fmt: skip
    names = ("state", "told", "attempt", "resumes", "trainer_alive", "ending", "resumable", "final_complete",
             "last_progress", "not_finite_steps", "losing", "all_recorded", "excused", "scoring",
             "evaluator_busy")  # fmt: skip
    for values in flags:
        view = TrialView(**dict(zip(names, values, strict=True)))
        action = next_action(view, NOW)
        assert isinstance(action, Action)
        if view.trainer_alive:
            assert action not in (Action.TRAIN, Action.RESUME, Action.REDO)
        if view.state in TERMINAL_STATES:
            waits = view.state == "pruned" and not view.all_recorded
            assert action in (Action.TELL, Action.NOTHING, *((Action.EVALUATE, Action.WAIT) if waits else ()))
        if view.excused or view.state == "interrupted":
            assert action is not Action.EXCUSE


def record(exit_status=None, signal=None, **known) -> TrainerExit:
    time = datetime.now().astimezone()
    known |= {"exit_status": exit_status, "signal": signal}
    return TrainerExit(command=("train",), pid=1, started=time, ended=time, seconds=1.0, **known)


@pytest.mark.parametrize(
    ("exit_status", "signal", "ending"),
    [
        pytest.param(137, None, "stopped", id="SIGKILL of a wrapped command"),
        pytest.param(0, None, "finished", id="exit 0"),
        pytest.param(1, None, "failed", id="exit 1"),
        pytest.param(143, None, "stopped", id="a trainer that saved its state after SIGTERM"),
        pytest.param(None, 15, "stopped", id="SIGTERM"),
        pytest.param(None, 9, "stopped", id="SIGKILL, as the kernel short of memory sends it"),
        pytest.param(130, None, "stopped", id="a wrapper interrupted by Ctrl-C"),
        pytest.param(None, 11, "failed", id="SIGSEGV"),
        pytest.param(134, None, "failed", id="SIGABRT of a wrapped command"),
        pytest.param(127, None, "failed", id="command not found"),
    ],
)
def test_how_a_training_ended(exit_status, signal, ending):
    assert ending_of(record(exit_status, signal)) == ending


@pytest.mark.parametrize(
    ("known", "gpu_memory_ran_out", "ending"),
    [
        pytest.param({"signal": 9, "oom_kills": 1}, False, "squeezed", id="SIGKILL while the kernel killed for memory"),
        pytest.param({"exit_status": 137, "oom_kills": 2}, False, "squeezed", id="the same of a wrapped command"),
        pytest.param({"signal": 15, "oom_kills": 1}, False, "stopped", id="SIGTERM while the kernel killed another"),
        pytest.param(
            {"exit_status": 1, "evaluators_on": ("GPU-1",)}, True, "squeezed", id="GPU memory an evaluator had"
        ),
        pytest.param({"exit_status": 1, "evaluators_on": ("GPU-1",)}, False, "failed", id="another failure beside one"),
        pytest.param({"exit_status": 1}, True, "failed", id="GPU memory nobody else had"),
        pytest.param({"exit_status": 0, "evaluators_on": ("GPU-1",)}, True, "finished", id="a lack it got over"),
    ],
)
def test_memory_that_others_used_too(known, gpu_memory_ran_out, ending):
    assert ending_of(record(**known), gpu_memory_ran_out=gpu_memory_ran_out) == ending


def test_without_a_record_nobody_knows():
    assert ending_of(None) == "unknown"

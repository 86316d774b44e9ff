"""What there is to do, as a decision table."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from evaluator_daemon.sweep import (
    TrialView,
    WeightFile,
    back_off_s,
    is_over,
    is_truncated,
    open_files,
    quarantine_code,
    wanted_trials,
)
from shared.schemas import Attempt, CheckpointRecord, Quarantine

PLAN, OTHER_PLAN, SHA = "a" * 64, "b" * 64, "c" * 64
TIME = datetime(2025, 11, 15, 10, 23, 45, tzinfo=UTC)


def file(name: str = "lora_trial_1-000002", epoch: int | None = 2, **changes) -> WeightFile:
    fields = {"is_final": False, "size": 100, "modified_ns": 5, "age_s": 0.0}
    return WeightFile(name, epoch, **{**fields, **changes})


FINAL = file("lora_trial_1", 6, is_final=True)


def record(name: str = "lora_trial_1-000002", status: str = "recorded", **changes) -> CheckpointRecord:
    fields = {
        "checkpoint": name,
        "checkpoint_sha256": SHA,
        "plan_hash": PLAN,
        "epoch": 2,
        "size": 100,
        "modified_ns": 5,
        "status": status,
        "attempts": (),
        "quarantine": Quarantine(code="x", reason="x", since=TIME) if status == "quarantined" else None,
    }
    return CheckpointRecord(**{**fields, **changes})


def attempts(*outcomes: str) -> tuple[Attempt, ...]:
    return tuple(
        Attempt(started=TIME, ended=None if o == "running" else TIME, outcome=o, reason="why") for o in outcomes
    )


def trial(name: str = "trial_0001", state: str | None = "training", files=(), records=(), **changes) -> TrialView:
    fields = {"owner_lives": True, "trainer_lives": True, "idle_s": 0.0, "plan_hash": PLAN}
    return TrialView(name=name, state=state, files=tuple(files), records=tuple(records), **{**fields, **changes})


@pytest.mark.parametrize(
    ("records", "is_open"),
    [
        pytest.param([], True, id="never seen"),
        pytest.param([record()], False, id="recorded"),
        pytest.param([record(status="quarantined")], False, id="quarantined"),
        pytest.param([record(status="truncated", checkpoint_sha256=None)], False, id="truncated"),
        pytest.param([record(status="waiting")], True, id="waiting"),
        pytest.param([record(status="evaluating", attempts=attempts("running"))], True, id="left in the middle"),
        pytest.param([record(size=99)], True, id="another size than recorded"),
        pytest.param([record(modified_ns=4)], True, id="touched since"),
        pytest.param([record(status="truncated", modified_ns=4)], True, id="truncated, then written again"),
        pytest.param([record(status="quarantined", size=99)], True, id="quarantined, then replaced"),
        pytest.param([record(plan_hash=OTHER_PLAN)], True, id="recorded under another plan"),
        pytest.param([record(name="lora_trial_1-000004")], True, id="another name"),
    ],
)
def test_a_file_is_open_until_exactly_these_bytes_have_a_verdict(records, is_open):
    assert [f.name for f in open_files(trial(files=[file()], records=records))] == ["lora_trial_1-000002"] * is_open


THEN_S = TIME.timestamp()


@pytest.mark.parametrize(
    ("seen_s", "changed_s", "is_open"),
    [
        pytest.param(THEN_S + 3600, THEN_S + 3600, False, id="nothing has changed, and our clock is behind the file's"),
        pytest.param(THEN_S - 3600, THEN_S - 1800, True, id="its mode has, and our clock is ahead of the file's"),
        pytest.param(THEN_S, THEN_S - 1, True, id="the file's clock was set back, and its mode has changed"),
        pytest.param(None, THEN_S - 1, False, id="an old record: nothing has changed since the verdict"),
        pytest.param(None, THEN_S + 1, True, id="an old record: its mode, its owner or its name has"),
    ],
)
@pytest.mark.parametrize("code", ["unreadable", "not_finite"])
def test_a_file_that_could_not_be_read_is_open_again_after_a_chmod(code, seen_s, changed_s, is_open):
    verdict = Quarantine(code=code, reason="x", since=TIME)
    known = record(status="quarantined", quarantine=verdict, changed_s=seen_s)
    view = trial(files=[file(changed_s=changed_s)], records=[known])
    assert bool(open_files(view)) is (is_open and code == "unreadable")


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        pytest.param("trained", ["lora_trial_1", "a-000002", "a-000004", "odd"], id="the optimizer waits: final first"),
        pytest.param("training", ["a-000002", "a-000004", "lora_trial_1", "odd"], id="training: by epoch"),
        pytest.param(None, ["a-000002", "a-000004", "lora_trial_1", "odd"], id="no state files: by epoch"),
    ],
)
def test_the_order_inside_a_trial(state, expected):
    files = [file("odd", None), FINAL, file("a-000004", 4), file("a-000002", 2)]
    assert [f.name for f in open_files(trial(state=state, files=files))] == expected


def test_what_was_interrupted_goes_to_the_back():
    records = [record("a-000002", "waiting", attempts=attempts("interruption"))]
    files = [file("a-000002", 2), file("a-000004", 4), file("odd", None)]
    assert [f.name for f in open_files(trial(files=files, records=records))] == ["a-000004", "odd", "a-000002"]


@pytest.mark.parametrize(
    ("view", "over"),
    [
        pytest.param(trial(state="complete"), True, id="complete"),
        pytest.param(trial(state="pruned"), True, id="pruned"),
        pytest.param(trial(state="failed"), True, id="failed"),
        pytest.param(trial(state="training"), False, id="training under a living owner"),
        pytest.param(trial(state="trained", trainer_lives=False), False, id="trained, the optimizer lives"),
        pytest.param(trial(state="training", owner_lives=False, trainer_lives=False), True, id="everybody has gone"),
        pytest.param(trial(state="interrupted", owner_lives=False, trainer_lives=False), True, id="interrupted"),
        pytest.param(trial(state=None, idle_s=899, trainer_lives=False), False, id="no state, quiet for a while"),
        pytest.param(trial(state=None, idle_s=900, trainer_lives=False), True, id="no state, quiet for long"),
        pytest.param(trial(state=None, idle_s=9000), False, id="no state, quiet, but its trainer's lock is held"),
    ],
)
def test_when_a_trial_is_over(view, over):
    assert is_over(view, idle_timeout_s=900) is over


@pytest.mark.parametrize(
    ("age_s", "state", "trainer_lives", "truncated"),
    [
        (119, "training", False, False),
        (120, "training", False, True),
        (1e6, "training", True, False),
        (599, None, False, False),
        (600, None, False, True),
    ],
)
def test_an_incomplete_file_is_given_up_only_when_nobody_writes_it(age_s, state, trainer_lives, truncated):
    assert is_truncated(file(age_s=age_s), trial(state=state, trainer_lives=trainer_lives)) is truncated


def test_trials_are_wanted_in_the_order_of_who_waits():
    work = {"files": [file()]}
    trials = [
        trial("pruned", "pruned", **work),
        trial("complete", "complete", **work),
        trial("warming up", "training"),
        trial("training", "training", **work),
        trial("trained", "trained", **work),
        trial("done", "complete", [file()], [record()]),
    ]
    names = [t.name for t in wanted_trials(trials, 900, once=False)]
    assert names == ["trained", "training", "complete", "pruned", "warming up"]
    assert [t.name for t in wanted_trials(trials, 900, once=True)] == names[:4]


@pytest.mark.parametrize(
    ("outcomes", "others", "code"),
    [
        (("strike", "strike"), True, None),
        (("strike", "interruption", "strike", "strike"), False, "three_strikes"),
        (("interruption",) * 4, True, None),
        (("interruption",) * 5, True, "suspect"),
        (("interruption",) * 9, False, None),
        (("strike", *("interruption",) * 5), True, "suspect"),
        ((*("interruption",) * 5, "strike"), True, None),
    ],
)
def test_three_strikes_or_five_interruptions_beside_successes_end_the_attempts(outcomes, others, code):
    waiting = record(status="waiting", attempts=attempts(*outcomes))
    assert quarantine_code(waiting, others_succeeded=others) == code


def test_back_off_doubles_up_to_five_minutes():
    assert [back_off_s(n) for n in (0, 1, 2, 8, 9, 99)] == [0, 2, 4, 256, 300, 300]

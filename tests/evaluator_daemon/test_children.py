"""What the manager makes of its evaluators' records."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from evaluator_daemon.children import Evaluators, RunningEvaluator
from evaluator_daemon.restarts import BREAKER_AFTER
from evaluator_daemon.sweep import TrialView
from shared.layout import StudyLayout
from shared.schemas import CheckpointRecord, Quarantine

TIME = datetime(2025, 11, 15, 10, 23, 45, tzinfo=UTC)


def view(*statuses: str) -> TrialView:
    verdict = Quarantine(code="three_strikes", reason="3 attempts", since=TIME)
    records = tuple(
        CheckpointRecord.model_validate(
            {
                "checkpoint": str(number),
                "checkpoint_sha256": "0" * 64,
                "plan_hash": "0" * 64,
                "epoch": None,
                "size": 1,
                "modified_ns": 1,
                "status": status,
                "quarantine": verdict if status == "quarantined" else None,
            }
        )
        for number, status in enumerate(statuses)
    )
    return TrialView("trial_0001", None, True, True, 0.0, "0" * 64, (), records)


def test_a_result_closes_the_breaker_and_a_quarantine_does_not(tmp_path):
    evaluators = Evaluators(StudyLayout(tmp_path), lambda: None, once=False)
    process: Any = None
    evaluators._running["trial_0001"] = RunningEvaluator(process, process, TIME)
    for number in range(BREAKER_AFTER):
        evaluators.restarts.ended(f"other {number}", 4, 0.0, asked_to=False, settled=False, chance=1.0)
    evaluators.note(view("recorded", "waiting"))
    evaluators.note(view("recorded", "quarantined"))
    assert evaluators.restarts.is_broken
    assert not evaluators._running["trial_0001"].has_recorded
    evaluators.note(view("recorded", "quarantined", "recorded"))
    assert not evaluators.restarts.is_broken
    assert evaluators._running["trial_0001"].has_recorded

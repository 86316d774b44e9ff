"""An evaluator's memory and its results on disk: durable before anything depends on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime

from evaluator_daemon.folder import has_results, read_or_none
from evaluator_daemon.sweep import SETTLED, quarantine_code
from shared.files import read_or_set_aside, sweep_temp_files, write_model
from shared.layout import EvaluationsLayout
from shared.logs import log_change
from shared.schemas import (
    Attempt,
    BestCheckpoint,
    CheckpointRecord,
    EvaluationPlan,
    EvaluationState,
    EvaluationSummary,
    Metrics,
    Quarantine,
    SummaryEntry,
)
from shared.schemas.evaluator import CheckpointStatus, Outcome
from shared.scores.comparing import best_of, score_values

_log = logging.getLogger(__name__)


class Memory:
    """The evaluation_state.json of one folder of evaluations; one record per checkpoint name.

    A damaged state is set aside and rebuilt from the checkpoints' metrics.json files.

    Args:
        plan: the plan of that hash; without it no best checkpoint is named.
    """

    def __init__(
        self, name: str, evaluations: EvaluationsLayout, plan_hash: str, plan: EvaluationPlan | None = None
    ) -> None:
        self.name = name
        self.evaluations = evaluations
        self.plan_hash = plan_hash
        self.best: BestCheckpoint | None = None
        self._plan = plan
        self._score_values: dict[tuple[str, str | None], dict[str, tuple[float, ...]]] = {}
        for folder in (evaluations.folder, *(path for path in evaluations.folder.iterdir() if path.is_dir())):
            sweep_temp_files(folder)
        reading = read_or_set_aside(evaluations.state, EvaluationState, now())
        if reading.set_aside:
            log_change(_log, "state set aside", level=logging.WARNING, file=reading.set_aside.name, why=reading.reason)
        kept = reading.content.checkpoints if reading.content else self._rebuilt()
        self._records = {record.checkpoint: record for record in kept}

    @property
    def records(self) -> tuple[CheckpointRecord, ...]:
        return tuple(self._records.values())

    def record_of(self, name: str, sha256: str | None) -> CheckpointRecord | None:
        """Return what is known about exactly this content under this name and the plan."""
        record = self._records.get(name)
        same = record and (record.checkpoint_sha256, record.plan_hash) == (sha256, self.plan_hash)
        return record if same else None

    def twin_of(self, name: str, sha256: str) -> CheckpointRecord | None:
        """Return a recorded checkpoint of equal content under another name."""
        identity = ("recorded", None, sha256, self.plan_hash)
        for record in self.records:
            found = (record.status, record.same_as, record.checkpoint_sha256, record.plan_hash)
            if found == identity and record.checkpoint != name:
                return record
        return None

    def put(self, record: CheckpointRecord) -> None:
        """Write a record, in place of what was known under that name.

        The summary goes first: whoever is killed between the two finds the work open, and writes both.
        """
        before = self._records.get(record.checkpoint)
        self._records[record.checkpoint] = record
        if before is not None and before.checkpoint_sha256 is not None:
            self._say_superseded(before, record)
        if record.status in SETTLED or (before is not None and before.status == "recorded"):
            self.write_summary()
        state = EvaluationState(trial_name=self.name, updated=now(), checkpoints=self.records)
        write_model(self.evaluations.state, state)

    def end_attempt(
        self, record: CheckpointRecord, outcome: Outcome, reason: str | None = None, *, code: str | None = None
    ) -> CheckpointRecord:
        """Close the running attempt; the checkpoint is quarantined when it has used up its attempts.

        Args:
            code: quarantine it at once, for this.
        """
        *earlier, running = record.attempts
        ended = Attempt.model_validate({**dict(running), "ended": now(), "outcome": outcome, "reason": reason})
        closed = changed(record, status="waiting", attempts=(*earlier, ended))
        if outcome == "recorded":
            closed = changed(closed, status="recorded")
        elif code is not None:
            closed = given_up(closed, code, str(reason))
        else:
            others = any(r.status == "recorded" for r in self.records if r.checkpoint != record.checkpoint)
            if code := quarantine_code(closed, others_succeeded=others):
                closed = given_up(closed, code, f"{len(closed.attempts)} attempts, the last: {reason}")
        self.put(closed)
        return closed

    def withdraw_attempt(self, record: CheckpointRecord) -> None:
        """Take the running attempt back: what kept it from ending says nothing about the checkpoint."""
        self.put(changed(record, status="waiting", attempts=record.attempts[:-1]))

    def close_unfinished(self, by_itself: str | None) -> list[CheckpointRecord]:
        """Close attempts that an earlier process left running.

        Args:
            by_itself: how that process ended by its own fault; None when it was stopped or nobody knows.
        """
        closed = []
        for record in (record for record in self.records if record.status == "evaluating"):
            if self.has_results(record):  # metrics.json is written last: only the record was missing
                closed.append(self.end_attempt(record, "recorded"))
            elif by_itself:
                closed.append(self.end_attempt(record, "strike", by_itself))
            else:
                closed.append(self.end_attempt(record, "interruption", "the evaluator was stopped before it ended"))
        return closed

    def write_summary(self) -> None:
        """Write evaluation_summary.json anew from the recorded checkpoints' metrics.json files."""
        found = []
        for record in (record for record in self.records if record.status == "recorded"):
            metrics = read_or_none(self.evaluations.checkpoint(record.checkpoint).metrics, Metrics)
            if metrics is not None and _fits(metrics, record):
                found.append(metrics)
        found.sort(key=lambda metrics: (metrics.epoch is None, metrics.epoch or 0, metrics.checkpoint))
        summary = EvaluationSummary(
            trial_name=self.name,
            total_checkpoints_evaluated=len(found),
            checkpoints={metrics.checkpoint: _summary_entry(metrics) for metrics in found},
            last_update=now(),
            best=self._find_best(found),
        )
        write_model(self.evaluations.summary, summary)

    def _find_best(self, found: Sequence[Metrics]) -> BestCheckpoint | None:
        """The best of those that were evaluated with the plan; what a score is made of is computed once for each."""
        if self._plan is None:
            return None
        comparable = {metrics.checkpoint: metrics for metrics in found if metrics.plan_hash == self.plan_hash}
        tables = {}
        for name, metrics in comparable.items():
            key = (name, metrics.checkpoint_sha256)
            if key not in self._score_values:
                self._score_values[key] = score_values(metrics, self._plan)
            tables[name] = self._score_values[key]
        self.best = best_of(comparable, self._plan, tables)
        return self.best

    def has_results(self, record: CheckpointRecord) -> bool:
        """Whether what the record is about is on disk."""
        return has_results(record, self.evaluations)

    def _say_superseded(self, before: CheckpointRecord, record: CheckpointRecord) -> None:
        """A record that gives way to other content, or to another plan, leaves at least its figure in the log."""
        identities = [(r.checkpoint_sha256, r.plan_hash) for r in (before, record)]
        if identities[0] == identities[1]:
            return
        metrics = read_or_none(self.evaluations.checkpoint(before.checkpoint).metrics, Metrics)
        score = metrics.scores.get("combined_score") if metrics is not None and _fits(metrics, before) else None
        log_change(
            _log,
            "superseded",
            checkpoint=before.checkpoint,
            was=before.status,
            score=score and score.value,
            sha256=str(before.checkpoint_sha256)[:12],
            plan=before.plan_hash[:12],
        )

    def _rebuilt(self) -> list[CheckpointRecord]:
        """Records from the results alone; size and time 0 let each file be looked at, but not rendered, again."""
        records = []
        for path in sorted(self.evaluations.folder.glob("*/metrics.json")):
            metrics = read_or_none(path, Metrics)
            if metrics is not None and metrics.checkpoint == path.parent.name:
                records.append(CheckpointRecord.of_result(metrics))
        return records


def now() -> datetime:
    """The local time with its offset."""
    return datetime.now().astimezone()


def changed(record: CheckpointRecord, **updates: object) -> CheckpointRecord:
    """Return a record with some fields replaced, validated again."""
    return CheckpointRecord.model_validate({**dict(record), **updates})


def given_up(
    record: CheckpointRecord, code: str, reason: str, status: CheckpointStatus = "quarantined"
) -> CheckpointRecord:
    """Return the record with the reason why it is quarantined, or truncated."""
    return changed(record, status=status, quarantine=Quarantine(code=code, reason=reason, since=now()))


def _fits(metrics: Metrics, record: CheckpointRecord) -> bool:
    return (metrics.checkpoint_sha256, metrics.plan_hash) == (record.checkpoint_sha256, record.plan_hash)


def _summary_entry(metrics: Metrics) -> SummaryEntry:
    pixels = {
        f"{short}_{name}": getattr(metrics.metrics.get(name), field, None)
        for name in ("brightness", "contrast", "saturation")
        for short, field in (("mean", "value"), ("std", "std"))
    }
    return SummaryEntry.model_validate(
        {
            "epoch": metrics.epoch,
            "evaluation_time": metrics.evaluation_time,
            **pixels,
            "scores": {name: score.value for name, score in metrics.scores.items()},
            "metric_status": {name: metric.status for name, metric in metrics.metrics.items()},
            "feasible": metrics.gate.feasible,
            "checkpoint_sha256": metrics.checkpoint_sha256,
            "plan_hash": metrics.plan_hash,
            "seconds": metrics.seconds.total,
        }
    )

"""What the evaluator has recorded about a trial's checkpoints, read from the trial's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from optimizer_daemon.lifecycle import Scoring
from optimizer_daemon.search.objectives import measured_values
from shared.errors import (
    CheckpointError,
    IncompleteCheckpointError,
    RefusedCheckpointError,
    SchemaVersionError,
    UnreadableFileError,
)
from shared.files import read_model
from shared.layout import RenderLayout, StudyLayout, TrialLayout, checkpoint_epoch
from shared.safetensors_file import Stamp, read_checkpoint, read_header
from shared.schemas import CheckpointRecord, CurvePoint, EvaluationState, Metrics, Objective, Score, VersionedFile

F = TypeVar("F", bound=VersionedFile)

BASE_DIFFERENCE = "base_difference"


@dataclass(frozen=True)
class FinalScore:
    """The measurement that decides a trial.

    Args:
        value: the objective.
        infeasible_because: why it must not win; None when it passed its gate.
        metrics: everything measured.
        render: where it lies.
        values: each of several objectives by name.
    """

    value: float
    infeasible_because: str | None
    metrics: Metrics
    render: RenderLayout
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialScores:
    """How far the scoring of one trial is.

    Args:
        scoring: scored when the final checkpoint has its score and every other complete one its record.
        reason: why it is unscorable.
        curve: the scores without gaps, by epoch.
        seen: complete checkpoints in the folder.
        recorded: those with a record, good or bad.
        final: the deciding score; None until there is one.
    """

    scoring: Scoring = "pending"
    reason: str = ""
    curve: tuple[CurvePoint, ...] = ()
    seen: int = 0
    recorded: int = 0
    final: FinalScore | None = None


@dataclass(frozen=True)
class _Standing:
    """One complete checkpoint and its record."""

    name: str
    epoch: int | None
    record: CheckpointRecord | None

    @property
    def settled(self) -> bool:
        return self.record is not None and self.record.status in ("recorded", "quarantined", "truncated")


class ScoreReader:
    """Reads scores made under one plan.

    Args:
        plan_hash: identity of the study's plan; what was measured under another one does not count.
        objective: name of the score that is optimised.
        objectives: what is optimised, where that is more than this score.
    """

    def __init__(self, plan_hash: str, objective: str, objectives: Sequence[Objective] = ()) -> None:
        self._plan_hash = plan_hash
        self._objective = objective
        self._objectives = objectives
        self._hashes: dict[tuple[Path, Stamp], str | None] = {}

    def read(self, trial: TrialLayout, last_epoch: int | None) -> TrialScores:
        """Return the scores of a trial; `last_epoch` is its horizon, for a final file that does not tell."""
        standings = self._standings(trial, last_epoch)
        recorded = sum(standing.settled for standing in standings)
        usual = usual_parts(StudyLayout(trial.folder.parent), self._plan_hash, self._objective)
        curve = self._curve(trial, standings, usual)
        seen = TrialScores("pending", "", curve, len(standings), recorded)
        final = next((standing for standing in standings if standing.name == trial.output_name), None)
        if final is None or final.record is None or recorded < len(standings):
            return seen
        if final.record.status != "recorded":
            why = final.record.quarantine.reason if final.record.quarantine else "the file is cut short"
            return TrialScores("unscorable", why, curve, len(standings), recorded)
        return self._judged(seen, trial, final.record, usual)

    def _judged(
        self, seen: TrialScores, trial: TrialLayout, record: CheckpointRecord, usual: frozenset[str] | None
    ) -> TrialScores:
        metrics, render = self._metrics(trial, record)
        if metrics is None or not all((render.folder / sample.file).exists() for sample in metrics.samples):
            return seen  # lost or damaged since: the evaluator makes them again
        score = metrics.scores.get(self._objective)
        if score is None or score.value is None:
            missing = ", ".join(score.left_out) if score is not None else "it"
            why = f"{self._objective} could not be computed without {missing}"
            return TrialScores("unscorable", why, seen.curve, seen.seen, seen.recorded)
        if why := unlike(self._objective, score, usual):
            return TrialScores("unscorable", why, seen.curve, seen.seen, seen.recorded)
        objections = [check.reason for check in metrics.gate.checks.values() if check.passed is False and check.reason]
        because = None if metrics.gate.feasible else "; ".join(objections) or "it failed its gate"
        values = measured_values(self._objectives, metrics)
        for name in (objective.name for objective in self._objectives if objective.name not in values):
            metric = metrics.metrics.get(name)
            why = f"{name}, an objective, has no value: {(metric and metric.reason) or 'it was not measured'}"
            return TrialScores("unscorable", why, seen.curve, seen.seen, seen.recorded)
        final = FinalScore(score.value, because, metrics, render, values)
        return TrialScores("scored", "", seen.curve, seen.seen, seen.recorded, final)

    def _standings(self, trial: TrialLayout, last_epoch: int | None) -> list[_Standing]:
        records = self._records(trial)
        standings = []
        for path in trial.list_checkpoints():
            written_down = None
            try:
                written_down = read_header(path, trial.folder).epoch
            except IncompleteCheckpointError:
                continue
            except RefusedCheckpointError:
                pass  # the evaluator gives it its verdict
            record = next((known for known in records.get(path.stem, []) if self._is_about(known, path, trial)), None)
            epoch = checkpoint_epoch(path.name, written_down, last_epoch, trial.output_name)
            standings.append(_Standing(path.stem, epoch, record))
        return sorted(standings, key=lambda s: (s.epoch is None, s.epoch or 0, s.name))

    def _records(self, trial: TrialLayout) -> dict[str, list[CheckpointRecord]]:
        """Return the records of this plan by checkpoint name, the latest first."""
        state = read_or_none(trial.evaluations.state, EvaluationState)
        found: dict[str, list[CheckpointRecord]] = {}
        for record in reversed(state.checkpoints if state is not None else ()):
            if record.plan_hash == self._plan_hash:
                found.setdefault(record.checkpoint, []).append(record)
        return found

    def _is_about(self, record: CheckpointRecord, path: Path, trial: TrialLayout) -> bool:
        """Tell whether a record is about the content that stands at that name now."""
        try:
            stamp = Stamp.of(path.lstat())  # as the evaluator looks at it: a link is its own file
        except FileNotFoundError:
            return False
        if (record.size, record.modified_ns) == (stamp.size, stamp.mtime_ns):
            return True
        key = (path, stamp)
        if key not in self._hashes:
            try:
                self._hashes[key] = read_checkpoint(path, trial.folder).sha256
            except CheckpointError:
                self._hashes[key] = None
        return record.checkpoint_sha256 is not None and record.checkpoint_sha256 == self._hashes[key]

    def _metrics(self, trial: TrialLayout, record: CheckpointRecord) -> tuple[Metrics | None, RenderLayout]:
        for name in (record.checkpoint, record.same_as):
            if name is None:
                continue
            render = trial.evaluations.checkpoint(name)
            metrics = read_or_none(render.metrics, Metrics)
            identity = (record.checkpoint_sha256, self._plan_hash)
            if metrics is not None and (metrics.checkpoint_sha256, metrics.plan_hash) == identity:
                return metrics, render
        return None, trial.evaluations.checkpoint(record.checkpoint)

    def _curve(
        self, trial: TrialLayout, standings: list[_Standing], usual: frozenset[str] | None
    ) -> tuple[CurvePoint, ...]:
        points = []
        for standing in standings:
            if not standing.settled or standing.record is None:
                break
            if standing.epoch is None or standing.record.status != "recorded":
                continue
            metrics, _ = self._metrics(trial, standing.record)
            score = metrics.scores.get(self._objective) if metrics is not None else None
            if metrics is None or score is None or score.value is None or unlike(self._objective, score, usual):
                continue
            points.append(
                CurvePoint(
                    epoch=standing.epoch,
                    value=score.value,
                    checkpoint=standing.name,
                    values=measured_values(self._objectives, metrics),
                )
            )
        return tuple(points)


def usual_parts(study: StudyLayout, plan_hash: str, objective: str) -> frozenset[str] | None:
    """What the base model's own score was made without; None where it is not there.

    It is measured before any checkpoint of the study, so it tells what all of them are measured with, whichever comes
    first and however often the daemons are started.
    """
    metrics = read_or_none(study.base_render(plan_hash).metrics, Metrics)
    if metrics is None or metrics.plan_hash != plan_hash or objective not in metrics.scores:
        return None
    return parts_lacking(metrics.scores[objective])


def parts_lacking(score: Score) -> frozenset[str]:
    """What a score was made without, besides what the base model never has: a difference from itself."""
    return frozenset(score.left_out) - {BASE_DIFFERENCE}


def unlike(objective: str, score: Score, usual: frozenset[str] | None) -> str:
    """Say why a score is not on the scale of the study's others, "" where it is."""
    if usual is None or parts_lacking(score) == usual:
        return ""
    if lacking := sorted(parts_lacking(score) - usual):
        return (
            f"{objective} was made without {', '.join(lacking)}, which the study's other scores have; give the "
            "evaluator back what it needs (evaluator-daemon metrics says what), then enqueue its parameters again"
        )
    return (
        f"{objective} was made with {', '.join(sorted(usual - parts_lacking(score)))}, which the base model's score in "
        "reference/ lacks; take it away from the evaluator again, or begin a new study"
    )


def read_or_none(path: Path, model: type[F]) -> F | None:
    """Return a file of the evaluator; None when it is not there, or damaged: then its writer makes it anew."""
    try:
        return read_model(path, model)
    except SchemaVersionError:
        raise
    except (FileNotFoundError, UnreadableFileError):
        return None

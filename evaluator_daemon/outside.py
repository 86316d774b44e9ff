"""Evaluations outside the trials: weight files from anywhere, or the base model alone, under a label.

They go through the same admission, attempts and records as a trial's checkpoints; the files are read where they lie.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from evaluator_daemon.evaluator import LOCK_TIMEOUT_S, Evaluator
from evaluator_daemon.folder import read_or_none
from evaluator_daemon.job import Job
from evaluator_daemon.pictures import descriptions, write_pictures
from evaluator_daemon.places import LabelPlace
from evaluator_daemon.recording import now
from evaluator_daemon.reference import BASE
from shared.errors import DiskError, StudyMismatchError, UserError
from shared.files import write_model
from shared.layout import LabelLayout, StudyLayout
from shared.locks import FileLock
from shared.logs import log_change
from shared.schemas import Attempt, CheckpointRecord, EvaluationState, LabelledPlan, Metrics
from shared.scores.comparing import differences_text, fields_that_differ
from shared.service import Service

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What came of one file, or of the base model.

    Args:
        status: as its record says, or the code why the file is not whole yet.
        reason: why there is no result.
        metrics: the result.
    """

    checkpoint: str
    status: str
    reason: str | None
    metrics: Metrics | None


def evaluate_outside(
    job: Job,
    label: str,
    files: Mapping[str, Path | None],
    *,
    changed_state: Callable[[], None] = lambda: None,
    deferred: Callable[[], None] = lambda: None,
    previous_crash: str | None = None,
) -> list[Outcome]:
    """Evaluate what is not recorded yet, and return what is known of each.

    Args:
        label: the folder below evaluations/.
        files: checkpoint name -> weight file; None for the base model alone, whose name is "base".
        changed_state, deferred: as for `evaluate_trial`.
        previous_crash: how the label's previous evaluator ended by its own fault; None when it did not, or unknown.
    Raises:
        AlreadyRunningError: somebody else evaluates under this label.
        StudyMismatchError: the label's results were made with another plan.
        UserError: the label holds another file of that name.
        ResourceError: nothing can be evaluated now.
        Stopped: a signal asked for it; what was in hand is recorded as interrupted.
    """
    layout = StudyLayout(job.root).evaluations(label)
    try:
        layout.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(layout.folder, error) from error
    lock = FileLock(layout.lock)
    if not lock.try_acquire(LOCK_TIMEOUT_S):
        lock.acquire()
    try:
        _write_plan(layout, label, job, files)
        service = Service()
        weights = {name: path for name, path in files.items() if path is not None}
        evaluator = Evaluator(job, LabelPlace(layout, weights), service, changed_state, deferred)
        evaluator.close_unfinished(previous_crash)

        def tick() -> None:
            if len(weights) < len(files):
                _record_base(evaluator, layout)
            evaluator.tick(watch=False)

        service.run(tick, job.check_interval_s)
        waiting = {name: Outcome(name, error.code, error.reason, None) for name, error in evaluator.waiting.items()}
        return [waiting.get(name) or outcome_of(layout, name) for name in files]
    finally:
        lock.release()


def _write_plan(layout: LabelLayout, label: str, job: Job, files: Mapping[str, Path | None]) -> None:
    known = read_or_none(layout.plan, LabelledPlan)
    named = {name: None if path is None else str(path) for name, path in files.items()}
    if known is None:
        write_model(layout.plan, LabelledPlan(label=label, plan=job.plan, files=named))
        return
    if known.plan.digest() != job.plan.digest():
        differing = differences_text(fields_that_differ(known.plan, job.plan))
        raise StudyMismatchError(
            f"{layout.folder} was evaluated with another plan: {differing}; choose another --label"
        )
    for name in named.keys() & known.files.keys():
        if named[name] != known.files[name]:
            raise UserError(
                f"{layout.folder} already holds {name} of {known.files[name] or 'the base model'}, not of "
                f"{named[name] or 'the base model'}; choose another --label"
            )
    if not named.keys() <= known.files.keys():
        write_model(layout.plan, known.model_copy(update={"files": {**known.files, **named}}))


def _record_base(evaluator: Evaluator, layout: LabelLayout) -> None:
    """Record the base model's own pictures under the label, as if it were a checkpoint."""
    memory = evaluator.memory
    known = memory.record_of(BASE, None)
    if known is not None and known.status == "recorded" and memory.has_results(known):
        return
    started = now()
    reference = evaluator.model.base()  # what fails here is the machine's fault, no attempt
    record = CheckpointRecord(
        checkpoint=BASE,
        checkpoint_sha256=None,
        plan_hash=evaluator.plan_hash,
        epoch=None,
        size=0,
        modified_ns=0,
        status="evaluating",
        attempts=(Attempt(started=started, outcome="running"),),
    )
    memory.put(record)
    render = layout.checkpoint(BASE)
    write_pictures(render, reference.pictures, descriptions(evaluator.job, None))
    write_model(render.metrics, reference.metrics.model_copy(update={"trial_name": layout.folder.name}))
    memory.end_attempt(record, "recorded")
    log_change(_log, "base model recorded", label=layout.folder.name)


def outcome_of(layout: LabelLayout, name: str) -> Outcome:
    """Return what is recorded of a checkpoint under a label."""
    state = read_or_none(layout.state, EvaluationState)
    records = state.checkpoints if state is not None else ()
    record = next((record for record in records if record.checkpoint == name), None)
    if record is None:
        return Outcome(name, "waiting", "it is not whole, or still being written; try again when it is", None)
    if record.status == "recorded":
        return Outcome(name, record.status, None, read_or_none(layout.checkpoint(name).metrics, Metrics))
    reason = record.quarantine.reason if record.quarantine else "; ".join(a.reason or "" for a in record.attempts[-1:])
    return Outcome(name, record.status, reason, None)

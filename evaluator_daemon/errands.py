"""Evaluations that somebody asks the manager for: files outside the trials, under a label, one at a time.

A request stays in its folder until it is answered, so a manager that was killed takes it up again; what was recorded
by then is not rendered twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from evaluator_daemon.children import Ended, Evaluators
from evaluator_daemon.folder import read_or_none
from evaluator_daemon.job import Job
from shared.errors import ContractError, UserError
from shared.layout import LabelLayout, StudyLayout
from shared.locks import FileLock
from shared.logs import log_change
from shared.requests import PendingRequest, RequestFolder
from shared.schemas import CheckpointRecord, Evaluate, EvaluationState, Metrics, Scalar

BASE = "base"
"""The name of the base model alone, as if it were a checkpoint."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Errand:
    request: PendingRequest
    command: Evaluate
    name: str  # of the checkpoint
    file: Path | None  # None for the base model alone
    job: Job


class Errands:
    """The requests in hand.

    Args:
        requests: where they are answered.
        once: each is tried once.
    """

    def __init__(self, study: StudyLayout, requests: RequestFolder, *, once: bool) -> None:
        self._once = once
        self._study = study
        self._requests = requests
        self._errands: dict[str, _Errand] = {}  # by the request's identity
        self._at_work: _Errand | None = None

    def __bool__(self) -> bool:
        return bool(self._errands)

    def take(self, request: PendingRequest, command: Evaluate, job: Job) -> None:
        """Take a request into hand, or refuse it; one that is in hand already stays so."""
        if request.identity in self._errands:
            return
        try:
            errand = self._errand(request, command, job)
        except UserError as error:
            log_change(_log, "request refused", level=logging.WARNING, id=request.id, reason=error)
            self._requests.refuse(request, str(error))
            return
        self._errands[request.identity] = errand
        log_change(_log, "request", kind="evaluate", id=request.id, label=command.label, file=errand.name)

    def keep(self, pending: Iterable[PendingRequest], evaluators: Evaluators) -> None:
        """Forget requests that whoever asked has taken back, and end what is done for them."""
        known = {request.identity for request in pending}
        self._errands = {identity: errand for identity, errand in self._errands.items() if identity in known}
        if self._at_work is not None and self._at_work.request.identity not in known:
            evaluators.terminate(label_key(self._at_work.command.label))

    def start(self, evaluators: Evaluators) -> None:
        """Start the most urgent one where none is at work; a label that somebody else works on waits."""
        if evaluators.labels:
            return
        for errand in sorted(self._errands.values(), key=lambda errand: -errand.command.priority):
            label = errand.command.label
            if evaluators.may_start(label_key(label)) and not FileLock.is_held(self._study.evaluations(label).lock):
                evaluators.start_label(label, errand.job, {errand.name: errand.file})
                self._at_work = errand
                return

    def settle(self, ended: Iterable[Ended]) -> None:
        """Answer what has been evaluated, or can never be; whatever else ended is tried again."""
        for evaluator in ended:
            errand = self._at_work
            if errand is None or label_key(errand.command.label) != evaluator.name:
                continue
            self._at_work = None
            if errand.request.identity in self._errands and self._is_answered(errand, evaluator):
                del self._errands[errand.request.identity]

    def _is_answered(self, errand: _Errand, evaluator: Ended) -> bool:
        layout = self._study.evaluations(errand.command.label)
        hopeless = evaluator.code in (UserError.exit_code, ContractError.exit_code) or self._once
        if hopeless and evaluator.code != 0 and not evaluator.handled:
            reason = f"the evaluation ended with exit status {evaluator.code}; {layout.log} says why"
            self._requests.refuse(errand.request, reason)
            return True
        return self._answered(errand, layout, ended_well=evaluator.code == 0 and not evaluator.handled)

    def _errand(self, request: PendingRequest, command: Evaluate, job: Job) -> _Errand:
        """Return what a request asks for.

        Raises:
            UserError: there is no such file, or the plan is about other models than the study's.
        """
        plan = command.plan or job.plan
        for field in ("base_digest", "vae_digest", "scoring"):
            if getattr(plan, field) != getattr(job.plan, field):
                raise UserError(f"evaluate: the plan's {field} is not the study's; leave the plan out, or change it")
        job = replace(job, plan=plan)
        if command.file is None:
            return _Errand(request, command, BASE, None, job)
        file = self._study.root / command.file
        if file.suffix != ".safetensors" or not file.is_file():
            raise UserError(f"evaluate: {file} is not there, or no *.safetensors file; correct the name")
        return _Errand(request, command, file.stem, file, job)

    def _answered(self, errand: _Errand, layout: LabelLayout, *, ended_well: bool) -> bool:
        """Answer by what is recorded; False when that says nothing yet."""
        state = read_or_none(layout.state, EvaluationState)
        records = state.checkpoints if state is not None else ()
        record = next((known for known in records if _is_about(known, errand)), None)
        if record is not None and record.status == "recorded":
            metrics = read_or_none(layout.checkpoint(errand.name).metrics, Metrics)
            if metrics is None:
                return False
            objective = errand.job.plan.scoring.objective
            result: dict[str, Scalar | None] = {
                "label": errand.command.label,
                "checkpoint": errand.name,
                "objective": objective,
                "score": metrics.scores[objective].value,
                "feasible": metrics.gate.feasible,
            }
            self._requests.accept(errand.request, result)
            return True
        if record is not None and record.quarantine is not None:
            self._requests.refuse(errand.request, f"{errand.name}: {record.quarantine.reason}")
            return True
        if ended_well:
            reason = f"{errand.name} is not whole, or still being written; ask again when it is"
            self._requests.refuse(errand.request, reason)
            return True
        return False


def _is_about(record: CheckpointRecord, errand: _Errand) -> bool:
    """Whether a record tells of the file as it stands now, under the plan that was asked for."""
    if (record.checkpoint, record.plan_hash) != (errand.name, errand.job.plan.digest()):
        return False
    if errand.file is None:
        return True
    try:
        status = errand.file.stat()
    except OSError:
        return False
    return (record.size, record.modified_ns) == (status.st_size, status.st_mtime_ns)


def label_key(label: str) -> str:
    """Return the name under which a label's evaluator is known; no trial is called so."""
    return f"evaluations/{label}"

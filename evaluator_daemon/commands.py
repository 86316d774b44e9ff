"""What people ask of the evaluator daemon: retry.

It lifts the quarantine in the trial's evaluation_state.json, which belongs to whoever holds the trial's lock: the
trial's evaluator, or for a moment the manager, or the verb where no manager lives. Lifting it twice changes nothing.
"""

from __future__ import annotations

from datetime import datetime

from shared.errors import AlreadyRunningError, UserError
from shared.files import read_model, write_model
from shared.layout import EVALUATION_STATE, EvaluationsLayout, StudyLayout
from shared.locks import FileLock
from shared.requests import PendingRequest, RequestFolder
from shared.schemas import CheckpointRecord, EvaluationState, Retry, Scalar
from shared.schemas.requests import Request

LOCK_TIMEOUT_S = 120.0
"""How long the verb itself waits for an evaluation that the optimizer runs where no manager lives."""

Result = dict[str, Scalar | None]


def lift(study: StudyLayout, command: Retry, *, lock_timeout_s: float = 0.0) -> Result:
    """Let quarantined and truncated checkpoints of a trial or label be evaluated again, and say how many there were.

    Raises:
        UserError: there is no such trial, label or checkpoint.
        AlreadyRunningError: an evaluator holds the trial's lock; try again when it has ended.
        UnreadableFileError: evaluation_state.json is damaged; the next evaluator rebuilds it.
        DiskError: it could not be written, and the old one stands.
    """
    evaluations, files = _find(study, command.trial_name)
    if not _chosen(evaluations, files, command):
        return _result(command.trial_name, [])
    lock = FileLock(evaluations.lock)
    if not lock.try_acquire(lock_timeout_s):
        raise AlreadyRunningError(lock.path, FileLock.holder(lock.path))
    try:
        chosen = _chosen(evaluations, files, command)  # again: an evaluator may have written meanwhile
        state = read_model(evaluations.state, EvaluationState)
        records = tuple(_lifted(record) if record.checkpoint in chosen else record for record in state.checkpoints)
        now = datetime.now().astimezone()
        write_model(evaluations.state, state.model_copy(update={"checkpoints": records, "updated": now}))
    finally:
        lock.release()
    return _result(command.trial_name, chosen)


def carry_out_without_manager(folder: RequestFolder, request: PendingRequest) -> None:
    """Do a request's work under the manager's lock.

    Raises:
        LabError: the trial's records cannot be read or written now.
    """
    assert isinstance(request.command, Retry)
    try:
        result = lift(folder.study, request.command, lock_timeout_s=LOCK_TIMEOUT_S)
    except UserError as error:
        folder.refuse(request, str(error))
    else:
        folder.accept(request, result)


def ask(study: StudyLayout, command: Request) -> str:
    """Have a command carried out, by the manager or here, and return the line that says what came of it.

    Raises:
        UserError: it was refused.
        ResourceError: the manager lives but does not answer.
    """
    folder = RequestFolder(study, "evaluator")
    answer = folder.ask(command, study.manager_lock, lambda request: carry_out_without_manager(folder, request))
    if not answer.ok:
        raise UserError(answer.error or "refused")
    return str(answer.result["message"])


def _find(study: StudyLayout, name: str) -> tuple[EvaluationsLayout, set[str]]:
    """Return where a trial's or a label's evaluations lie, and the names of its weight files.

    Raises:
        UserError: there is neither.
    """
    trials = study.list_trials()
    for trial in trials:
        if trial.name == name:
            return trial.evaluations, {path.stem for path in trial.list_checkpoints()}
    labels = {path.parent.name for path in study.root.glob(f"evaluations/*/{EVALUATION_STATE}")}
    if name in labels:
        return study.evaluations(name), set()
    known = ", ".join(trial.name for trial in trials) or "there is none yet"
    raise UserError(
        f"{study.root} holds no trial {name!r}; its trials: {known}"
        + (f"; its labels: {', '.join(sorted(labels))}" if labels else "")
    )


def _chosen(evaluations: EvaluationsLayout, files: set[str], command: Retry) -> list[str]:
    """Return the names of the checkpoints whose verdict stands in the way.

    Raises:
        UserError: the checkpoint that was named is neither recorded nor there.
    """
    try:
        records = read_model(evaluations.state, EvaluationState).checkpoints
    except FileNotFoundError:
        records = ()
    wanted = command.checkpoint and command.checkpoint.removesuffix(".safetensors")
    known = {record.checkpoint for record in records} | files
    if wanted and wanted not in known:
        names = ", ".join(sorted(known)) or "there is none yet"
        raise UserError(f"{command.trial_name} has no checkpoint {wanted!r}; its checkpoints: {names}")
    return [record.checkpoint for record in records if _is_barred(record) and wanted in (None, record.checkpoint)]


def _is_barred(record: CheckpointRecord) -> bool:
    return record.status in ("quarantined", "truncated") or (record.status == "waiting" and record.strikes > 0)


def _lifted(record: CheckpointRecord) -> CheckpointRecord:
    """Return a record as if the checkpoint had just been seen: no verdict, no strikes."""
    return CheckpointRecord.model_validate(
        {**dict(record), "status": "waiting", "attempts": (), "quarantine": None, "same_as": None}
    )


def _result(of: str, names: list[str]) -> Result:
    told = f"{', '.join(names)} evaluated again" if names else "nothing is quarantined"
    return {"checkpoints": len(names), "message": f"{of}: {told}"}

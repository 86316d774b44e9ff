"""What people ask of a study while it runs, or between two runs: pause, resume, stop, set, enqueue.

    pause, resume   last as long as the daemon: `run` starts a paused study again
    stop            is answered when everything has stopped; the daemon then exits with 0
    set             n-trials and timeout, for this run; the next `run` takes its own flags
    enqueue         is in the study's database before it is answered, under the request's identity
    analyze         is answered when a child has written the files of results/ anew

Carrying any of them out twice changes nothing more, so a daemon killed in between just does it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from pydantic import ValidationError

from optimizer_daemon.recovery import end_left_trainings
from optimizer_daemon.settings import OptimizerSettings
from optimizer_daemon.study_file import rewritten
from shared.errors import SettingsError, UserError
from shared.files import read_model
from shared.layout import StudyLayout
from shared.logs import log_change
from shared.requests import ANSWER_TIMEOUT_S, PendingRequest, RequestFolder
from shared.schemas import Analyze, Enqueue, Pause, Resume, Run, Scalar, Set, Stop
from shared.schemas.requests import Request

if TYPE_CHECKING:
    from optimizer_daemon.enqueue import Queue
    from optimizer_daemon.refresh import ResultsRefresh

ANALYSIS_TIMEOUT_S = 900.0  # niced, beside trainings, and what is asked for meanwhile comes after it

CHANGEABLE = ("n_trials", "timeout")
"""Settings that `set` may change in a run."""

Result = dict[str, Scalar | None]

_log = logging.getLogger(__name__)


class RequestDesk:
    """Reads the requests to a living daemon and keeps what they ask for.

    Args:
        folder: where they come.
        settings: what the daemon was started with.
        queue: where configurations wait.
        store: makes changed settings known in run.json.
        results: writes the files of results/.
    """

    def __init__(
        self,
        folder: RequestFolder,
        settings: OptimizerSettings,
        queue: Queue,
        store: Callable[[OptimizerSettings], None],
        results: ResultsRefresh,
    ) -> None:
        self.settings = settings
        self.paused = False
        self.stop_asked: PendingRequest | None = None
        self._folder = folder
        self._queue = queue
        self._store = store
        self._results = results
        self._analyses: dict[str, int] = {}

    def serve(self) -> None:
        """Carry out what is there and answer it; a stop is kept for the daemon and hides what comes after it.

        Raises:
            ResourceError: the disk or the database failed; the request stays pending.
        """
        for request in self._folder.pending():
            if request.id in self._analyses:
                self._answer_analysis(request)
                continue
            kind = type(request.command).__name__.lower()
            log_change(_log, "request", kind=kind, id=request.id, asked_by=request.command.asked_by or "a file")
            if isinstance(request.command, Stop):
                self.stop_asked = request
                return
            if isinstance(request.command, Analyze):
                self._analyses[request.id] = self._results.request(request.command.top_n)
                continue
            try:
                result = self._carry_out(request)
            except UserError as error:
                log_change(_log, "request refused", level=logging.WARNING, id=request.id, reason=error)
                self._folder.refuse(request, str(error))
            else:
                self._folder.accept(request, result)

    def answer_stop(self, message: str) -> None:
        """Say that the stop was carried out."""
        assert self.stop_asked is not None, "nobody asked for a stop"
        self._folder.accept(self.stop_asked, {"message": message})

    def _answer_analysis(self, request: PendingRequest) -> None:
        """Answer a request for an analysis once it is written; until then it stays pending."""
        code = self._results.outcome(self._analyses[request.id])
        if code is None:
            return
        del self._analyses[request.id]
        if code == 0:
            self._folder.accept(request, {"message": _written(self._folder.study)})
        else:
            self._folder.refuse(request, f"the results could not be written (exit status {code}); see optimization.log")

    def _carry_out(self, request: PendingRequest) -> Result:
        match request.command:
            case Pause():
                self.paused = True
                return {"message": "paused: what trains goes on, nothing else starts until `optimizer-daemon resume`"}
            case Resume():
                self.paused = False
                return {"message": "resumed: trials start again"}
            case Set() as command:
                self.settings = changed_settings(self.settings, command.settings)
                self._store(self.settings)
                shown = ", ".join(f"{flag} {value}" for flag, value in command.settings.items())
                return {"message": f"set: {shown}, until this run ends"}
            case Enqueue() as command:
                return _enqueued(self._queue.add(command, request.identity))
            case command:
                raise UserError(f"{type(command).__name__.lower()}: the optimizer daemon knows no such command")


def carry_out_without_daemon(folder: RequestFolder, request: PendingRequest) -> None:
    """Do under the daemon's lock what needs no daemon, and say of anything else that none runs.

    Raises:
        LabError: the study cannot be opened.
    """
    study = folder.study
    match request.command:
        case Enqueue() as command:
            from optimizer_daemon.enqueue import Queue  # seconds of Optuna, which no other command needs

            try:
                number = Queue.of_stopped_study(_run_of(study), study).add(command, request.identity)
            except UserError as error:
                folder.refuse(request, str(error))
            else:
                folder.accept(request, _enqueued(number))
        case Analyze(top_n=top_n):
            _analyze(study, top_n)
            folder.accept(request, {"message": _written(study)})
        case Stop():
            ended = end_left_trainings(study, "stopped by request")
            run = _run_of(study)
            if run.status == "running":
                rewritten(run, study, "stopped", datetime.now().astimezone())
            left = f"; trainings it had left were ended: {', '.join(map(str, ended))}" if ended else ""
            folder.accept(request, {"message": f"stopped: no optimizer daemon was running{left}"})
        case Set():
            folder.refuse(request, f"no optimizer daemon runs {study.root}; pass the new value to `run` instead")
        case command:
            kind = type(command).__name__.lower()
            folder.refuse(request, f"no optimizer daemon runs {study.root}, so there is nothing to {kind}")


def ask(study: StudyLayout, command: Request) -> str:
    """Have a command carried out, by the daemon or here, and return the line that says what came of it.

    Raises:
        UserError: it was refused.
        ResourceError: the daemon lives but does not answer.
    """
    folder = RequestFolder(study, "optimizer")
    # A folder without a study has nothing to be asked; an analysis tells what it can of a damaged one.
    if not isinstance(command, Analyze) or not study.list_trials():
        _run_of(study)
    patience_s = ANALYSIS_TIMEOUT_S if isinstance(command, Analyze) else ANSWER_TIMEOUT_S
    answer = folder.ask(
        command, study.optimizer_lock, lambda request: carry_out_without_daemon(folder, request), patience_s
    )
    if not answer.ok:
        raise UserError(answer.error or "refused")
    return str(answer.result["message"])


def changed_settings(settings: OptimizerSettings, changes: dict[str, Scalar]) -> OptimizerSettings:
    """Return the settings with new values, given by flag name.

    Raises:
        SettingsError: a setting cannot change in a run, or the value will not do.
    """
    named = {flag.replace("-", "_"): value for flag, value in changes.items()}
    for name, value in named.items():
        flag = name.replace("_", "-")
        if name not in CHANGEABLE:
            can = " and ".join(known.replace("_", "-") for known in CHANGEABLE)
            raise SettingsError(f"set {flag}", value, f"only {can} can change while a study runs")
        if name == "n_trials" and settings.stages is not None:
            raise SettingsError(f"set {flag}", value, f"the stages of {settings.stages} say it; change it there")
        if isinstance(value, bool):  # pydantic would read it as 1
            raise SettingsError(f"set {flag}", value, "write a number")
    try:
        return OptimizerSettings(**{**dict(settings), **named})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        said = f"{first['msg'][0].lower()}{first['msg'][1:]} ({OptimizerSettings.model_fields[name].description})"
        raise SettingsError(f"set {name.replace('_', '-')}", first["input"], said) from error


def _run_of(study: StudyLayout) -> Run:
    try:
        return read_model(study.run, Run)
    except FileNotFoundError:
        raise UserError(f"{study.root} holds no study (no run.json); name the optimizer's --output-dir") from None


def _analyze(study: StudyLayout, top_n: int) -> None:
    from optimizer_daemon.analysis.analyze import analyze  # seconds of matplotlib and Optuna
    from optimizer_daemon.results import write_results

    facts = analyze(study, top_n)
    # Damaged files must not take trials out of what a whole study's results say.
    if not facts.problems or not study.results.all_trials.exists():
        write_results(study, facts.results)


def _written(study: StudyLayout) -> str:
    return f"written: {study.results.folder}"


def _enqueued(trial: int) -> Result:
    return {"trial": trial, "message": f"enqueued: trial {trial} is trained before the sampler draws again"}

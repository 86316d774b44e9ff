"""One trial's evaluator: admit -> render -> measure -> record, checkpoint after checkpoint, until the trial is over.

Every attempt is written down before it starts, so that whatever kills this process is known to the next one.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from evaluator_daemon.admission import Looks, admit, half_network, is_usual_network, require_own_network, standing
from evaluator_daemon.gpu_policy import POLICY_LOOK_S, pause_s
from evaluator_daemon.job import Job
from evaluator_daemon.pictures import AppliedLora, descriptions, read_pictures, write_pictures
from evaluator_daemon.places import Place, TrialPlace
from evaluator_daemon.recording import Memory, changed, given_up, now
from evaluator_daemon.resident import ResidentModel
from evaluator_daemon.sweep import TrialView, WeightFile, is_over, is_truncated, open_files
from evaluator_daemon.watcher import FolderWatch
from shared.errors import (
    CheckpointError,
    DeviceBusyError,
    DiskError,
    IncompleteCheckpointError,
    LabError,
    RefusedCheckpointError,
    Stopped,
)
from shared.failpoints import reach
from shared.files import read_model, write_model
from shared.layout import TRIAL_STATE, TrialLayout
from shared.locks import FileLock
from shared.logs import log_change
from shared.safetensors_file import Checkpoint, LoraLayout, lora_ranks, read_header
from shared.schemas import Attempt, CheckpointRecord, Metrics, TrialParams
from shared.schemas.evaluator import CheckpointStatus
from shared.service import Service

LOCK_TIMEOUT_S = 10.0
WAKING_NAMES = ("*.safetensors", TRIAL_STATE)

_log = logging.getLogger(__name__)


def evaluate_trial(
    job: Job,
    trial_folder: Path,
    *,
    watch: bool,
    changed_state: Callable[[], None] = lambda: None,
    deferred: Callable[[], None] = lambda: None,
    previous_crash: str | None = None,
) -> None:
    """Evaluate a trial's checkpoints; the work of one evaluator process.

    Args:
        watch: go on until the trial is over; otherwise end when all that is there is done.
        changed_state: called after every change of the trial's evaluation_state.json.
        deferred: called when others need the device; the next `changed_state` says that it goes on.
        previous_crash: how the trial's previous evaluator ended by its own fault; None when it did not, or unknown.
    Raises:
        AlreadyRunningError: another evaluator is at this trial.
        StudyMismatchError, ResourceError: nothing can be evaluated now.
        Stopped: a signal asked for it; the checkpoint in hand is recorded as interrupted.
    """
    # a linked trial keeps its own name and its study's locks
    trial = TrialLayout(trial_folder.parent.resolve() / trial_folder.name)
    trial.evaluations.folder.mkdir(exist_ok=True)
    lock = FileLock(trial.evaluations.lock)
    if not lock.try_acquire(LOCK_TIMEOUT_S):
        lock.acquire()
    with contextlib.ExitStack() as held:
        held.callback(lock.release)
        service = Service()
        evaluator = Evaluator(job, TrialPlace(trial), service, changed_state, deferred)
        evaluator.close_unfinished(previous_crash)
        folder_watch = FolderWatch(trial.folder, WAKING_NAMES, service.wake) if watch else None
        if folder_watch is not None:
            held.callback(folder_watch.close)
            if folder_watch.blind_because:
                log_change(_log, "no events here", why=folder_watch.blind_because, interval_s=job.check_interval_s)

        def tick() -> None:
            if folder_watch is not None:
                folder_watch.check()  # every tick looks at the whole folder, so what was lost meanwhile is found
            evaluator.tick(watch=watch)

        service.run(tick, job.check_interval_s)
        evaluator.say_best()


class Evaluator:
    """Works through a trial's folder, or files under a label; the model is loaded for the first one and stays."""

    def __init__(
        self,
        job: Job,
        place: Place,
        service: Service,
        changed_state: Callable[[], None],
        deferred: Callable[[], None] = lambda: None,
    ) -> None:
        self.job = job
        self.place = place
        self.plan_hash = job.plan.digest()
        self.memory = Memory(place.name, place.evaluations, self.plan_hash, job.plan)
        self._service = service
        self._changed_state = changed_state
        self.model = ResidentModel(job, self._stop_if_asked)
        self._looks = Looks()
        self.waiting: dict[str, IncompleteCheckpointError] = {}
        self._deferred = deferred
        self._deferrals = 0  # in a row
        self._said_deferred: str | None = None
        self._shows_deferred = False  # to the manager
        self._resume_at = 0.0  # seconds of the monotonic clock

    def close_unfinished(self, previous_crash: str | None) -> None:
        """Tell strikes from interruptions among the attempts that an earlier process left running."""
        for record in self.memory.close_unfinished(previous_crash):
            last = record.attempts[-1]
            log_change(_log, last.outcome, checkpoint=record.checkpoint, reason=last.reason)

    def say_best(self) -> None:
        """Say which checkpoint is best, when all that is there is done."""
        best = self.memory.best
        if best is not None:
            log_change(
                _log,
                "best checkpoint",
                checkpoint=best.checkpoint,
                epoch=best.epoch,
                objective=best.objective,
                score=best.score,
                certainty=None if best.certainty is None else round(best.certainty, 3),
                tie_set=",".join(best.tie_set),
            )

    def tick(self, *, watch: bool) -> None:
        """Evaluate everything that is there, looking at the folder again after each; end the service when done."""
        try:
            self._sweep(watch=watch)
        except (DiskError, FileNotFoundError):
            if self.place.is_there():
                raise
            log_change(_log, "the folder is gone", folder=self.place.evaluations.folder.parent)
            self._service.stop()

    def _sweep(self, *, watch: bool) -> None:
        if time.monotonic() < self._resume_at:
            return
        looked_at: set[str] = set()
        while not self._service.stopping:
            view = self.place.look(self.memory.records, self.plan_hash)
            self._looks.note(view.files, time.monotonic())
            todo = [file for file in open_files(view) if file.name not in looked_at]
            if not todo:
                if not watch or (is_over(view, self.job.idle_timeout_s) and not open_files(view)):
                    self._service.stop()
                self._go_on()
                self.model.rest()
                return
            if training := self.model.held_back():
                self.model.give_back()
                self._defer(training, POLICY_LOOK_S)
                return
            if self._deferrals == 0:  # what waited for memory goes on when it has got it, not when it tries
                self._go_on()
            try:
                with contextlib.suppress(Stopped):  # the service ends by the signal that asked for it
                    if not self.evaluate(todo[0], view):
                        looked_at.add(todo[0].name)
            except DeviceBusyError as error:
                self._defer(str(error), pause_s(self._deferrals))
                self._deferrals += 1
                return
            self._go_on()
            self._changed_state()

    def _defer(self, reason: str, look_again_s: float) -> None:
        """Leave what is open where it is, and come back to it: nothing of this is a checkpoint's fault."""
        self._resume_at = time.monotonic() + look_again_s
        timer = threading.Timer(look_again_s, self._service.wake)
        timer.daemon = True
        timer.start()
        if self._said_deferred is None:
            log_change(_log, "deferred", reason=reason)
        if not self._shows_deferred:
            self._deferred()
        self._said_deferred, self._shows_deferred = reason, True

    def _go_on(self) -> None:
        if self._said_deferred is not None:
            log_change(_log, "goes on", after=self._said_deferred)
            self._changed_state()
        self._said_deferred, self._deferrals, self._shows_deferred = None, 0, False

    def evaluate(self, file: WeightFile, view: TrialView) -> bool:
        """Take one weight file through all steps; False when only time can help it."""
        path = self.place.file(file.name)
        params = self.place.params()
        try:
            checkpoint, layout = admit(path, path.parent, first_look=self._looks.first(file.name))
            if params is not None:
                require_own_network(checkpoint, layout, params, self._scored_networks(file.name))
        except IncompleteCheckpointError as error:
            return self._wait_or_give_up(file, view, error)
        except RefusedCheckpointError as error:
            self._settle(file, "quarantined", error)
            return True
        self.waiting.pop(file.name, None)
        return self._score(checkpoint, layout, params)

    # ------------------------------------------------------------------------------------------------------ one file

    def _wait_or_give_up(self, file: WeightFile, view: TrialView, error: IncompleteCheckpointError) -> bool:
        if error.code == "vanished":
            return True  # the next look does not show it
        if error.code in ("incomplete", "unreadable") and is_truncated(file, view):
            self._settle(file, "truncated" if error.code == "incomplete" else "quarantined", error)
            return True
        known = self.waiting.get(file.name)
        self.waiting[file.name] = error
        if known is None or known.code != error.code:
            log_change(_log, "checkpoint waits", checkpoint=file.name, code=error.code, reason=error.reason)
        return False

    def _score(self, checkpoint: Checkpoint, layout: LoraLayout, params: TrialParams | None) -> bool:
        reach("evaluator.admitted")
        name = checkpoint.path.stem
        known = self.memory.record_of(name, checkpoint.sha256)
        size, modified_ns = checkpoint.stamp.size, checkpoint.stamp.mtime_ns
        if known is not None and (known.status == "quarantined" or self._is_recorded(known)):
            self.memory.put(changed(known, size=size, modified_ns=modified_ns))  # only touched: same content
            return True
        record = CheckpointRecord(
            checkpoint=name,
            checkpoint_sha256=checkpoint.sha256,
            plan_hash=self.plan_hash,
            epoch=self.place.epoch(checkpoint),
            attempts=known.attempts if known and known.status == "waiting" else (),
            status="waiting",
            size=size,
            modified_ns=modified_ns,
        )
        twin = self.memory.twin_of(name, checkpoint.sha256)
        if twin is not None and self._is_recorded(twin) and self._copy_twin(record, twin, checkpoint):
            return True
        return self._attempt(record, checkpoint, layout, params)

    def _attempt(
        self, record: CheckpointRecord, checkpoint: Checkpoint, layout: LoraLayout, params: TrialParams | None
    ) -> bool:
        with self.model.turn():
            return self._attempt_now(record, checkpoint, layout, params)

    def _attempt_now(
        self, record: CheckpointRecord, checkpoint: Checkpoint, layout: LoraLayout, params: TrialParams | None
    ) -> bool:
        attempts = (*record.attempts, Attempt(started=now(), outcome="running"))
        record = changed(record, status="evaluating", attempts=attempts)
        self.memory.put(record)
        reach("evaluator.attempt_written")
        self._shows_deferred = False
        self._changed_state()
        try:
            metrics = self._measured(record, checkpoint, layout, params)
        except RefusedCheckpointError as error:
            self.memory.end_attempt(record, "strike", error.reason, code=error.code)
            log_change(_log, "quarantined", checkpoint=record.checkpoint, code=error.code, reason=error.reason)
            return True
        except DiskError as error:
            log_change(_log, "attempt withdrawn", checkpoint=record.checkpoint, reason=error)
            # half an evaluation is none, and the record needs its room
            shutil.rmtree(self.place.evaluations.checkpoint(record.checkpoint).folder, ignore_errors=True)
            self.memory.withdraw_attempt(record)
            raise
        except DeviceBusyError:
            self.memory.withdraw_attempt(record)
            raise
        except LabError as error:  # a stop, or something the checkpoint is not to blame for
            self.memory.end_attempt(record, "interruption", str(error))
            log_change(_log, "interruption", checkpoint=record.checkpoint, reason=error)
            raise
        except Exception as error:
            self.memory.end_attempt(record, "strike", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
            _log.exception("strike checkpoint=%s", record.checkpoint)
            if self.job.device != "cpu":
                raise  # a failed kernel leaves the CUDA context unusable: the next attempt needs a new process
            return True  # tried again after the others, three times at most
        self._record(record, checkpoint, metrics)
        if params is not None:
            self._find_halves(record.checkpoint, layout)
        return True

    def _record(self, record: CheckpointRecord, checkpoint: Checkpoint, metrics: Metrics) -> None:
        """Close a successful attempt, unless other content stands at the name by now: then its result is no one's."""
        fate = standing(checkpoint, checkpoint.path.parent)
        if fate == "replaced":
            self.memory.evaluations.checkpoint(record.checkpoint).metrics.unlink(missing_ok=True)
            reason = "the file was replaced while it was evaluated; what it was replaced by is evaluated next"
            self.memory.end_attempt(record, "interruption", reason)
            log_change(_log, "result thrown away", checkpoint=record.checkpoint, reason=reason)
            return
        note = "the file was deleted while it was evaluated" if fate == "deleted" else None
        ended = self.memory.end_attempt(record, "recorded", note)
        reach("evaluator.recorded")
        self._say_recorded(ended, metrics)

    def _measured(
        self, record: CheckpointRecord, checkpoint: Checkpoint, layout: LoraLayout, params: TrialParams | None
    ) -> Metrics:
        """Render, measure and write one checkpoint's folder, metrics.json last."""
        judged = self.model.judge(
            checkpoint,
            layout,
            of=self.place.name,
            epoch=record.epoch,
            is_usual=params is not None and is_usual_network(checkpoint, params),
        )
        reach("evaluator.rendered")
        folder = self.place.evaluations.checkpoint(record.checkpoint)
        write_pictures(folder, judged.pictures, self._descriptions(checkpoint))
        reach("evaluator.pictures_written")
        write_model(folder.metrics, judged.metrics)
        reach("evaluator.metrics_written")
        return judged.metrics

    def _copy_twin(self, record: CheckpointRecord, twin: CheckpointRecord, checkpoint: Checkpoint) -> bool:
        """Record equal content under its second name without rendering it again; False when its pictures are gone."""
        source = self.place.evaluations.checkpoint(twin.checkpoint)
        metrics = Metrics.model_validate(
            {**dict(read_model(source.metrics, Metrics)), "checkpoint": record.checkpoint, "epoch": record.epoch}
        )
        try:
            pictures = read_pictures(source, len(metrics.samples))
        except OSError:
            return False
        folder = self.place.evaluations.checkpoint(record.checkpoint)
        write_pictures(folder, pictures, self._descriptions(checkpoint))
        write_model(folder.metrics, metrics)
        record = changed(record, status="recorded", same_as=twin.checkpoint)
        self.memory.put(record)
        self._say_recorded(record, metrics)
        return True

    def _settle(self, file: WeightFile, status: CheckpointStatus, error: CheckpointError) -> None:
        """Write down a verdict on a file that is not worth an attempt."""
        record = CheckpointRecord(
            checkpoint=file.name,
            checkpoint_sha256=None,
            plan_hash=self.plan_hash,
            epoch=file.epoch,
            size=file.size,
            modified_ns=file.modified_ns,
            changed_s=file.changed_s,
            status="waiting",
        )
        self.memory.put(given_up(record, error.code, error.reason, status))
        log_change(_log, status, checkpoint=file.name, code=error.code, reason=error.reason)

    def _scored_networks(self, but: str) -> dict[str, dict[str, int]]:
        """Module -> rank of every recorded checkpoint whose file still stands, by name, all but one."""
        found = {}
        for record in (r for r in self.memory.records if r.status == "recorded" and r.checkpoint != but):
            try:
                path = self.place.file(record.checkpoint)
                header = read_header(path, path.parent)
            except CheckpointError:
                continue
            if (header.stamp.size, header.stamp.mtime_ns) == (record.size, record.modified_ns):
                found[record.checkpoint] = lora_ranks(header)
        return found

    def _find_halves(self, name: str, layout: LoraLayout) -> None:
        """Take back the records of checkpoints that lack modules which this one, of the same training, has."""
        names = {module.name for module in layout.modules}
        records = {record.checkpoint: record for record in self.memory.records}
        for other, ranks in self._scored_networks(name).items():
            if missing := sorted(names - ranks.keys()):
                path = self.place.file(other)
                error = half_network(path, missing, f"of the {len(names)} modules of {name}, of the same trial")
                self.memory.put(given_up(records[other], error.code, error.reason))
                log_change(_log, "quarantined", checkpoint=other, code=error.code, reason=error.reason)

    # ------------------------------------------------------------------------------------------------------- helpers

    def _stop_if_asked(self) -> None:
        if self._service.stopping:
            raise Stopped(signal.SIGTERM)

    def _descriptions(self, checkpoint: Checkpoint) -> list[str]:
        return descriptions(self.job, AppliedLora.of(checkpoint, self.job.plan.lora_scale))

    def _is_recorded(self, record: CheckpointRecord) -> bool:
        return record.status == "recorded" and self.memory.has_results(record)

    def _say_recorded(self, record: CheckpointRecord, metrics: Metrics) -> None:
        log_change(
            _log,
            "checkpoint recorded",
            checkpoint=record.checkpoint,
            epoch=metrics.epoch,
            brightness=metrics.metrics["brightness"].value,
            contrast=metrics.metrics["contrast"].value,
            saturation=metrics.metrics["saturation"].value,
            score=metrics.scores[self.job.plan.scoring.objective].value,
            feasible=metrics.gate.feasible,
            seconds=metrics.seconds.total,
        )

"""One trial's evaluator: admit -> render -> measure -> record, checkpoint after checkpoint, until the trial is over.

Every attempt is written down before it starts, so that whatever kills this process is known to the next one.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from evaluator_daemon.folder import look_at, max_train_epochs
from evaluator_daemon.job import Job
from evaluator_daemon.measuring import gate_of, measure, scores_of
from evaluator_daemon.metrics import METRICS
from evaluator_daemon.metrics.base import MetricSource, RenderedSet
from evaluator_daemon.recording import Memory, changed, now, quarantined, read_pictures, write_pictures
from evaluator_daemon.reference import Reference, find_reference, samples_of
from evaluator_daemon.renderers import RENDERERS
from evaluator_daemon.renderers.base import Renderer
from evaluator_daemon.sweep import TrialView, WeightFile, is_over, is_truncated, open_files
from evaluator_daemon.watcher import FolderWatch
from shared.errors import IncompleteCheckpointError, LabError, RefusedCheckpointError, ResourceError, Stopped
from shared.failpoints import reach
from shared.files import read_model, write_model
from shared.layout import TRIAL_STATE, TrialLayout, checkpoint_epoch
from shared.locks import FileLock
from shared.logs import log_change
from shared.safetensors_file import Checkpoint, LoraLayout, Stamp, is_stable, lora_modules, read_checkpoint
from shared.schemas import Attempt, CheckpointRecord, Metrics, PhaseSeconds
from shared.service import Service

SETTLE_S = 0.25
"""Between the two looks that must show the same file; longer than local file systems' clock ticks."""
LOCK_TIMEOUT_S = 10.0
WAKING_NAMES = ("*.safetensors", TRIAL_STATE)
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)

_log = logging.getLogger(__name__)


def evaluate_trial(
    job: Job,
    trial_folder: Path,
    *,
    watch: bool,
    changed_state: Callable[[], None] = lambda: None,
    previous_exit: int | None = None,
) -> None:
    """Evaluate a trial's checkpoints; the work of one evaluator process.

    Args:
        watch: go on until the trial is over; otherwise end when all that is there is done.
        changed_state: called after every change of the trial's evaluation_state.json.
        previous_exit: how the trial's previous evaluator ended, as multiprocessing says it; None when unknown.
    Raises:
        AlreadyRunningError: another evaluator is at this trial.
        StudyMismatchError, ResourceError: nothing can be evaluated now.
        Stopped: a signal asked for it; the checkpoint in hand is recorded as interrupted.
    """
    trial = TrialLayout(trial_folder.resolve())
    trial.evaluations.folder.mkdir(exist_ok=True)
    lock = FileLock(trial.evaluations.lock)
    if not lock.try_acquire(LOCK_TIMEOUT_S):
        lock.acquire()
    with contextlib.ExitStack() as held:
        held.callback(lock.release)
        service = Service()
        evaluator = Evaluator(job, trial, service, changed_state)
        evaluator.close_unfinished(previous_exit)
        if watch:
            folder_watch = FolderWatch(trial.folder, WAKING_NAMES, service.wake)
            held.callback(folder_watch.close)
            if folder_watch.blind_because:
                log_change(_log, "no events here", why=folder_watch.blind_because, interval_s=job.check_interval_s)
        service.run(lambda: evaluator.tick(watch=watch), job.check_interval_s)


class Evaluator:
    """Works through one trial's folder; the model is loaded for the first checkpoint and stays."""

    def __init__(self, job: Job, trial: TrialLayout, service: Service, changed_state: Callable[[], None]) -> None:
        self.job = job
        self.trial = trial
        self.plan_hash = job.plan.digest()
        self.memory = Memory(trial.name, trial.evaluations, self.plan_hash)
        self._service = service
        self._changed_state = changed_state
        self._renderer: Renderer | None = None
        self._sources: list[MetricSource] = []
        self._reference: Reference | None = None
        self._waiting: dict[str, str] = {}

    def close_unfinished(self, previous_exit: int | None) -> None:
        """Tell strikes from interruptions among the attempts that an earlier process left running."""
        for record in self.memory.close_unfinished(crash_text(previous_exit)):
            last = record.attempts[-1]
            log_change(_log, last.outcome, checkpoint=record.checkpoint, reason=last.reason)

    def tick(self, *, watch: bool) -> None:
        """Evaluate everything that is there, looking at the folder again after each; end the service when done."""
        looked_at: set[str] = set()
        while not self._service.stopping:
            view = look_at(self.trial, self.memory.records, self.plan_hash, time.time())
            todo = [file for file in open_files(view) if file.name not in looked_at]
            if not todo:
                if not watch or (is_over(view, self.job.idle_timeout_s) and not open_files(view)):
                    self._service.stop()
                return
            with contextlib.suppress(Stopped):  # the service ends by the signal that asked for it
                if not self.evaluate(todo[0], view):
                    looked_at.add(todo[0].name)
            self._changed_state()

    def evaluate(self, file: WeightFile, view: TrialView) -> bool:
        """Take one weight file through all steps; False when only time can help it."""
        path = self.trial.folder / f"{file.name}.safetensors"
        try:
            checkpoint, layout = admit(path, self.trial.folder)
        except IncompleteCheckpointError as error:
            if is_truncated(file, view):
                self._settle(file, "truncated", error.code, error.reason)
                return True
            if self._waiting.get(file.name) != error.code:
                self._waiting[file.name] = error.code
                log_change(_log, "checkpoint waits", checkpoint=file.name, code=error.code, reason=error.reason)
            return False
        except RefusedCheckpointError as error:
            self._settle(file, "quarantined", error.code, error.reason)
            return True
        return self._score(file, checkpoint, layout)

    # ------------------------------------------------------------------------------------------------------ one file

    def _score(self, file: WeightFile, checkpoint: Checkpoint, layout: LoraLayout) -> bool:
        reach("evaluator.admitted")
        known = self.memory.record_of(file.name, checkpoint.sha256)
        size, modified_ns = checkpoint.stamp.size, checkpoint.stamp.mtime_ns
        if known is not None and (known.status == "quarantined" or self._is_recorded(known)):
            self.memory.put(changed(known, size=size, modified_ns=modified_ns))  # only touched: same content
            self.memory.write_summary()
            return True
        record = CheckpointRecord(
            checkpoint=file.name,
            checkpoint_sha256=checkpoint.sha256,
            plan_hash=self.plan_hash,
            epoch=self._epoch(checkpoint),
            attempts=known.attempts if known and known.status == "waiting" else (),
            status="waiting",
            size=size,
            modified_ns=modified_ns,
        )
        twin = self.memory.twin_of(file.name, checkpoint.sha256)
        if twin is not None and self._is_recorded(twin):
            self._copy_twin(record, twin)
            return True
        return self._attempt(record, checkpoint, layout)

    def _attempt(self, record: CheckpointRecord, checkpoint: Checkpoint, layout: LoraLayout) -> bool:
        attempts = (*record.attempts, Attempt(started=now(), outcome="running"))
        record = changed(record, status="evaluating", attempts=attempts)
        self.memory.put(record)
        reach("evaluator.attempt_written")
        self._changed_state()
        try:
            metrics = self._measured(record, checkpoint, layout)
        except RefusedCheckpointError as error:
            ended = self.memory.end_attempt(record, "strike", error.reason)
            self.memory.put(quarantined(changed(ended, status="waiting", quarantine=None), error.code, error.reason))
            self.memory.write_summary()
            log_change(_log, "quarantined", checkpoint=record.checkpoint, code=error.code, reason=error.reason)
            return True
        except LabError as error:  # a stop, or something the checkpoint is not to blame for
            self.memory.end_attempt(record, "interruption", str(error))
            log_change(_log, "interruption", checkpoint=record.checkpoint, reason=error)
            raise
        except Exception as error:
            self.memory.end_attempt(record, "strike", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
            self.memory.write_summary()
            _log.exception("strike checkpoint=%s", record.checkpoint)
            if self.job.device != "cpu":
                raise  # a failed kernel leaves the CUDA context unusable: the next attempt needs a new process
            return True  # tried again after the others, three times at most
        ended = self.memory.end_attempt(record, "recorded")
        reach("evaluator.recorded")
        self.memory.write_summary()
        self._say_recorded(ended, metrics)
        return True

    def _measured(self, record: CheckpointRecord, checkpoint: Checkpoint, layout: LoraLayout) -> Metrics:
        """Render, measure and write one checkpoint's folder, metrics.json last."""
        with self._gpu():
            renderer = self._ready()
            assert self._reference is not None
            begin = time.monotonic()
            with renderer.lora(checkpoint, layout):
                loaded = time.monotonic()
                rendering = renderer.render(self._stop_if_asked)
            rendered_at = time.monotonic()
            prompts = [sample.prompt for sample in samples_of(self.job)]
            rendered = RenderedSet(rendering.pictures, prompts, self._reference.pictures)
            figures = measure(self._sources, rendered)
        end = time.monotonic()
        reach("evaluator.rendered")
        metrics = Metrics(
            trial_name=self.trial.name,
            checkpoint=record.checkpoint,
            checkpoint_sha256=record.checkpoint_sha256,
            plan_hash=self.plan_hash,
            epoch=record.epoch,
            evaluation_time=now(),
            samples=samples_of(self.job),
            metrics=figures,
            scores=scores_of(figures, self.job.plan),
            gate=gate_of(rendered, figures, self._reference.metrics.metrics, self.job.plan),
            seconds=PhaseSeconds(
                load=loaded - begin, render=rendered_at - loaded, measure=end - rendered_at, total=end - begin
            ),
            batch_size=rendering.batch_size,
            device=renderer.device_name,
            library_versions=renderer.versions,
        )
        folder = self.trial.evaluations.checkpoint(record.checkpoint)
        write_pictures(folder, rendering.pictures)
        reach("evaluator.pictures_written")
        write_model(folder.metrics, metrics)
        reach("evaluator.metrics_written")
        return metrics

    def _copy_twin(self, record: CheckpointRecord, twin: CheckpointRecord) -> None:
        """Record equal content under its second name without rendering it again."""
        source = self.trial.evaluations.checkpoint(twin.checkpoint)
        metrics = Metrics.model_validate(
            {**dict(read_model(source.metrics, Metrics)), "checkpoint": record.checkpoint, "epoch": record.epoch}
        )
        folder = self.trial.evaluations.checkpoint(record.checkpoint)
        write_pictures(folder, read_pictures(source, len(metrics.samples)))
        write_model(folder.metrics, metrics)
        record = changed(record, status="recorded", same_as=twin.checkpoint)
        self.memory.put(record)
        self.memory.write_summary()
        self._say_recorded(record, metrics)

    def _settle(self, file: WeightFile, status: str, code: str, reason: str) -> None:
        """Write down a verdict on a file that is not worth an attempt."""
        record = CheckpointRecord(
            checkpoint=file.name,
            checkpoint_sha256=None,
            plan_hash=self.plan_hash,
            epoch=file.epoch,
            size=file.size,
            modified_ns=file.modified_ns,
            status="waiting",
        )
        settled = changed(record, status="truncated") if status == "truncated" else quarantined(record, code, reason)
        self.memory.put(settled)
        self.memory.write_summary()
        log_change(_log, status, checkpoint=file.name, code=code, reason=reason)

    # ------------------------------------------------------------------------------------------------------- helpers

    def _ready(self) -> Renderer:
        """Load what rendering and measuring need, once."""
        if self._renderer is None:
            self._renderer = RENDERERS.load("diffusion")(self.job)
            self._sources = [METRICS.load(name)(self.job) for name in METRICS.names]
        if self._reference is None:
            self._reference = find_reference(self.job, self._renderer, self._sources, self._stop_if_asked)
        return self._renderer

    @contextlib.contextmanager
    def _gpu(self) -> Iterator[None]:
        """Hold the GPU against other evaluators; a CPU needs no turn."""
        if self.job.device == "cpu":
            yield
            return
        from evaluator_daemon.renderers.diffusion import gpu_lease

        lease = gpu_lease(self.job.device)
        while True:
            try:
                lease.acquire(timeout_s=1.0)
                break
            except ResourceError:
                self._stop_if_asked()
        try:
            yield
        finally:
            lease.release()

    def _stop_if_asked(self) -> None:
        if self._service.stopping:
            raise Stopped(signal.SIGTERM)

    def _is_recorded(self, record: CheckpointRecord) -> bool:
        return record.status == "recorded" and self.memory.has_results(record)

    def _epoch(self, checkpoint: Checkpoint) -> int | None:
        return checkpoint_epoch(
            checkpoint.path.name, checkpoint.epoch, max_train_epochs(self.trial), self.trial.output_name
        )

    def _say_recorded(self, record: CheckpointRecord, metrics: Metrics) -> None:
        log_change(
            _log,
            "checkpoint recorded",
            checkpoint=record.checkpoint,
            epoch=metrics.epoch,
            brightness=metrics.metrics["brightness"].value,
            contrast=metrics.metrics["contrast"].value,
            saturation=metrics.metrics["saturation"].value,
            score=metrics.scores["combined_score"].value,
            feasible=metrics.gate.feasible,
            seconds=metrics.seconds.total,
        )


def admit(path: Path, trial_folder: Path) -> tuple[Checkpoint, LoraLayout]:
    """Prove that a weight file is whole, still, finite and a LoRA; acceptance and refusal alike need two equal looks.

    Raises:
        IncompleteCheckpointError: not yet, look again later.
        RefusedCheckpointError: never as it is.
    """
    try:
        first = Stamp.of(path.lstat())
        time.sleep(SETTLE_S)
        try:
            checkpoint = read_checkpoint(path, trial_folder)
            layout = lora_modules(checkpoint)
        except RefusedCheckpointError:
            if is_stable(first, Stamp.of(path.lstat())):
                raise
        else:
            if is_stable(first, checkpoint.stamp):
                return checkpoint, layout
    except FileNotFoundError as error:
        raise IncompleteCheckpointError(path, "vanished", "is no longer there") from error
    raise IncompleteCheckpointError(path, "changing", "changed between two looks; it is looked at again later")


def crash_text(exit_code: int | None) -> str | None:
    """Say how a process ended by its own fault; None when it was stopped, ended well or nobody knows."""
    if exit_code is None or exit_code in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM):
        return None
    if exit_code > 0:
        return f"the evaluator ended with exit status {exit_code}"
    return f"the evaluator crashed by {signal.Signals(-exit_code).name}" if -exit_code in _CRASHES else None

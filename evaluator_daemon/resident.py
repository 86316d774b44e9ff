"""What an evaluator process keeps between checkpoints: model, metrics, and the base model's pictures; on one device.

Loaded for the first checkpoint, so that a process that only waits costs little.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from evaluator_daemon.admission import half_network
from evaluator_daemon.gpu import DeviceGate, free_everything
from evaluator_daemon.gpu_policy import QUEUE_PAUSE_S, pause_s
from evaluator_daemon.job import Job
from evaluator_daemon.measuring import gate_of, measure, scores_of
from evaluator_daemon.metrics import load_metrics
from evaluator_daemon.metrics.base import MetricSource, Picture, RenderedSet, drop_networks
from evaluator_daemon.recording import now
from evaluator_daemon.reference import Reference, find_reference, samples_of
from evaluator_daemon.renderers import RENDERERS
from evaluator_daemon.renderers.base import Renderer, is_out_of_memory
from shared.errors import DeviceBusyError, DeviceMemoryError, DiskError, ResourceError
from shared.logs import log_change
from shared.safetensors_file import Checkpoint, LoraLayout
from shared.schemas import Metrics, PhaseSeconds

_LOOK_S = 0.5
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judgement:
    """Everything about one checkpoint, before anything is written."""

    pictures: list[Picture]
    metrics: Metrics


class ResidentModel:
    """Renders and measures one admitted checkpoint after the other.

    Args:
        job: the plan, the models' folders and the device.
        stop_if_asked: raises Stopped when this process is to end; called at every sampling step.
    """

    def __init__(self, job: Job, stop_if_asked: Callable[[], None]) -> None:
        self._job = job
        self._plan_hash = job.plan.digest()
        self._stop_if_asked = stop_if_asked
        self._renderer: Renderer | None = None
        self._sources: list[MetricSource] = []
        self._reference: Reference | None = None
        self._gate = DeviceGate(job, self.give_back, stop_if_asked)
        self._has_turn = False

    def held_back(self) -> str | None:
        """Say which training the study's policy has us wait for; None when there is none."""
        return self._gate.held_back()

    @contextlib.contextmanager
    def turn(self, *, patient: bool = False) -> Iterator[None]:
        """Have the device for one checkpoint; one inside another is the same turn.

        Args:
            patient: wait until it comes.
        Raises:
            DeviceBusyError: others need the device or its memory now; ours has been given back.
            ResourceError: the device is not there.
            Stopped: by `stop_if_asked`, while waiting.
        """
        if self._has_turn:
            yield
            return
        self._enter(patient=patient)
        self._has_turn = True
        try:
            yield
        finally:
            self._has_turn = False
            self._gate.leave()

    def give_back(self) -> None:
        """Free the device's memory; the next checkpoint loads the model again. The base model's pictures stay."""
        if self._renderer is not None:
            self._drop()

    def rest(self, *, over: bool = False) -> None:
        """Nothing is left to do for now: under `defer`, and where memory is short, it is the training's until there is.

        Args:
            over: nor will there be anything later.
        """
        if self._gate.is_gpu and self._renderer is not None and (over or not self._gate.may_keep_model()):
            self._drop()

    def pause_s(self, deferrals: int) -> float:
        """How long to leave the device alone after it was refused the n-th time in a row, n counted from 0."""
        return QUEUE_PAUSE_S if self._gate.queues else pause_s(deferrals)

    def _drop(self) -> None:
        self._renderer, self._sources = None, []
        drop_networks()
        free_everything(self._job.device)

    def make_ready(self) -> None:
        """Load the model and the metrics, and find the base model's pictures: what fails here is no checkpoint's fault.

        Raises:
            DiskError: there is no room for the base model's pictures.
            DeviceBusyError, ResourceError, SettingsError, StudyMismatchError, Stopped: as `judge`, or a file is gone.
        """
        with self.turn(patient=True):
            self._within_memory(self._ready)

    def judge(
        self,
        checkpoint: Checkpoint,
        layout: LoraLayout,
        *,
        of: str,
        epoch: int | None,
        is_usual: bool,
    ) -> Judgement:
        """Render the plan's grid with the LoRA applied, and measure the pictures.

        Args:
            of: the trial's name, or the label of an evaluation outside any trial.
            is_usual: the file must hold every layer that a usual LoRA of the parts it touches has.
        Raises:
            RefusedCheckpointError: it does not fit the base model, or not all of it was applied.
            DeviceBusyError: memory ran out, even for half a batch, while others had some of it.
            ResourceError: the device is too small for it.
            StudyMismatchError: this machine renders other pictures than the study's.
            Stopped: by `stop_if_asked`.
        """
        with self.turn(patient=True):
            judgement = self._within_memory(
                lambda: self._judge(checkpoint, layout, of=of, epoch=epoch, is_usual=is_usual)
            )
            self._gate.note_success()
            return judgement

    def _within_memory(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except Exception as error:
            if not isinstance(error, DeviceMemoryError) and not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0] or "memory ran out"
        self._drop()  # outside the except: the traceback holds the tensors, of a model half loaded too
        raise self._gate.after_running_out(reason)

    def _judge(
        self, checkpoint: Checkpoint, layout: LoraLayout, *, of: str, epoch: int | None, is_usual: bool
    ) -> Judgement:
        renderer, reference = self._ready()
        if is_usual and (missing := renderer.left_out(layout)):
            raise half_network(checkpoint.path, sorted(missing), "of the layers that networks.lora adapts")
        begin = time.monotonic()
        with renderer.lora(checkpoint, layout):
            loaded = time.monotonic()
            rendering = renderer.render(self._stop_if_asked)
        rendered_at = time.monotonic()
        prompts = [sample.prompt for sample in samples_of(self._job)]
        rendered = RenderedSet(rendering.pictures, prompts, reference.pictures)
        figures = measure(self._sources, rendered)
        end = time.monotonic()
        metrics = Metrics(
            trial_name=of,
            checkpoint=checkpoint.path.stem,
            checkpoint_sha256=checkpoint.sha256,
            plan_hash=self._plan_hash,
            epoch=epoch,
            evaluation_time=now(),
            samples=samples_of(self._job),
            metrics=figures,
            scores=scores_of(figures, self._job.plan),
            gate=gate_of(rendered, figures, reference.metrics.metrics, self._job.plan),
            seconds=PhaseSeconds(
                load=loaded - begin, render=rendered_at - loaded, measure=end - rendered_at, total=end - begin
            ),
            batch_size=rendering.batch_size,
            device=renderer.device_name,
            library_versions=renderer.versions,
        )
        return Judgement(rendering.pictures, metrics)

    def base(self) -> Reference:
        """Return the base model's own pictures and figures on the plan's grid.

        Raises:
            DeviceBusyError, ResourceError, StudyMismatchError, Stopped: as `judge`.
        """
        with self.turn(patient=True):
            return self._within_memory(self._ready)[1]

    def _enter(self, *, patient: bool) -> None:
        deferrals = 0
        while True:
            try:
                return self._gate.enter()
            except DeviceBusyError as error:
                if not patient:
                    raise
                if deferrals == 0:
                    log_change(_log, "deferred", reason=error)
            until = time.monotonic() + self.pause_s(deferrals)
            deferrals += 1
            while time.monotonic() < until:
                self._stop_if_asked()
                time.sleep(_LOOK_S)

    def _ready(self) -> tuple[Renderer, Reference]:
        """Load what rendering and measuring need, once."""
        try:
            if self._renderer is None:
                renderer = RENDERERS.load("diffusion")(self._job)
                self._sources = load_metrics(self._job)
                self._renderer = renderer
            if self._reference is None:
                self._reference = find_reference(self._job, self._renderer, self._sources, self._stop_if_asked)
        except OSError as error:
            raise _fault_of_the_machine(error, self._job.base_model) from error
        return self._renderer, self._reference


def _fault_of_the_machine(error: OSError, folder: Path) -> ResourceError:
    """Return what an error while files are read or made means: it may be over later."""
    path = Path(error.filename) if error.filename else folder
    if error.errno in _DISK:
        return DiskError(path, error)
    return ResourceError(f"{path}: {error.strerror or error}; put it back or make it readable, evaluations go on then")

"""What an evaluator process keeps between checkpoints: model, metrics, and the base model's pictures; on one device.

Loaded for the first checkpoint, so that a process that only waits costs little.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from evaluator_daemon.admission import half_network
from evaluator_daemon.job import Job
from evaluator_daemon.measuring import gate_of, measure, scores_of
from evaluator_daemon.metrics import METRICS
from evaluator_daemon.metrics.base import MetricSource, Picture, RenderedSet
from evaluator_daemon.recording import now
from evaluator_daemon.reference import Reference, find_reference, samples_of
from evaluator_daemon.renderers import RENDERERS
from evaluator_daemon.renderers.base import Renderer
from shared.errors import ResourceError
from shared.safetensors_file import Checkpoint, LoraLayout
from shared.schemas import Metrics, PhaseSeconds
from shared.scoring_presets import metrics_of


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
            ResourceError: the device has no room for it now.
            StudyMismatchError: this machine renders other pictures than the study's.
            Stopped: by `stop_if_asked`.
        """
        with self._gpu():
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
            ResourceError, StudyMismatchError, Stopped: as `judge`.
        """
        with self._gpu():
            return self._ready()[1]

    def _ready(self) -> tuple[Renderer, Reference]:
        """Load what rendering and measuring need, once."""
        if self._renderer is None:
            self._renderer = RENDERERS.load("diffusion")(self._job)
            self._sources = [METRICS.load(name)(self._job) for name in metrics_of(self._job.plan)]
        if self._reference is None:
            self._reference = find_reference(self._job, self._renderer, self._sources, self._stop_if_asked)
        return self._renderer, self._reference

    @contextlib.contextmanager
    def _gpu(self) -> Iterator[None]:
        """Hold the GPU against other evaluators; a CPU needs no turn."""
        if self._job.device == "cpu":
            yield
            return
        from evaluator_daemon.renderers.diffusion import gpu_lease

        lease = gpu_lease(self._job.device)
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

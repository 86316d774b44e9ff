"""The base model's own pictures and figures on the plan's grid: rendered once per study, the yardstick of the gate."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from evaluator_daemon.folder import read_or_none
from evaluator_daemon.job import Job
from evaluator_daemon.measuring import gate_of, measure, scores_of
from evaluator_daemon.metrics.base import MetricSource, Picture, RenderedSet
from evaluator_daemon.pictures import descriptions, read_pictures, write_pictures
from evaluator_daemon.recording import now
from evaluator_daemon.renderers.base import OnStep, Renderer
from shared.errors import DiskError, StudyMismatchError
from shared.files import write_model
from shared.layout import RenderLayout, StudyLayout
from shared.locks import FileLock
from shared.logs import log_change
from shared.schemas import Metrics, PhaseSeconds, Sample

BASE = "base"
MAX_DRIFT = 2
"""How far (of 255) a picture rendered again may be from the recorded one."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """The base model's pictures and their metrics."""

    pictures: list[Picture]
    metrics: Metrics


def find_reference(job: Job, renderer: Renderer, sources: Sequence[MetricSource], on_step: OnStep) -> Reference:
    """Return the recorded reference, made by whichever evaluator comes first; others wait for it.

    Raises:
        DiskError: the study's reference folder cannot be made.
        StudyMismatchError: the recorded one came from other libraries or another device, and rendering it again gives
            other pictures, so new scores would not be comparable.
    """
    study = StudyLayout(job.root)
    try:
        study.reference.mkdir(exist_ok=True)
    except OSError as error:
        raise DiskError(study.reference, error) from error
    lock = FileLock(study.reference / ".lock")
    while not lock.try_acquire(timeout_s=0.5):
        on_step()
    try:
        layout = study.base_render(job.plan.digest())
        known = _read(layout, job)
        if known is None:
            return _make(layout, job, renderer, sources, on_step)
        if (known.metrics.library_versions, known.metrics.device) != (renderer.versions, renderer.device_name):
            _require_same_pictures(known, renderer, on_step)
        return known
    finally:
        lock.release()


def samples_of(job: Job) -> tuple[Sample, ...]:
    """The plan's samples as metrics.json lists them."""
    grid = [job.plan.sample(index) for index in range(job.plan.num_samples)]
    return tuple(Sample(file=f"sample_{index}.png", **asdict(sample)) for index, sample in enumerate(grid))


def _read(layout: RenderLayout, job: Job) -> Reference | None:
    metrics = read_or_none(layout.metrics, Metrics)
    if metrics is None or metrics.plan_hash != job.plan.digest():
        return None
    try:
        return Reference(read_pictures(layout, job.plan.num_samples), metrics)
    except OSError:
        return None


def _make(
    layout: RenderLayout, job: Job, renderer: Renderer, sources: Sequence[MetricSource], on_step: OnStep
) -> Reference:
    begin = time.monotonic()
    rendering = renderer.render(on_step)
    rendered_at = time.monotonic()
    rendered = RenderedSet(rendering.pictures, [sample.prompt for sample in samples_of(job)], base=None)
    measured = measure(sources, rendered)
    end = time.monotonic()
    metrics = Metrics(
        trial_name="reference",
        checkpoint=BASE,
        checkpoint_sha256=None,
        plan_hash=job.plan.digest(),
        epoch=None,
        evaluation_time=now(),
        samples=samples_of(job),
        metrics=measured,
        scores=scores_of(measured, job.plan),
        gate=gate_of(rendered, measured, None, job.plan),
        seconds=PhaseSeconds(load=0.0, render=rendered_at - begin, measure=end - rendered_at, total=end - begin),
        batch_size=rendering.batch_size,
        device=renderer.device_name,
        library_versions=renderer.versions,
    )
    write_pictures(layout, rendering.pictures, descriptions(job, None))
    write_model(layout.metrics, metrics)
    log_change(
        _log,
        "base model rendered",
        score=metrics.scores[job.plan.scoring.objective].value,
        seconds=metrics.seconds.total,
    )
    return Reference(rendering.pictures, metrics)


def _require_same_pictures(known: Reference, renderer: Renderer, on_step: OnStep) -> None:
    again = renderer.render(on_step).pictures[0].astype(np.int16)
    drift = int(np.abs(again - known.pictures[0].astype(np.int16)).max())
    if drift > MAX_DRIFT:
        raise StudyMismatchError(
            f"the base model's first sample differs by {drift}/255 from the recorded one, made on "
            f"{known.metrics.device} with {known.metrics.library_versions}; use that device and those versions, "
            "or start a new study"
        )

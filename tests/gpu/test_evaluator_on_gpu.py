"""The evaluator on a real card: fp16 pictures, the lease, the memory gate, halving, memory given back."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from evaluator_daemon import gpu
from evaluator_daemon.evaluator import Evaluator
from evaluator_daemon.job import Job
from evaluator_daemon.places import TrialPlace
from evaluator_daemon.renderers.diffusion import DiffusionRenderer
from shared.devices import gpu_model, gpu_uuid
from shared.errors import DeviceBusyError, DeviceMemoryError
from shared.files import read_model
from shared.gpu_lease import GpuLease
from shared.layout import StudyLayout, TrialLayout
from shared.schemas import EvaluationState, Metrics
from shared.service import Service
from tests.scenarios.lora_files import lora

MIB = 2**20


@contextmanager
def taken(leave_free: int) -> Iterator[None]:
    """Another process fills the card with one big tensor until only this many bytes are free."""
    torch.cuda.empty_cache()
    torch.cuda.mem_get_info()  # our own context comes first
    script = (
        "import torch; torch.cuda.mem_get_info(); free, _ = torch.cuda.mem_get_info(); "
        f"block = torch.empty(free - {leave_free}, dtype=torch.uint8, device='cuda'); "
        "print('ready', flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        yield
    finally:
        other.kill()
        other.communicate()


@contextmanager
def limited_to(more: int) -> Iterator[None]:
    """Let this process have no more than it holds now and this many bytes."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + more) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture
def trial(job) -> TrialLayout:
    trial = StudyLayout(job.root).trial(1)
    trial.folder.mkdir()
    trial.final_checkpoint.write_bytes(lora(1))
    trial.evaluations.folder.mkdir()
    return trial


def test_fp16_pictures_of_the_tiny_world_are_those_of_the_cpu_but_for_rounding(job, plan):
    on_card = DiffusionRenderer(job).render(lambda: None)
    assert on_card.batch_size == 8
    precise = plan.model_copy(update={"dtype": "float32"})
    on_cpu = DiffusionRenderer(Job(job.root, precise, job.base_model, None, "cpu", 4, 1.0, 900.0)).render(lambda: None)
    for one, other in zip(on_card.pictures, on_cpu.pictures, strict=True):
        difference = np.abs(one.astype(int) - other.astype(int))
        assert one.std() > 5, "no flat or black picture"
        assert difference.mean() < 4


def test_the_same_pictures_come_again(job):
    renderer = DiffusionRenderer(job)
    one, two = (np.stack(renderer.render(lambda: None).pictures) for _ in range(2))
    assert np.abs(one.astype(int) - two.astype(int)).max() <= 2


def test_the_driver_and_torch_name_the_card_alike():
    assert gpu_uuid("cuda") == f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    assert gpu_model("cuda") == torch.cuda.get_device_name(0)
    assert gpu_uuid("cpu") is None


def test_the_lease_is_held_during_the_turn_only(job, trial):
    model = Evaluator(job, TrialPlace(trial), Service(), lambda: None).model
    with model.turn(), pytest.raises(DeviceBusyError):
        GpuLease(str(gpu_uuid("cuda")), "evaluator").acquire()
    with GpuLease(str(gpu_uuid("cuda")), "exclusive trainer"), pytest.raises(DeviceBusyError), model.turn():
        pass


def test_a_checkpoint_is_scored_in_fp16_and_the_memory_is_given_back(job, trial):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    Evaluator(job, TrialPlace(trial), Service(), lambda: None).tick(watch=False)
    (record,) = read_model(trial.evaluations.state, EvaluationState).checkpoints
    assert record.status == "recorded"
    metrics = read_model(trial.evaluations.checkpoint(record.checkpoint).metrics, Metrics)
    assert metrics.device == torch.cuda.get_device_name(0)
    assert metrics.gate.checks["sentinels"].passed
    assert torch.cuda.memory_reserved() <= before + 2 * MIB, "nothing was left to do"


def test_the_gate_defers_while_a_big_tensor_has_the_memory_and_opens_after_it(job, trial):
    said: list[str] = []
    evaluator = Evaluator(
        job, TrialPlace(trial), Service(), lambda: said.append("news"), lambda: said.append("deferred")
    )
    with taken(leave_free=16 * MIB):
        evaluator.tick(watch=False)
    assert said == ["deferred"]
    assert not trial.evaluations.state.exists(), "not even an attempt"
    evaluator._resume_at = 0.0
    evaluator.tick(watch=False)
    (record,) = read_model(trial.evaluations.state, EvaluationState).checkpoints
    assert [attempt.outcome for attempt in record.attempts] == ["recorded"]


def test_memory_that_runs_out_halves_the_batch_once(job):
    renderer = DiffusionRenderer(job)
    peaks = {}
    for batch_size in (8, 4):
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        renderer._render_all(batch_size, lambda: None)
        peaks[batch_size] = torch.cuda.max_memory_reserved() - held
    torch.cuda.empty_cache()
    assert peaks[4] < peaks[8]
    with limited_to((peaks[4] + peaks[8]) // 2):
        assert renderer.render(lambda: None).batch_size == 4
    torch.cuda.empty_cache()
    with limited_to(min(2 * MIB, peaks[4] // 2)), pytest.raises(DeviceMemoryError, match="too little memory for 4"):
        renderer.render(lambda: None)
    torch.cuda.empty_cache()
    assert renderer.render(lambda: None).batch_size == 8, "it is as good as new"


def test_giving_back_leaves_nothing_but_the_context(job, trial):
    model = Evaluator(job, TrialPlace(trial), Service(), lambda: None).model
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with model.turn():
        model._ready()
        assert torch.cuda.memory_allocated() > before
    model.give_back()
    assert torch.cuda.memory_allocated() <= before + MIB
    assert torch.cuda.memory_reserved() <= before + 2 * MIB


def test_the_estimate_is_no_less_than_half_and_no_more_than_ten_times_what_is_used(job, trial):
    model = Evaluator(job, TrialPlace(trial), Service(), lambda: None).model
    with model.turn():
        model._ready()[0].render(lambda: None)
        used = torch.cuda.max_memory_reserved()
    assert used / 2 <= model._gate._needed() <= 10 * used + 64 * MIB


def test_weights_take_what_their_headers_say(job):
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    renderer = DiffusionRenderer(job)
    taken_now = torch.cuda.memory_allocated() - before
    assert taken_now == pytest.approx(gpu.weight_bytes(job.base_model, "float16"), rel=0.3, abs=2 * MIB)
    del renderer

"""Evaluations that have to wait: for a training under `defer`, and for memory; no checkpoint is blamed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from evaluator_daemon import resident
from evaluator_daemon.evaluator import Evaluator
from evaluator_daemon.gpu import DeviceGate
from evaluator_daemon.job import Job
from evaluator_daemon.places import TrialPlace
from evaluator_daemon.renderers.diffusion import DiffusionRenderer
from shared.errors import DeviceBusyError
from shared.files import read_model
from shared.layout import StudyLayout, TrialLayout
from shared.locks import FileLock
from shared.logs import LineFormatter
from shared.planning import make_plan
from shared.schemas import EvaluationState, EvaluatorManagerState, Metrics
from shared.service import Service
from tests.evaluator_daemon.tiny_models import PROMPTS, lora_bytes

PATIENCE_S = 240.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def trial(tmp_path) -> TrialLayout:
    trial = StudyLayout(tmp_path / "study").trial(5)
    trial.folder.mkdir(parents=True)
    trial.intermediate_checkpoint(2).write_bytes(lora_bytes(1))
    return trial


def job_of(base_model, trial: TrialLayout, **plan) -> Job:
    made = make_plan(base_model=base_model, prompts=PROMPTS, device="cpu", num_samples=2, steps=2)
    return Job(trial.folder.parent, made.model_copy(update=plan), base_model, None, "cpu", 1, 1.0, 900.0)


def record_of(trial: TrialLayout):
    (record,) = read_model(trial.evaluations.state, EvaluationState).checkpoints
    return record


@pytest.mark.timeout(600)
def test_under_defer_the_real_evaluator_waits_for_any_training_of_the_study(base_model, trial, tmp_path):
    study = StudyLayout(trial.folder.parent)
    other = study.trial(6)
    other.folder.mkdir()
    prompts = tmp_path / "prompts.toml"
    prompts.write_text('[prompt]\nsample_steps = 2\n[[prompt.subset]]\nprompt = "a red ball"\nwidth = 24\nseed = 7\n')

    def view() -> EvaluatorManagerState:
        return read_model(study.manager_state, EvaluatorManagerState)

    training = FileLock(other.trainer_lock).acquire()  # what lives holds it, here this process
    command = [sys.executable, "-m", "evaluator_daemon.cli", "run", "--optimization-dir", study.root, "--device", "cpu",
               "--base-model", base_model, "--prompts", prompts, "--num-samples", "2", "--gpu-policy", "defer",
               "--check-interval", "0.5", "--idle-timeout", "1", "--once"]  # fmt: skip
    manager = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        wait_until(
            lambda: study.manager_state.exists() and [e.activity for e in view().evaluators] == ["deferred"],
            "the manager shows that it waits",
        )
        assert (view().gpu_policy, view().waiting_checkpoints) == ("defer", 1)
        time.sleep(2.5)  # it looks again every two seconds
        assert not trial.evaluations.checkpoint(trial.intermediate_checkpoint(2).stem).folder.exists()
        log = trial.evaluation_log.read_text()
        assert log.count("deferred") == 1, "said once"
        assert "trial_0006 is training" in log
        training.release()
        _, said = manager.communicate(timeout=PATIENCE_S)
    finally:
        training.release()
        manager.kill()
    assert manager.returncode == 0, said
    assert said.count("waits for the device") == 1, "whoever waits for --once is told why"
    assert said.count("--gpu-policy defer: trial_0006 is training") == 1
    assert [attempt.outcome for attempt in record_of(trial).attempts] == ["recorded"]
    assert "goes on" in trial.evaluation_log.read_text()

    folder = trial.evaluations.checkpoint(trial.intermediate_checkpoint(2).stem)
    sample = read_model(folder.metrics, Metrics).samples[1]
    assert (sample.seed, sample.width, sample.height, sample.steps) == (8, 24, 16, 2)
    for file, seed in ((folder.sample(1), 8), (folder.grid, 7)):
        with Image.open(file) as image:
            assert image.text["parameters"].startswith(f"a red ball <lora:{trial.intermediate_checkpoint(2).stem}:1>\n")
            assert f"Seed: {seed}, Size: 24x16" in image.text["parameters"]


class Ran:
    """An evaluator in this process, with what it said to the manager."""

    def __init__(self, job: Job, trial: TrialLayout) -> None:
        trial.evaluations.folder.mkdir(exist_ok=True)
        self.said: list[str] = []
        self.service = Service()
        self.evaluator = Evaluator(
            job, TrialPlace(trial), self.service, lambda: self.said.append("news"), lambda: self.said.append("deferred")
        )

    @property
    def holds_model(self) -> bool:
        return self.evaluator.model._renderer is not None


def runs_out(monkeypatch, *, times: int, from_batch: int = 1) -> list[int]:
    """Let rendering run out of memory for the first `times` batches of at least this size; return all sizes tried."""
    real, tried = DiffusionRenderer._render_all, []

    def render_all(self, batch_size, on_step):
        tried.append(batch_size)
        if batch_size >= from_batch and len(tried) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return real(self, batch_size, on_step)

    monkeypatch.setattr(DiffusionRenderer, "_render_all", render_all)
    return tried


def test_a_batch_that_does_not_fit_is_halved_once_and_that_is_recorded(base_model, trial, monkeypatch):
    ran = Ran(job_of(base_model, trial), trial)
    tried = runs_out(monkeypatch, times=99, from_batch=2)
    ran.evaluator.tick(watch=False)
    assert tried == [2, 1, 2, 1], "the base model's pictures and the checkpoint's"
    metrics = read_model(trial.evaluations.checkpoint(trial.intermediate_checkpoint(2).stem).metrics, Metrics)
    assert metrics.batch_size == 1
    assert record_of(trial).status == "recorded"


def test_memory_that_others_have_is_waited_for_without_a_strike(base_model, trial, monkeypatch, caplog):
    caplog.set_level("INFO")
    pauses = []
    monkeypatch.setattr(resident, "pause_s", lambda deferrals: pauses.append(deferrals) or 0.01)
    monkeypatch.setattr(DeviceGate, "after_running_out", lambda gate, reason: DeviceBusyError(reason))
    ran = Ran(job_of(base_model, trial), trial)
    tried = runs_out(monkeypatch, times=4)
    for turn in range(2):
        ran.evaluator.tick(watch=False)
        assert not ran.holds_model, "the memory is given back"
        assert not trial.evaluations.state.exists(), "no strike, not even an attempt"
        assert ran.said == ["deferred"], "the manager shows what it does now"
        assert not ran.service.stopping
        assert pauses == list(range(turn + 1)), "each has its pause"
        time.sleep(0.02)
    ran.evaluator.tick(watch=False)
    assert tried == [2, 1, 2, 1, 2, 2]
    assert [attempt.outcome for attempt in record_of(trial).attempts] == ["recorded"]
    (line,) = [LineFormatter().format(record) for record in caplog.records if record.message == "deferred"]
    assert "the cpu has too little memory for 1 pictures at once (CUDA out of memory. Tried to allocate" in line
    assert ran.service.stopping


def test_memory_that_runs_out_at_a_checkpoint_is_no_attempt_of_it(base_model, trial, monkeypatch):
    monkeypatch.setattr(resident, "pause_s", lambda deferrals: 0.01)
    monkeypatch.setattr(DeviceGate, "after_running_out", lambda gate, reason: DeviceBusyError(reason))
    ran = Ran(job_of(base_model, trial), trial)
    with ran.evaluator.model.turn():
        ran.evaluator.model.make_ready()
    runs_out(monkeypatch, times=2)
    ran.evaluator.tick(watch=False)
    assert not ran.holds_model, "the memory is given back"
    assert (record_of(trial).status, record_of(trial).attempts) == ("waiting", ())
    assert ran.said == ["news", "deferred"], "the manager shows what it does now"
    time.sleep(0.02)
    ran.evaluator.tick(watch=False)
    assert [attempt.outcome for attempt in record_of(trial).attempts] == ["recorded"]


def test_while_it_waits_it_does_not_look_at_the_folder_again(base_model, trial, monkeypatch):
    ran = Ran(job_of(base_model, trial), trial)
    monkeypatch.setattr(resident, "pause_s", lambda deferrals: 3600.0)
    monkeypatch.setattr(DeviceGate, "enter", lambda gate: (_ for _ in ()).throw(DeviceBusyError("a game has it")))
    ran.evaluator.tick(watch=False)
    monkeypatch.undo()
    ran.evaluator.tick(watch=False)
    assert not trial.evaluations.state.exists(), "nothing was tried"
    assert ran.said == ["deferred"]


def test_one_who_asks_for_a_single_evaluation_waits_for_its_turn(base_model, trial, monkeypatch, caplog):
    caplog.set_level("INFO")
    ran = Ran(job_of(base_model, trial), trial)
    real, refusals = DeviceGate.enter, [DeviceBusyError("a game has it")]

    def enter(gate):
        if refusals:
            raise refusals.pop()
        real(gate)

    monkeypatch.setattr(DeviceGate, "enter", enter)
    monkeypatch.setattr(resident, "pause_s", lambda deferrals: 0.01)
    model = ran.evaluator.model
    with model.turn(patient=True), model.turn():
        pass
    lines = [LineFormatter().format(record) for record in caplog.records]
    assert ['reason="a game has it"' in line for line in lines] == [True]
    refusals.append(DeviceBusyError("a game has it"))
    with pytest.raises(DeviceBusyError), model.turn():
        pass


def test_a_policy_that_contradicts_the_study_is_refused_with_both_values(base_model, tmp_path):
    from shared.files import write_model
    from tests.evaluator_daemon.test_gpu_policy import run_of

    study = StudyLayout(tmp_path)
    write_model(study.run, run_of(base_model, **{"gpu-policy": "share"}))
    done = subprocess.run(
        [sys.executable, "-m", "evaluator_daemon.cli", "run", "--optimization-dir", str(tmp_path), "--device", "cpu",
         "--gpu-policy", "defer", "--once"], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: --gpu-policy is 'defer', but the study's run.json has 'share'; leave the flag out "
        "(only `evaluate FILE --override-plan` may differ)"
    )
    assert json.loads(study.run.read_text())["settings"] == {"gpu-policy": "share"}

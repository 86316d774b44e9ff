"""When a manager with --exit-when-finished leaves a study that was finished before it came."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime

import pytest

from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.locks import FileLock
from shared.planning import make_plan
from shared.schemas import EvaluatorManagerState, Run, Trainer, TrialState

TIME = datetime(2025, 11, 15, 10, 23, 45, tzinfo=UTC)


@pytest.fixture
def study(tmp_path) -> StudyLayout:
    """A finished study of one trial, nothing left to evaluate, and so no need of a base model that renders."""
    base_model = tmp_path / "base"
    for component, config in {"unet": {"sample_size": 8}, "vae": {"block_out_channels": [4, 4]}}.items():
        (base_model / component).mkdir(parents=True)
        (base_model / component / "config.json").write_text(json.dumps(config))
        (base_model / component / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    (base_model / "model_index.json").write_text(json.dumps({"unet": ["a", "b"], "vae": ["a", "b"]}))
    study = StudyLayout(tmp_path / "study")
    study.trial(1).folder.mkdir(parents=True)
    over = TrialState(trial=1, optuna_number=0, state="complete", attempt=1, drawn=TIME, ended=TIME, value=0.1)
    write_model(study.trial(1).state, over)
    plan = make_plan(base_model=base_model, prompts=("a red ball",), device="cpu", num_samples=2, steps=2)
    run = Run(
        folder_id="f", study_name="s", storage="sqlite://", workload="sd-lora", score_source="evaluator",
        status="finished", created=TIME, updated=TIME, base_model=str(base_model), plan=plan, plan_hash=plan.digest(),
        trainer=Trainer(name="native"), settings={}, threads_per_process=1, versions={},
    )  # fmt: skip
    write_model(study.run, run)
    return study


@pytest.fixture
def manage(study) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start a manager and wait until it has looked at the study."""
    with ExitStack() as held:

        def begin() -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "evaluator_daemon.cli", "run", "--optimization-dir", str(study.root),
                       "--device", "cpu", "--check-interval", "0.2", "--exit-when-finished"]  # fmt: skip
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            held.callback(process.wait)
            held.callback(process.kill)
            deadline = time.monotonic() + 240
            while not study.manager_state.exists():
                assert process.poll() is None, "it left before it had looked"
                assert time.monotonic() < deadline
                time.sleep(0.05)
            return process

        yield begin


@pytest.mark.timeout(400)
def test_it_stays_while_an_optimizer_that_may_extend_the_study_lives_and_leaves_after_it(study, manage):
    with FileLock(study.optimizer_lock):
        manager = manage()
        time.sleep(2.0)
        assert manager.poll() is None
    assert manager.wait(60) == 0
    assert read_model(study.manager_state, EvaluatorManagerState).status == "stopped"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_it_gives_an_optimizer_that_is_started_with_it_time_to_come(study, manage):
    manager = manage()
    time.sleep(2.0)
    assert manager.poll() is None, "the optimizer needs longer than that for its imports"
    with FileLock(study.optimizer_lock):
        time.sleep(1.0)
        assert manager.poll() is None
    assert manager.wait(60) == 0

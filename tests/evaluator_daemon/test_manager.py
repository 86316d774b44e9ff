"""The real command on real folders: one walk over everything, kill -9, waiting for a study."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.locks import FileLock
from shared.planning import make_plan
from shared.schemas import (
    EvaluationState,
    EvaluationSummary,
    EvaluatorManagerState,
    Run,
    Trainer,
    TrialState,
)
from tests.evaluator_daemon.tiny_models import PROMPTS, lora_bytes

PATIENCE_S = 240.0
TIME = datetime(2025, 11, 15, 10, 23, 45, tzinfo=UTC)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "evaluator_daemon.cli", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=PATIENCE_S)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start commands that the test leaves running at most until its end."""
    started: list[subprocess.Popen] = []

    def begin(*arguments: object) -> subprocess.Popen:
        started.append(subprocess.Popen(command(*arguments), stderr=subprocess.DEVNULL))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture
def study(tmp_path) -> StudyLayout:
    """A folder as another trainer leaves it: weights in trial_* folders, nothing else."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    study = StudyLayout(tmp_path / "study")
    for number in (1, 2):
        trial = study.trial(number)
        trial.folder.mkdir(parents=True)
        trial.intermediate_checkpoint(2).write_bytes(lora_bytes(number))
        trial.final_checkpoint.write_bytes(lora_bytes(number + 10, epoch=4))
    return study


def flags(study: StudyLayout, base_model: Path, samples: int = 2) -> list[object]:
    return [
        "--optimization-dir", study.root, "--base-model", base_model, "--prompts", study.root.parent / "prompts.txt",
        "--device", "cpu", "--num-samples", samples,
    ]  # fmt: skip


def state_of(study: StudyLayout, number: int) -> EvaluationState:
    return read_model(study.trial(number).evaluations.state, EvaluationState)


def test_once_evaluates_everything_another_trainer_left_and_nothing_twice(study, base_model):
    result = run("run", *flags(study, base_model), "--once")
    assert result.returncode == 0, result.stderr
    for number in (1, 2):
        summary = read_model(study.trial(number).evaluations.summary, EvaluationSummary)
        assert list(summary.checkpoints) == [f"lora_trial_{number}-000002", f"lora_trial_{number}"]
        assert not read_model(study.trial(number).evaluations.state, EvaluationState).checkpoints[0].quarantine
        assert "checkpoint recorded" in study.trial(number).evaluation_log.read_text()
    log = study.manager_log.read_text()
    assert log.count("checkpoint recorded") == 4
    assert log.count("evaluator started") == log.count("evaluator ended") == 2
    assert "brightness=" in log
    view = read_model(study.manager_state, EvaluatorManagerState)
    assert (view.status, view.waiting_checkpoints, view.evaluators) == ("stopped", 0, ())
    assert len(list(study.reference.glob("*/sample_*.png"))) == 2, "the base model is rendered once for all trials"
    assert not study.run.exists()
    assert study.watch_script.exists(), "no optimizer was here to put it there"

    files = {path: path.stat().st_mtime_ns for path in study.root.rglob("*.png")}
    again = run("run", *flags(study, base_model), "--once")
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in study.root.rglob("*.png")} == files
    assert "evaluator started" not in study.manager_log.read_text().removeprefix(log)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["evaluator", "manager"])
def test_kill_9_in_the_middle_is_an_interruption_and_the_work_is_redone(study, base_model, start, victim):
    # a plan large enough to be met in the middle
    manager = start("run", *flags(study, base_model, samples=64))

    def evaluating() -> list[int]:
        if not study.manager_state.exists():
            return []
        view = read_model(study.manager_state, EvaluatorManagerState)
        return [evaluator.pid for evaluator in view.evaluators if evaluator.activity == "evaluating"]

    wait_until(evaluating, "an evaluator at work")
    pids = evaluating()
    os.kill(manager.pid if victim == "manager" else pids[0], signal.SIGKILL)
    if victim == "manager":
        manager.wait()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "evaluators end with their manager")
        assert not FileLock.is_held(study.manager_lock)
        manager = start("run", *flags(study, base_model, samples=64))

    def all_recorded() -> bool:
        return all(
            study.trial(n).evaluations.state.exists()
            and [r.status for r in state_of(study, n).checkpoints] == ["recorded"] * 2
            for n in (1, 2)
        )

    wait_until(all_recorded, "everything is recorded in the end")
    outcomes = [[a.outcome for a in r.attempts] for n in (1, 2) for r in state_of(study, n).checkpoints]
    assert ["interruption", "recorded"] in outcomes
    assert all("strike" not in attempt for attempt in outcomes)
    manager.send_signal(signal.SIGTERM)
    assert manager.wait(PATIENCE_S) == 143
    assert read_model(study.manager_state, EvaluatorManagerState).status == "stopped"


def run_json(study: StudyLayout, base_model: Path) -> Run:
    plan = make_plan(base_model=base_model, prompts=PROMPTS, device="cpu", num_samples=2, steps=2)
    return Run(
        folder_id="f", study_name="s", storage="sqlite://", workload="sd-lora", score_source="evaluator",
        status="finished", created=TIME, updated=TIME, base_model=str(base_model), plan=plan, plan_hash=plan.digest(),
        trainer=Trainer(name="native"), settings={}, threads_per_process=1, versions={},
    )  # fmt: skip


@pytest.mark.slow
def test_a_manager_started_first_waits_for_the_study_and_leaves_when_it_is_finished(study, base_model, start):
    manager = start(
        "run", "--optimization-dir", study.root, "--device", "cpu", "--check-interval", 1, "--exit-when-finished"
    )
    wait_until(lambda: study.manager_log.exists() and "waiting for" in study.manager_log.read_text(), "it waits")
    assert read_model(study.manager_state, EvaluatorManagerState).status == "waiting"
    for number in (1, 2):
        done = TrialState(
            trial=number, optuna_number=number - 1, state="complete", attempt=1, drawn=TIME, ended=TIME, value=0.1
        )
        write_model(study.trial(number).state, done)
    write_model(study.run, run_json(study, base_model))
    assert manager.wait(PATIENCE_S) == 0
    assert all(len(state_of(study, number).checkpoints) == 2 for number in (1, 2))


def test_a_manager_started_before_its_study_makes_the_folder_and_waits(tmp_path, start):
    root = tmp_path / "later" / "study"
    start("run", "--optimization-dir", root)
    wait_until(lambda: (root / "evaluator_manager.log").exists(), "the folder is made")
    wait_until(lambda: "waiting for" in (root / "evaluator_manager.log").read_text(), "it waits")


def test_a_manager_started_first_with_flags_takes_up_its_studys_plan(tmp_path, base_model, start):
    """The flags leave open what they do not name; the study's run.json says it."""
    study = StudyLayout(tmp_path / "study")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    named = ("--optimization-dir", study.root, "--base-model", base_model, "--prompts", tmp_path / "prompts.txt")
    manager = start("run", *named, "--device", "cpu", "--check-interval", 0.2)
    wait_until(lambda: study.manager_log.exists() and "plan samples=8" in study.manager_log.read_text(), "its own plan")
    write_model(study.run, run_json(study, base_model))
    wait_until(lambda: "plan samples=2" in study.manager_log.read_text(), "the study's plan")
    assert manager.poll() is None


@pytest.mark.slow
def test_one_trial_is_scored_by_the_command_the_optimizer_uses(study, base_model):
    write_model(study.run, run_json(study, base_model))
    result = run("evaluate", "--trial", study.trial(1).folder, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert {record.status for record in state_of(study, 1).checkpoints} == {"recorded"}
    assert not study.trial(2).evaluations.folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["run", "--optimization-dir", "{root}", "--once"], "--base-model", id="once without a plan"),
        pytest.param(["run", "--once"], "--optimization-dir", id="no folder"),
        pytest.param(
            ["run", "--optimization-dir", "{root}/missing", "--once"], "--optimization-dir", id="a folder not there"
        ),
        pytest.param(
            ["run", "--optimization-dir", "/dev/null/study"], "--optimization-dir", id="a folder that cannot be made"
        ),
        pytest.param(["evaluate", "--trial", "{root}/trial_0001"], "--base-model", id="a trial without a plan"),
        pytest.param(["evaluate", "--trial", "{root}/trial_0009"], "--trial", id="a trial not there"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(study, arguments, message):
    result = run(*(argument.replace("{root}", str(study.root)) for argument in arguments))
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_flag_that_differs_from_the_study_is_refused_with_both_values(study, base_model):
    write_model(study.run, run_json(study, base_model))
    result = run("run", "--optimization-dir", study.root, "--num-samples", 5, "--once")
    assert result.returncode == 2
    assert "5" in result.stderr
    assert "2" in result.stderr


def test_a_base_model_that_changed_since_the_study_began_is_refused(study, base_model, tmp_path):
    run_of = json.loads(run_json(study, base_model).model_dump_json())
    plan = run_json(study, base_model).plan.model_copy(update={"base_digest": "0" * 64})
    changed = {**run_of, "plan": plan.model_dump(mode="json"), "plan_hash": plan.digest()}
    write_model(study.run, Run.model_validate_json(json.dumps(changed)))
    result = run("run", "--optimization-dir", study.root, "--once")
    assert result.returncode == 2
    assert str(base_model) in result.stderr


def test_a_second_manager_is_refused(study, base_model):
    with FileLock(study.manager_lock):
        result = run("run", *flags(study, base_model), "--once")
    assert result.returncode == 2
    assert "evaluator_manager.lock" in result.stderr

"""Files that somebody asks a living manager to evaluate: by request, by the verb, through a kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.locks import FileLock
from shared.planning import make_plan
from shared.requests import RequestFolder
from shared.schemas import Answer, Evaluate, EvaluationState, Metrics, Run
from tests.evaluator_daemon.test_outside import run_of
from tests.evaluator_daemon.tiny_models import PROMPTS, lora_bytes

PATIENCE_S = 240.0


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "evaluator_daemon.cli", *map(str, arguments)]


@pytest.fixture
def study(tmp_path, base_model) -> StudyLayout:
    study = StudyLayout(tmp_path / "study")
    study.root.mkdir()
    plan = make_plan(base_model=base_model, prompts=PROMPTS, device="cpu", num_samples=4, steps=2)
    write_model(study.run, run_of(plan, base_model))
    (study.root / "elsewhere.safetensors").write_bytes(lora_bytes(3, epoch=6))
    return study


@pytest.fixture
def manager(study) -> Iterator[Callable[[], subprocess.Popen]]:
    started: list[subprocess.Popen] = []

    def start() -> subprocess.Popen:
        flags = ("--optimization-dir", study.root, "--device", "cpu")
        started.append(subprocess.Popen(command("run", *flags), stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + PATIENCE_S
        while not FileLock.is_held(study.manager_lock):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.wait(PATIENCE_S)


def ask(study: StudyLayout, **asked: object) -> str:
    return RequestFolder(study, "evaluator").submit(Evaluate(kind="evaluate", **asked))


def answer(study: StudyLayout, request: str) -> Answer:
    found = RequestFolder(study, "evaluator").wait_for_answer(request, PATIENCE_S)
    assert found is not None
    return found


def test_a_manager_evaluates_what_is_asked_for_and_answers_each(study, manager):
    file = study.root / "elsewhere.safetensors"
    good = ask(study, file="elsewhere.safetensors", label="extra")
    base = ask(study, file=None, label="base", priority=5)
    missing = ask(study, file="missing.safetensors", label="extra")
    cut = study.root / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-10])
    half = ask(study, file="cut.safetensors", label="extra", priority=1)  # the label's other file is not its affair
    foreign = ask(
        study,
        file="elsewhere.safetensors",
        label="foreign",
        plan=read_model(study.run, Run).plan.model_copy(update={"base_digest": "0" * 64}),
    )
    manager()
    assert "is not there" in answer(study, missing).error
    assert "base_digest" in answer(study, foreign).error
    told = answer(study, good)
    assert told.ok, told.error
    metrics = read_model(study.evaluations("extra").checkpoint("elsewhere").metrics, Metrics)
    assert told.result["score"] == metrics.scores["combined_score"].value
    assert metrics.epoch == 6
    assert answer(study, base).result["checkpoint"] == "base"
    assert "not whole" in answer(study, half).error
    log = study.manager_log.read_text()
    assert log.index("evaluator started trial=evaluations/base") < log.index(
        "evaluator started trial=evaluations/extra"
    )


def test_a_manager_killed_in_the_middle_of_it_takes_it_up_again(study, manager):
    request = ask(study, file="elsewhere.safetensors", label="extra")
    process = manager()
    deadline = time.monotonic() + PATIENCE_S
    state = study.evaluations("extra").state
    while not state.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    manager()
    assert answer(study, request).ok
    (record,) = read_model(state, EvaluationState).checkpoints
    assert record.status == "recorded"
    assert [attempt.outcome for attempt in record.attempts][-1] == "recorded"


def test_the_verb_leaves_the_work_to_a_living_manager(study, manager):
    manager()
    asked = subprocess.run(
        command("evaluate", study.root / "elsewhere.safetensors", "--optimization-dir", study.root, "--json"),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert asked.returncode == 0, asked.stderr
    (row,) = json.loads(asked.stdout)
    assert (row["status"], row["label"], row["epoch"]) == ("recorded", "elsewhere", 6)
    assert "evaluator started trial=evaluations/elsewhere" in study.manager_log.read_text()
    assert not list(Path(study.requests("evaluator")).glob("2*Z-*.json")), "it is answered"

"""A file server's clock that is ahead of ours: verdicts hold all the same."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest

from evaluator_daemon import evaluator as evaluator_module
from evaluator_daemon import recording
from evaluator_daemon.evaluator import Evaluator
from evaluator_daemon.job import Job
from evaluator_daemon.places import TrialPlace
from shared.errors import IncompleteCheckpointError
from shared.files import read_model
from shared.layout import StudyLayout
from shared.planning import make_plan
from shared.schemas import EvaluationState
from shared.service import Service


@pytest.mark.parametrize("behind", [timedelta(hours=1), -timedelta(hours=1)])
def test_an_unreadable_file_is_judged_once_and_again_after_a_chmod(base_model, tmp_path, monkeypatch, behind):
    trial = StudyLayout(tmp_path).trial(5)
    trial.evaluations.folder.mkdir(parents=True)
    path = trial.intermediate_checkpoint(2)
    path.write_bytes(b"x")
    os.utime(path, (time.time() - 3600,) * 2)
    looks: list[str] = []

    def admit(path, folder, *, first_look):
        assert len(looks) < 10, "it is judged again and again"
        looks.append(path.name)
        raise IncompleteCheckpointError(path, "unreadable", "let this user read it")  # root reads everything

    monkeypatch.setattr(evaluator_module, "admit", admit)
    monkeypatch.setattr(recording, "now", lambda real=recording.now: real() - behind)
    plan = make_plan(base_model=base_model, prompts=["a red ball"], device="cpu", num_samples=2, steps=2)
    job = Job(tmp_path, plan, base_model, None, "cpu", 1, 1.0, 900.0)
    written: list[str] = []
    evaluator = Evaluator(job, TrialPlace(trial), Service(), lambda: written.append("state"))
    for _ in range(3):
        evaluator.tick(watch=True)
    assert (len(looks), len(written)) == (1, 1)
    (record,) = read_model(trial.evaluations.state, EvaluationState).checkpoints
    assert (record.status, record.changed_s) == ("quarantined", path.stat().st_ctime)
    time.sleep(0.02)
    path.chmod(0o640)
    evaluator.tick(watch=True)
    assert (len(looks), len(written)) == (2, 2)

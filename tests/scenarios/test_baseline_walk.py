"""A LoRA of the user's own in a whole study: scored first, shown beside every trial, never in the way."""

from __future__ import annotations

import signal

import pytest

from optimizer_daemon.status import status_text, study_status
from shared.files import read_model
from shared.locks import FileLock
from shared.schemas import AllTrials, Run
from tests.optimizer_daemon.scripted_trainer import lora
from tests.scenarios.invariants import violations
from tests.scenarios.quick_lab import PATIENCE_S, QuickLab

FLAGS = ("--sampler", "random", "--max-epochs", 2)


@pytest.fixture
def lab(tmp_path):
    with QuickLab(tmp_path) as lab:
        for number, score in ((6, 0.9), (7, 0.001)):
            (tmp_path / f"v{number}.safetensors").write_bytes(lora(number, score))
        lab.study_file.write_text(lab.study_file.read_text().replace(
            "[optimizer]\n", '[optimizer]\nbaseline = ["v6=v6.safetensors"]\n', 1))  # fmt: skip
        yield lab


def test_it_is_scored_first_and_shown_beside_every_trial_whatever_is_killed(lab):
    daemon = lab.optimizer("--n-trials", 2, *FLAGS, failpoints="optimizer.baseline_copied=kill")
    assert daemon.wait(PATIENCE_S) == -signal.SIGKILL, daemon.said
    daemon = lab.optimizer("--n-trials", 2, *FLAGS)
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    log = lab.log()
    assert log.index("baseline scored baseline=v6 combined_score=0.9") < log.index("trial started")
    assert log.count("against_v6=") == 2
    assert "baseline v6: combined_score 0.9000, the winner is " in daemon.said
    trials = read_model(lab.study.results.all_trials, AllTrials)
    assert [(known.name, known.value, known.feasible) for known in trials.baselines] == [("v6", 0.9, True)]
    for trial in trials.trials:
        summary = lab.study.trial(trial.trial).final_evaluation.text_summary.read_text()
        assert f"Against baseline v6\n  combined_score       {trial.value:.4f} against 0.9000, " in summary
    status = study_status(lab.study, 10)
    assert [row["against"]["v6"] for row in status["top"]] == [row["value"] - 0.9 for row in status["top"]]
    assert "baseline v6: combined_score 0.9000, the winner is " in status_text(status)
    assert violations(lab.study, finished=2) == []

    # A new one may come later; it cannot be scored, and that stops nothing.
    v7 = ("--baseline", f"v7={lab.folder / 'v7.safetensors'}", "--baseline", f"v6={lab.folder / 'v6.safetensors'}")
    (lab.folder / "v6.safetensors").touch()
    daemon = lab.optimizer("--n-trials", 3, *FLAGS, *v7, env={"SCRIPTED_REFUSED": "v7"})
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    assert 'baseline without a score baseline=v7 reason="no such layers; see ' in lab.log()
    assert "baseline v7: no score (no such layers)" in daemon.said
    assert set(read_model(lab.study.run, Run).baselines) == {"v6", "v7"}

    (lab.folder / "v6.safetensors").unlink()
    daemon = lab.optimizer("--n-trials", 3, *FLAGS)
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    assert "baseline's file is gone, its copy stands baseline=v6" in lab.log()

    before = lab.study.run.read_bytes()
    (lab.folder / "v6.safetensors").write_bytes(lora(6, 0.5))
    daemon = lab.optimizer("--n-trials", 4, *FLAGS)
    assert daemon.wait(PATIENCE_S) == 2, daemon.said
    assert "but the study was held against" in daemon.said
    assert lab.study.run.read_bytes() == before


def test_a_run_whose_baseline_is_never_scored_ends_at_its_timeout(lab):
    layout = lab.study.evaluations("baseline")
    layout.folder.mkdir(parents=True)
    with FileLock(layout.lock):  # somebody else is at it, for ever
        daemon = lab.optimizer("--n-trials", 2, "--timeout", 2, *FLAGS)
        assert daemon.wait(PATIENCE_S) == 0, daemon.said
    assert "trial started" not in lab.log()
    assert "baseline v6: no score (not scored yet)" in daemon.said

"""A whole study whose trials another program trains, by the real optimizer daemon."""

from __future__ import annotations

from pathlib import Path

from shared.files import read_model
from shared.schemas import TrialState
from tests.optimizer_daemon.trainers.test_contract import COMMAND
from tests.scenarios.quick_lab import QuickLab, wait_until


def test_a_study_by_command_is_stopped_in_training_and_finished(tmp_path: Path):
    with QuickLab(tmp_path) as lab:
        text = lab.study_file.read_text().replace('"scripted_trainer:TRAINER"', '"command"')
        lab.study_file.write_text(text + COMMAND)
        trial = lab.study.trial(1)
        running = lab.optimizer("--n-trials", 1, "--max-epochs", 2)
        wait_until(trial.intermediate_checkpoint(1).exists, what=running.said)
        assert running.stop() in (0, 143), running.said
        state = read_model(trial.state, TrialState)
        assert state.state == "interrupted" and lab.processes() == {}
        again = lab.optimizer("--n-trials", 1, "--max-epochs", 2)
        assert again.wait() == 0, again.said
        state = read_model(trial.state, TrialState)
        assert (state.state, state.attempt, state.resumes) == ("complete", 1, 1), state
        assert "training from step 7, rank" in trial.training_log.read_text()
        assert [path.name for path in trial.list_checkpoints()] == [
            "lora_trial_1-000001.safetensors",
            "lora_trial_1.safetensors",
        ]
        assert sorted(path.name for path in (trial.folder / "output").iterdir()) == [
            "checkpoint-12",
            "checkpoint-6",
            "pytorch_lora_weights.safetensors",
        ]

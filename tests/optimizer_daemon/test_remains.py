"""What is kept of trainings that came to nothing, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimizer_daemon.remains import drop_set_aside, set_aside
from shared.errors import DiskError
from shared.layout import StudyLayout, TrialLayout


@pytest.fixture
def trial(tmp_path: Path) -> TrialLayout:
    trial = StudyLayout(tmp_path).trial(5)
    for name in (
        "params.json",
        "training.log",
        "lora_trial_5-000002.safetensors",
        "lora_trial_5-000002-state/optimizer.bin",
        "state/state.pt",
        "output/checkpoint-6/optimizer.bin",
        "output/checkpoint-6/weights.safetensors",
    ):
        (trial.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (trial.folder / name).write_text(name)
    return trial


def files(trial: TrialLayout) -> list[str]:
    return sorted(str(path.relative_to(trial.folder)) for path in trial.folder.rglob("*") if path.is_file())


def test_a_redo_keeps_log_and_weights_but_no_state_and_in_the_end_no_second_copy(trial: TrialLayout):
    set_aside(trial)
    kept = ["attempts/01/lora_trial_5-000002.safetensors", "attempts/01/training.log"]
    copies = ["attempts/01/output/checkpoint-6/optimizer.bin", "attempts/01/output/checkpoint-6/weights.safetensors"]
    assert files(trial) == [kept[0], *copies, kept[1], "params.json"]
    trial.output.mkdir()
    (trial.output / "weights.safetensors").touch()
    drop_set_aside(trial)
    assert files(trial) == [*kept, "output/weights.safetensors", "params.json"]
    drop_set_aside(trial)


def test_states_that_an_older_program_set_aside_go_too(trial: TrialLayout):
    for name in ("state", "lora_trial_5-000004-state"):
        (trial.attempt(1) / name).mkdir(parents=True)
    drop_set_aside(trial)
    assert list(trial.attempt(1).iterdir()) == []


def test_what_cannot_be_removed_is_named(trial: TrialLayout):
    trial.attempt(1).mkdir(parents=True)
    (trial.attempt(1) / "output").write_text("a file")
    with pytest.raises(DiskError, match="attempts/01/output: could not be written"):
        drop_set_aside(trial)

"""The states that sd-scripts save beside the weights, and which of them is whole.

A state is a folder lora_trial_5-000002-state. train_state.json is written first and the random states last, so a
training that was killed leaves a folder that lacks files or holds a part of one.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from optimizer_daemon.trainers.base import ResumePoint
from shared.errors import CheckpointError
from shared.layout import TrialLayout
from shared.safetensors_file import read_header

_NEEDED = ("train_state.json", "model.safetensors", "optimizer.bin", "random_states_0.pkl")


def newest_state(trial: TrialLayout) -> ResumePoint | None:
    """Return the newest whole state that was saved after an epoch; None when there is none.

    The one without a number, saved after the last epoch, is left out: kohya refuses to begin behind the end.
    """
    found: list[tuple[int, Path]] = []
    for folder in trial.list_training_states():
        numbered = re.fullmatch(rf"{re.escape(trial.output_name)}-(\d{{6}})-state", folder.name)
        if numbered is not None:
            found.append((int(numbered[1]), folder))
    for epoch, folder in sorted(found, reverse=True):
        if is_whole(folder, epoch):
            return ResumePoint(folder, epoch)
    return None


def is_whole(folder: Path, epoch: int) -> bool:
    """Tell whether a state holds everything, every file to its end, and is of that epoch."""
    try:
        saved = json.loads((folder / "train_state.json").read_text(encoding="utf-8"))
        files = [file for file in folder.iterdir() if file.is_file()]
        if not isinstance(saved, dict) or saved.get("current_epoch") != epoch:
            return False
        if not {file.name for file in files}.issuperset(_NEEDED):
            return False
        read_header(folder / "model.safetensors", folder)
        # torch saves the others as zip files, whose table of contents comes last.
        return all(zipfile.is_zipfile(file) for file in files if file.suffix in (".bin", ".pkl", ".pt"))
    except (OSError, ValueError, CheckpointError):
        return False

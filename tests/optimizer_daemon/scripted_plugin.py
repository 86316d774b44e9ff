"""The plugin half of scripted_trainer.py."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from optimizer_daemon.trainers.base import LaunchPlan, ResumePoint
from shared.layout import TrialLayout
from shared.preloaded import Preload
from shared.progress_bar import Progress
from shared.schemas import Run, TrainerExit, TrialParams

SCRIPT = Path(__file__).with_name("scripted_trainer.py")


class ScriptedTrainer:
    """The nearer learning_rate to 1e-4, the better the score; a training seed of its own adds a little."""

    def plan(
        self,
        params: TrialParams,
        trial: TrialLayout,
        run: Run,
        gpu: str | None = None,
        resume: ResumePoint | None = None,
    ) -> LaunchPlan:
        score = abs(math.log10(float(params.parameters["learning_rate"])) + 4)
        score += (params.training_seed - int(run.settings["seed"])) % 1000 * 1e-5
        numbers = (params.max_train_epochs, run.settings["save-every-n-epochs"], score)
        program = ("-m", SCRIPT.stem) if _is_preloaded() else ("-S", str(SCRIPT))
        argv = (sys.executable, *program, str(trial.folder), trial.output_name, *map(str, numbers))
        env = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        files = {"train_config.toml": f"epochs = {params.max_train_epochs}\n"}
        patience = os.environ.get("SCRIPTED_PATIENCE_S")
        return LaunchPlan(argv, env, files, patience_s=None if patience is None else float(patience))

    def preload(self, run: Run) -> Preload | None:
        return Preload(("struct",), {}, SCRIPT.parent) if _is_preloaded() else None

    def resume_point(self, trial: TrialLayout) -> ResumePoint | None:
        return ResumePoint(trial.training_state) if trial.training_state.exists() else None

    def parse_progress(self, line: str) -> Progress | None:
        found = re.match(r"scripted: (\d+) (\d+) ([\d.]+)", line)
        if found is None:
            return None
        epoch, epochs = int(found[1]), int(found[2])
        return Progress(epoch, epoch, epochs, float(found[3]), 0.1, 0.1 * (epochs - epoch))

    def diagnose(self, record: TrainerExit | None, last_lines: Sequence[str]) -> str:
        return f"out of memory: {last_lines[-1]}"


def _is_preloaded() -> bool:
    behaviour: dict[str, object] = json.loads(os.environ.get("SCRIPTED_TRAINER", "{}"))
    return bool(behaviour.get("preloaded"))

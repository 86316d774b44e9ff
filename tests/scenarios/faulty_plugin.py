"""The plugin half of faulty_trainer.py: plans its command; reads and explains its output as that of sd-scripts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from optimizer_daemon.trainers.base import LaunchPlan, ResumePoint
from optimizer_daemon.trainers.diagnosis import explain
from shared.layout import TrialLayout
from shared.progress_bar import Progress, parse_bar
from shared.schemas import Run, TrainerExit, TrialParams

SCRIPT = Path(__file__).with_name("faulty_trainer.py")


class FaultyTrainer:
    def plan(
        self,
        params: TrialParams,
        trial: TrialLayout,
        run: Run,
        gpu: str | None = None,
        resume: ResumePoint | None = None,
    ) -> LaunchPlan:
        fault = json.loads(os.environ["FAULTS"]).get(str(params.trial), "trains_well")
        if fault == "not_installed":
            return LaunchPlan(("no-such-trainer", "--epochs", "2"), env={})
        return LaunchPlan((sys.executable, "-S", str(SCRIPT), str(trial.folder), trial.output_name, fault), env={})

    def resume_point(self, trial: TrialLayout) -> ResumePoint | None:
        return ResumePoint(trial.training_state) if trial.training_state.exists() else None

    def parse_progress(self, line: str) -> Progress | None:
        return parse_bar(line)

    def diagnose(self, record: TrainerExit | None, last_lines: Sequence[str]) -> str:
        return explain(record, last_lines)

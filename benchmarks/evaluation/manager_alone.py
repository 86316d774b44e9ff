"""A manager with other limits than the command's: `python -m benchmarks.evaluation.manager_alone STUDY_FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evaluator_daemon.lookout import FULL_SWEEP_S
from evaluator_daemon.manager import run_manager
from evaluator_daemon.settings import EvaluatorSettings
from shared.commands import run_command
from shared.settings import LoadedSettings


def main() -> int:
    """Run it until a signal comes."""
    parser = argparse.ArgumentParser(prog="manager_alone", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--evaluators", type=int, default=0, help="evaluators that live at once")
    parser.add_argument("--check-interval", type=float, default=30.0, help="seconds between two sweeps")
    parser.add_argument("--full-sweep", type=float, default=FULL_SWEEP_S, help="seconds between two full sweeps")
    options = parser.parse_args()
    settings = EvaluatorSettings(
        optimization_dir=options.study,
        device="cpu",
        check_interval=options.check_interval,
        evaluator_check_interval=options.check_interval,
    )
    loaded = LoadedSettings(settings, dict.fromkeys(EvaluatorSettings.model_fields, "default"))
    run_manager(
        loaded,
        once=False,
        exit_when_finished=False,
        full_sweep_s=options.full_sweep,
        max_evaluators=options.evaluators,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

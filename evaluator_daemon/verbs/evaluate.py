"""`evaluator-daemon evaluate`: score one trial's checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from shared.verbs import Run


def declare(parser: argparse.ArgumentParser) -> Run:
    """Add the flags of the verb to its parser and return what runs it."""
    from evaluator_daemon.settings import EvaluatorSettings
    from shared.settings import add_settings_flags

    parser.description = (
        "Score every checkpoint of one trial that is not scored yet, and exit; with --watch go on until the trial is "
        "over."
    )
    parser.add_argument("--trial", type=Path, required=True, metavar="DIR", help="the trial's folder")
    parser.add_argument("--watch", action="store_true", help="wait for further checkpoints until the trial is over")
    add_settings_flags(parser, EvaluatorSettings)
    return _evaluate


def _evaluate(arguments: argparse.Namespace) -> int:
    from evaluator_daemon.job import find_job
    from evaluator_daemon.settings import EvaluatorSettings
    from shared.errors import SettingsError
    from shared.layout import StudyLayout, TrialLayout
    from shared.logs import set_up_logs
    from shared.settings import load_settings

    if not arguments.trial.is_dir():
        raise SettingsError("--trial", str(arguments.trial), "name a trial's folder inside a study folder")
    trial = arguments.trial.resolve()
    job = find_job(load_settings(EvaluatorSettings, arguments), StudyLayout(trial.parent))
    if job is None:
        raise SettingsError(
            "--base-model", None, f"there is no {trial.parent / 'run.json'}; pass --base-model and --prompts"
        )
    set_up_logs(TrialLayout(trial).evaluation_log)
    from evaluator_daemon.evaluator import evaluate_trial  # seconds of torch, so bad input is told before

    evaluate_trial(job, trial, watch=arguments.watch)
    return 0

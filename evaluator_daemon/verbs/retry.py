"""`evaluator-daemon retry`: lift a quarantine."""

from __future__ import annotations

import argparse
from pathlib import Path

from shared.verbs import Run


def declare(parser: argparse.ArgumentParser) -> Run:
    """Add the flags of the verb to its parser and return what runs it."""
    parser.description = (
        "Forget the strikes and the quarantine of a trial's checkpoints, or of one, so that they are evaluated again: "
        "at once where a manager runs, else with the next evaluation."
    )
    parser.add_argument("trial", metavar="TRIAL", help="trial such as trial_0005 or 5, or a label")
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT", help="file name of one checkpoint (default: all of the trial)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="study file (TOML) that names the study folder")
    parser.add_argument("--optimization-dir", type=Path, metavar="DIR", help="study folder")
    return _retry


def _retry(arguments: argparse.Namespace) -> int:
    from evaluator_daemon.commands import ask
    from evaluator_daemon.job import study_folder
    from evaluator_daemon.settings import EvaluatorSettings
    from shared.schemas import Retry
    from shared.settings import load_settings

    study = study_folder(load_settings(EvaluatorSettings, arguments).settings, make=False)
    number = int(arguments.trial) if arguments.trial.isdecimal() else 0
    name = study.trial(number).name if number else arguments.trial
    checkpoint = arguments.checkpoint
    print(ask(study, Retry(kind="retry", trial_name=name, checkpoint=checkpoint, asked_by="evaluator-daemon retry")))
    return 0

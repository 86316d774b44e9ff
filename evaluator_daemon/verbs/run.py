"""`evaluator-daemon run`: watch a study folder and score every checkpoint."""

from __future__ import annotations

import argparse

from shared.verbs import Run


def declare(parser: argparse.ArgumentParser) -> Run:
    """Add the flags of the verb to its parser and return what runs it."""
    from evaluator_daemon.settings import EvaluatorSettings
    from shared.settings import add_settings_flags

    parser.description = (
        "Watch a study folder, one evaluator process per trial. Without run.json the evaluation plan is made from "
        "--base-model and --prompts, so that any trainer's trial_* folders can be scored."
    )
    add_settings_flags(parser, EvaluatorSettings)
    parser.add_argument("--once", action="store_true", help="evaluate what is there and exit")
    parser.add_argument(
        "--exit-when-finished", action="store_true", help="exit when the study is finished and everything is scored"
    )
    return _run


def _run(arguments: argparse.Namespace) -> int:
    from evaluator_daemon.manager import run_manager
    from evaluator_daemon.settings import EvaluatorSettings
    from shared.settings import load_settings

    run_manager(
        load_settings(EvaluatorSettings, arguments),
        once=arguments.once,
        exit_when_finished=arguments.exit_when_finished,
    )
    return 0

"""`optimizer-daemon run` with the scripted evaluator: python launch.py FLAGS."""

from __future__ import annotations

import sys
from pathlib import Path

from optimizer_daemon.cli import build_parser
from optimizer_daemon.daemon import OptimizerDaemon
from optimizer_daemon.settings import load_optimizer_settings
from shared.commands import run_command

if __name__ == "__main__":
    settings = load_optimizer_settings(build_parser().parse_args(["run", *sys.argv[1:]]))
    evaluator = (sys.executable, str(Path(__file__).with_name("scripted_evaluator.py")))
    sys.exit(run_command(OptimizerDaemon(settings, evaluator=evaluator).run))

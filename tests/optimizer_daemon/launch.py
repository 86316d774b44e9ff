"""`optimizer-daemon run` with the scripted evaluator: python launch.py FLAGS."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from optimizer_daemon.daemon import OptimizerDaemon
from optimizer_daemon.settings import OptimizerSettings, load_optimizer_settings
from shared.commands import run_command
from shared.settings import add_settings_flags

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_settings_flags(parser, OptimizerSettings)
    settings = load_optimizer_settings(parser.parse_args())
    evaluator = (sys.executable, str(Path(__file__).with_name("scripted_evaluator.py")))
    sys.exit(run_command(OptimizerDaemon(settings, evaluator=evaluator).run))

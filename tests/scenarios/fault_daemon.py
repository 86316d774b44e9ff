"""`optimizer-daemon run` with a quick evaluator and, where asked, a fast clock: python fault_daemon.py FLAGS.

FAULT_CLOCK says how many seconds pass for the daemon in one second of ours, so that ten minutes without progress can be
waited for. Only its clock is another; what it does, and all its processes, are the real ones.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path

from optimizer_daemon.daemon import OptimizerDaemon
from optimizer_daemon.settings import OptimizerSettings, load_optimizer_settings
from shared.commands import run_command
from shared.settings import add_settings_flags

EVALUATOR = Path(__file__).resolve().parents[1] / "optimizer_daemon" / "scripted_evaluator.py"

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_settings_flags(parser, OptimizerSettings)
    settings = load_optimizer_settings(parser.parse_args())
    speed = float(os.environ.get("FAULT_CLOCK", "1"))
    daemon = OptimizerDaemon(
        settings, evaluator=(sys.executable, str(EVALUATOR)), clock=lambda: speed * time.monotonic()
    )
    code = run_command(daemon.run)
    # rusage's figure would count in what the test process held when it started this one
    print(re.search(r"VmHWM:.*", Path("/proc/self/status").read_text())[0], flush=True)
    sys.exit(code)

"""`optimizer-daemon run` with the scripted evaluator: python launch.py FLAGS.

GPUS in the environment names cards, commas between, that the driver of this machine is made to show.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import shared.devices
from shared.commands import run_command
from shared.settings import add_settings_flags


def show(cards: list[str]) -> None:
    """Have the driver show these cards."""
    shared.devices.why_no_cuda = lambda: None
    shared.devices.cuda_device_count = lambda: len(cards)
    shared.devices.gpu_model = lambda device: "a card" if device.startswith("cuda") else None
    shared.devices.gpu_uuid = lambda device: cards[int(device.partition(":")[2] or 0)]


if __name__ == "__main__":
    if "GPUS" in os.environ:
        show(os.environ["GPUS"].split(","))
    from optimizer_daemon.daemon import OptimizerDaemon  # it imports the driver's functions by name
    from optimizer_daemon.settings import OptimizerSettings, load_optimizer_settings

    parser = argparse.ArgumentParser()
    add_settings_flags(parser, OptimizerSettings)
    settings = load_optimizer_settings(parser.parse_args())
    evaluator = (sys.executable, str(Path(__file__).with_name("scripted_evaluator.py")))
    sys.exit(run_command(OptimizerDaemon(settings, evaluator=evaluator).run))

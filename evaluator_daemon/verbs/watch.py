"""`evaluator-daemon watch`: the live view of a study."""

from __future__ import annotations

import argparse
from pathlib import Path

from shared.verbs import Run


def declare(parser: argparse.ArgumentParser) -> Run:
    """Add the flags of the verb to its parser and return what runs it."""
    parser.description = (
        "Show a study live: daemons, GPU, queue, trials with their score curves, the best so far, the last error. It "
        "only reads, and needs no living daemon. Without a terminal (cron, a pipe, TERM=dumb) it prints plain text: "
        "once, or with --interval one block after another. Ctrl-C leaves."
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="study file (TOML) that names the study folder")
    parser.add_argument("--optimization-dir", type=Path, metavar="DIR", help="study folder")
    parser.add_argument(
        "--interval", type=float, metavar="SECONDS", help="seconds between two looks (default: 5; see above)"
    )
    parser.add_argument("--once", action="store_true", help="print plain text once and exit")
    parser.add_argument("--json", action="store_true", help="print one JSON snapshot and exit")
    return _watch


def _watch(arguments: argparse.Namespace) -> int:
    import json
    import sys
    from datetime import datetime

    from evaluator_daemon.overview import to_json
    from evaluator_daemon.settings import EvaluatorSettings
    from evaluator_daemon.snapshot import StudyReader
    from shared.errors import SettingsError
    from shared.layout import StudyLayout
    from shared.settings import load_settings

    interval_s = arguments.interval
    if interval_s is not None and not 0 < interval_s < float("inf"):
        raise SettingsError("--interval", interval_s, "write seconds, more than 0")
    folder = load_settings(EvaluatorSettings, arguments).settings.optimization_dir
    if folder is None:
        raise SettingsError("--optimization-dir", None, "name the study folder (the optimizer's --output-dir)")
    if not folder.is_dir():
        raise SettingsError("--optimization-dir", str(folder), "there is no such folder; name the study folder")
    reader = StudyReader(StudyLayout(folder.resolve()))
    if arguments.json:
        print(json.dumps(to_json(reader.look(datetime.now().astimezone())), indent=2, allow_nan=False))
        return 0
    from evaluator_daemon.monitor import watch, watch_plainly

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a study's name may hold what the locale's encoding does not
    return watch_plainly(reader, None, sys.stdout) if arguments.once else watch(reader, interval_s)

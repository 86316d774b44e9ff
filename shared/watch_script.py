"""watch_realtime_evaluation.sh: the live view of the study whose folder it lies in."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from shared.files import write_text
from shared.layout import StudyLayout

_SOURCE_ROOT = Path(__file__).resolve().parents[1]

# The study is where the script lies: a folder that was moved or copied shows itself, not the place it came from.
_SCRIPT = """#!/bin/bash
# Shows the study live: bash watch_realtime_evaluation.sh [SECONDS between two looks]
# Without a terminal (cron, a pipe) it prints plain text: once, or with SECONDS one block after another.
python={python}
program={program}
study=$(dirname -- "$(readlink -f -- "${{BASH_SOURCE[0]}}")")
if [ ! -x "$python" ]; then
    echo "error: $python, which wrote this script, is gone; run optimizer-daemon on $study again, or" \\
        "evaluator-daemon watch --optimization-dir $study" >&2
    exit 4
fi
cd -- "$program" || exit 4  # python -m finds the program there, installed or not
exec "$python" -m evaluator_daemon.cli watch --optimization-dir "$study" ${{1:+--interval="$1"}}
"""


def write_watch_script(study: StudyLayout, *, only_if_absent: bool = False) -> None:
    """Put the script into the study folder; it starts the interpreter that wrote it.

    Args:
        only_if_absent: leave one that is there as it is; for the manager, whose file it is not.
    Raises:
        DiskError: it could not be written.
    """
    text = _SCRIPT.format(python=shlex.quote(sys.executable), program=shlex.quote(str(_SOURCE_ROOT)))
    there = study.watch_script.exists()
    if not there or (not only_if_absent and study.watch_script.read_text(encoding="utf-8", errors="replace") != text):
        write_text(study.watch_script, text)

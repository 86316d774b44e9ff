"""watch_realtime_evaluation.sh: the study at a glance, again and again."""

from __future__ import annotations

import shlex
import sys

from shared.files import write_text
from shared.layout import StudyLayout

_SCRIPT = """#!/bin/bash
# Shows the study every few seconds: bash watch_realtime_evaluation.sh [SECONDS]
study={study}
python={python}
while true; do
    clear 2>/dev/null
    date
    "$python" -m optimizer_daemon.cli status --output-dir "$study" --top 5
    for log in optimization.log evaluator_manager.log; do
        [ -e "$study/$log" ] && {{ echo; echo "$log"; tail -n 6 "$study/$log"; }}
    done
    sleep "${{1:-10}}"
done
"""


def write_watch_script(study: StudyLayout) -> None:
    """Put the script into the study folder; it starts the interpreter that wrote it."""
    text = _SCRIPT.format(study=shlex.quote(str(study.root)), python=shlex.quote(sys.executable))
    if not study.watch_script.exists() or study.watch_script.read_text(encoding="utf-8") != text:
        write_text(study.watch_script, text)

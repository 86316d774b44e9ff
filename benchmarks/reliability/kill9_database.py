"""Kill a process that asks, reports and tells in a SQLite study, at random moments, and look at the study each time.

`python -m benchmarks.reliability.kill9_database --kills 200` prints one line and exits 1 unless the database opened
after every kill, within `LONGEST_OPENING_S`, sound, with gap-free numbers and everything that was acknowledged. The
children are forked, not executed, so that most of the time goes into the database.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.search.space import parse_space

LONGEST_OPENING_S = 60.0
LONGEST_LIFE_S = 0.4

SPACE = parse_space(
    """
name = "small"
[parameters.rate]
type = "float"
low = 1e-5
high = 1e-3
log = true
[parameters.dim]
type = "categorical"
choices = [4, 8, 16]
""",
    "kill9_database",
)


@dataclass
class Outcome:
    """What a run found.

    Args:
        kills: children killed.
        trials: trials in the study at the end.
        slowest_opening_s: how long the study took to open after a kill, at most.
        complaints: every broken promise.
        seconds: how long it took.
    """

    kills: int = 0
    trials: int = 0
    slowest_opening_s: float = 0.0
    complaints: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"kills={self.kills} trials={self.trials} slowest_opening_s={self.slowest_opening_s:.2f} "
            f"complaints={len(self.complaints)} seconds={self.seconds:.1f}"
        )


def run(kills: int, folder: Path, seed: int) -> Outcome:
    """Kill `kills` children, one after the other; the last one is left to tell what it finds."""
    chance, outcome, begin = random.Random(seed), Outcome(), time.monotonic()
    known: dict[int, dict[str, Any]] = {}
    database = folder / "study.db"
    while outcome.kills < kills and not outcome.complaints:
        pid, news = _start(database)
        with os.fdopen(news, "rb", buffering=0) as pipe:
            opened = _lines(pipe, LONGEST_OPENING_S, until=b"opened")
            if not opened:
                outcome.complaints.append(f"after {outcome.kills} kills it does not open")
            else:
                found = json.loads(opened[-1].partition(b" ")[2])
                outcome.slowest_opening_s = max(outcome.slowest_opening_s, found["seconds"])
                outcome.complaints += _compared(found["trials"], known)
                outcome.trials = len(found["trials"])
                time.sleep(chance.uniform(0.0, LONGEST_LIFE_S))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            for line in _lines(pipe, 0.0):
                word, _, content = line.partition(b" ")
                if word == b"told":
                    row = json.loads(content)
                    known[row["number"]] = row
        outcome.kills += 1
        outcome.complaints += _integrity(database)
    outcome.seconds = time.monotonic() - begin
    return outcome


def _start(database: Path) -> tuple[int, int]:
    """Fork a child that works in the study until it is killed; return its pid and the pipe it reports on."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    try:
        _work(database, writer)
    finally:
        os._exit(1)


def _work(database: Path, pipe: int) -> None:
    """Open the study, finish what was left, then ask, report and tell for ever."""
    begin = time.monotonic()
    study = TuningStudy.open("s", f"sqlite:///{database}", SPACE, seed=1, folder_id="f")
    left = study.running()
    trials = [
        {
            "number": t.number,
            "state": t.state.name,
            "params": t.params,
            "curve": t.intermediate_values,
            "values": t.values,
        }
        for t in study._study.get_trials(deepcopy=False)
    ]
    found = {"seconds": time.monotonic() - begin, "trials": trials}
    os.write(pipe, f"opened {json.dumps(found)}\n".encode())
    while True:
        draw = left.pop() if left else study.ask()
        curve = {epoch: draw.values["rate"] * epoch for epoch in (1, 2)}
        for epoch, value in curve.items():
            study.report(draw.number, epoch, value)
        study.tell_complete(draw.number, curve[2], None)
        row = {"number": draw.number, "state": "COMPLETE", "params": draw.values, "curve": curve, "values": [curve[2]]}
        os.write(pipe, f"told {json.dumps(row)}\n".encode())


def _lines(pipe: Any, patience_s: float, until: bytes | None = None) -> list[bytes]:
    """Read whole lines: to the end of the pipe, or until one begins with `until`; none where that does not come."""
    deadline, content = time.monotonic() + patience_s, b""
    while until is None or not (content.startswith(until) and content.endswith(b"\n")):
        if until is not None and not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return []
        # One byte at a time before the kill: what comes after the first line belongs to the second reading.
        block = pipe.read(1 if until is not None else 65536)
        if not block:
            break
        content += block
    return content.split(b"\n")[:-1]


def _compared(trials: list[dict[str, Any]], known: dict[int, dict[str, Any]]) -> list[str]:
    """Return what the study says otherwise than it was acknowledged."""
    complaints = []
    if [trial["number"] for trial in trials] != list(range(len(trials))):
        complaints.append(f"the numbers have gaps: {[trial['number'] for trial in trials]}")
    if len(unfinished := [trial["number"] for trial in trials if trial["state"] == "RUNNING"]) > 1:
        complaints.append(f"trials {unfinished} are unfinished, and only one was under way")
    by_number = {trial["number"]: trial for trial in json.loads(json.dumps(trials))}
    for number, row in known.items():
        if by_number.get(number) != json.loads(json.dumps(row)):
            complaints.append(f"trial {number} is {by_number.get(number)}, acknowledged was {row}")
    return complaints


def _integrity(database: Path) -> list[str]:
    if not database.exists():
        return []
    with closing(sqlite3.connect(database)) as connection:
        (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
    return [] if verdict == "ok" else [f"the database is damaged: {verdict}"]


def main(arguments: Sequence[str]) -> int:
    """Run and print; 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="kill9_database", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(options.kills, Path(folder), options.seed)
    print(outcome, *outcome.complaints, sep="\n")
    return 1 if outcome.complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

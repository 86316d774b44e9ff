"""Kill a process that rewrites a state file, at random moments, and count the files nobody can read afterwards.

`python -m benchmarks.reliability.kill9_state_file --kills 10000` prints one line and exits 1 unless every file was
whole, no acknowledged content was lost and the sweep removed every temporary file. The children are forked, not
executed, so that most of the time goes into writing.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from shared.errors import UnreadableFileError
from shared.files import read_model, sweep_temp_files, write_model
from shared.schemas import CurvePoint, TrialState

NOON = datetime(2025, 11, 15, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Args:
        kills: children killed.
        unreadable: kills after which the file could not be read.
        lost: kills after which the file was older than before.
        temporary_files: how many the killed children left behind.
        after_sweep: how many of those the sweep left.
        rewrites: how often the file was replaced altogether.
        seconds: how long it took.
    """

    kills: int
    unreadable: int
    lost: int
    temporary_files: int
    after_sweep: int
    rewrites: int
    seconds: float

    @property
    def passed(self) -> bool:
        return not (self.unreadable or self.lost or self.after_sweep)

    def __str__(self) -> str:
        return (
            f"kills={self.kills} unreadable={self.unreadable} lost={self.lost} temporary_files={self.temporary_files} "
            f"after_sweep={self.after_sweep} rewrites={self.rewrites} seconds={self.seconds:.1f} "
            f"kills_per_s={self.kills / self.seconds:.0f}"
        )


def version(number: int) -> TrialState:
    """Return content that tells its number and whose length changes from one to the next."""
    curve = tuple(CurvePoint(epoch=epoch, value=1 / (epoch + number), checkpoint="x") for epoch in range(number % 40))
    return TrialState(trial=5, optuna_number=4, state="training", attempt=number, drawn=NOON, curve=curve)


def run(kills: int, folder: Path, seed: int) -> Outcome:
    """Kill `kills` children, each at a random moment of its rewriting <folder>/trial_state.json."""
    path = folder / "trial_state.json"
    began = time.monotonic()
    write_s = _median_write_s(path)
    moments = random.Random(seed)
    unreadable = lost = 0
    number = first = read_model(path, TrialState).attempt
    for _ in range(kills):
        _rewrite_and_kill(path, number + 1, rewrites=moments.randrange(2), after_s=moments.uniform(0, write_s))
        try:
            found = read_model(path, TrialState).attempt
        except UnreadableFileError as error:
            print(error, file=sys.stderr)
            unreadable += 1
            write_model(path, version(number))
            continue
        lost += found < number
        number = max(number, found)
    left = len(list(folder.iterdir())) - 1
    sweep_temp_files(folder)
    after = len(list(folder.iterdir())) - 1
    return Outcome(kills, unreadable, lost, left, after, number - first, time.monotonic() - began)


def _median_write_s(path: Path) -> float:
    durations = []
    for number in range(1, 8):
        began = time.monotonic()
        write_model(path, version(number))
        durations.append(time.monotonic() - began)
    return statistics.median(durations)


def _rewrite_and_kill(path: Path, number: int, *, rewrites: int, after_s: float) -> None:
    """Kill a rewriting child `after_s` after its so-many-th rewrite, which counts the same on a busy machine."""
    progress, is_progress = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        try:
            while os.getppid() == parent:  # nobody kills the child of a benchmark that was itself killed
                os.write(is_progress, b".")
                write_model(path, version(number))
                number += 1
        finally:
            os._exit(1)
    os.close(is_progress)
    for _ in range(1 + rewrites):
        os.read(progress, 1)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(progress)  # not earlier: a broken pipe would end the child by itself
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise RuntimeError(f"the child ended by itself with status {status}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=42, help="seed of the random moments")
    parser.add_argument("--folder", type=Path, help="where to write, to choose the file system (default: temporary)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        outcome = run(options.kills, Path(folder), options.seed)
    print(outcome)
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    sys.exit(main())

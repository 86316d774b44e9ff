"""How long the files of results/ take to be written for a large study, in seconds of the processor and of the clock.

`python -m benchmarks.results.analysis --trials 1000` writes a study of so many trials with 7 checkpoints each, without
pictures, and analyses it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from optimizer_daemon.analysis.analyze import analysis_of, analyze
from optimizer_daemon.analysis.gather import gather
from tests.scenarios.measured_study import Written, write_study

EPOCHS = (2, 4, 6, 8, 10, 12, 14)
R = TypeVar("R")


def main(arguments: Sequence[str]) -> int:
    """Print one line for each part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=1000, help="complete trials (default: 1000)")
    count = parser.parse_args(arguments).trials
    with tempfile.TemporaryDirectory() as folder:
        written = Written(trials=count, epochs=EPOCHS, step=0.2 / count, noise=0.003)
        study = write_study(Path(folder) / "study", written)
        now = datetime.now().astimezone()
        facts = _timed("reading and comparing", lambda: gather(study, now))
        assert len(facts.trials) == count
        _timed("the same with importances, correlations and configuration", lambda: analysis_of(study))
        _timed("everything, with the pictures", lambda: analyze(study))
    return 0


def _timed(what: str, work: Callable[[], R]) -> R:
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    print(f"{what}: {time.process_time() - cpu:.1f} s of the processor, {time.perf_counter() - wall:.1f} s", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

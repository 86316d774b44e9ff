"""How long a study of a thousand trials and more makes one wait: `python -m benchmarks.search.speed`.

Three measurements, each over real files:

    ask        TuningStudy on a SQLite file with 1,000 finished trials: one trial's draw, scores and end, by sampler
    books      what the daemon does at a trial's end besides, at 1,000 and 10,000 trial folders: collecting every trial
               and writing results/
    status     `optimizer-daemon status` as a whole command, at the same

Times are medians; CPU seconds are this process's or the command's own, wall seconds are those of the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from optuna.trial import TrialState as OptunaState
from optuna.trial import create_trial

from optimizer_daemon.optuna_adapter.feasible import FeasibleSpace
from optimizer_daemon.optuna_adapter.models import SAMPLERS
from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.results import all_trials, write_results
from optimizer_daemon.search.load import load_space
from optimizer_daemon.search.stage import Stage
from optimizer_daemon.trial_table import TrialTable
from shared.files import to_bytes, write_bytes
from shared.layout import StudyLayout
from shared.schemas import CurvePoint, TrialParams, TrialState

PRUNED = 0.2  # share of the trials
LIMITS_S = {"gp": 1.0, "auto": 1.0}
LIMIT_S = 0.2
STATUS_LIMIT_S = 1.0
NOW = datetime(2025, 11, 15, 10, 23, 45).astimezone()


class Clock:
    """Wall and CPU seconds of several runs."""

    def __init__(self) -> None:
        self._runs: list[tuple[float, float]] = []

    def run(self, work: Callable[[], object]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        self.add(time.perf_counter() - wall, time.process_time() - cpu)

    def add(self, wall: float, cpu: float) -> None:
        self._runs.append((wall, cpu))

    @property
    def medians(self) -> dict[str, float]:
        wall, cpu = (statistics.median(times) for times in zip(*self._runs, strict=True))
        return {"wall_s": round(wall, 4), "cpu_s": round(cpu, 4)}


def make_database(file: Path, count: int) -> None:
    """Write a study of that many finished trials of V2.1, made in memory's file system for speed."""
    space, rng = load_space("v2.1"), Random(0)
    distributions = FeasibleSpace.of(Stage.of(space)).distributions
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        made = Path(folder) / "study.db"
        study = TuningStudy.open("speed", f"sqlite:///{made}", space, seed=1, folder_id="speed")
        for _ in range(count):
            values = space.draw(rng)
            epochs, score = int(values["max_train_epochs"]), rng.random()
            pruned = rng.random() < PRUNED
            last = epochs // 2 if pruned else epochs
            study._study.add_trial(
                create_trial(
                    state=OptunaState.PRUNED if pruned else OptunaState.COMPLETE,
                    value=None if pruned else score,
                    params=values,
                    distributions=distributions,
                    user_attrs={"draw": {"stage": None, "values": values}},
                    intermediate_values={at: score + 0.1 * (1 - at / epochs) for at in range(2, last + 1, 2)},
                )
            )
        study.close()  # the last connection folds the log of writes into the file
        shutil.copy(made, file)


def make_folders(root: Path, count: int) -> StudyLayout:
    """Write that many trial folders as finished trials have them."""
    study, space, rng = StudyLayout(root), load_space("v2.1"), Random(0)
    root.mkdir()
    for number in range(1, count + 1):
        trial = study.trial(number)
        trial.evaluations.folder.mkdir(parents=True)
        values = space.complete(space.draw(rng))
        epochs = int(values["max_train_epochs"])
        params = TrialParams(
            trial=number, optuna_number=number - 1, parameters=values, derived=tuple(space.derived), origin="sampler",
            training_seed=42,
        )  # fmt: skip
        curve = tuple(
            CurvePoint(epoch=at, value=rng.random(), checkpoint=f"lora_trial_{number}-{at:06d}")
            for at in range(2, epochs + 1, 2)
        )
        state = TrialState(
            trial=number, optuna_number=number - 1, state="complete", attempt=1, drawn=NOW, started=NOW,
            ended=NOW + timedelta(hours=1), value=rng.random(), feasible=True, curve=curve,
        )  # fmt: skip
        trial.params.write_bytes(to_bytes(params))
        trial.state.write_bytes(to_bytes(state))
    return study


def measure_asks(database: Path, name: str, repeats: int) -> dict[str, Any]:
    """Time a trial's draw, six scores and end; the first one, which also imports, is left out."""
    space = load_space("v2.1")
    with tempfile.TemporaryDirectory(dir=database.parent) as folder:
        work = Path(folder) / "study.db"
        shutil.copy(database, work)
        study = TuningStudy.open("speed", f"sqlite:///{work}", space, seed=1, folder_id="speed", sampler=name)
        ask, whole = Clock(), Clock()

        def trial() -> None:
            draws = []
            (ask if warm else Clock()).run(lambda: draws.append(study.ask()))
            for epoch in range(2, 13, 2):
                study.report(draws[0].number, epoch, 0.5)
                study.peers()
            study.tell_complete(draws[0].number, 0.5, None)

        for turn in range(repeats + 2):  # `auto` takes two samplers in turns
            warm = turn >= 2
            (whole if warm else Clock()).run(trial)
        study.close()
    return {"ask": ask.medians, "trial": whole.medians}


def measure_books(study: StudyLayout, repeats: int) -> dict[str, float]:
    """Time what follows a trial's end: one trial's state is new, the others are known."""
    table = TrialTable(study)
    trials = all_trials(table, "speed", "combined_score", NOW)
    write_results(study, trials, table)
    clock = Clock()
    for turn in range(repeats):
        state = study.trial(turn + 1).state
        write_bytes(state, state.read_bytes())
        clock.run(lambda: write_results(study, all_trials(table, "speed", "combined_score", NOW), table))
    return clock.medians


def measure_status(study: StudyLayout, repeats: int) -> dict[str, float]:
    """Time the whole command."""
    command = [sys.executable, "-m", "optimizer_daemon.cli", "status", "--output-dir", str(study.root)]
    clock = Clock()
    for _ in range(repeats):
        before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        clock.add(time.perf_counter() - wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return clock.medians


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="finished trials of the database (default: 1000)")
    parser.add_argument("--folders", type=int, nargs="+", default=[1000, 10000], help="(default: 1000 10000)")
    parser.add_argument("--samplers", nargs="+", default=sorted(SAMPLERS.names))
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    found: dict[str, Any] = {
        "trials": options.trials, "load_before": os.getloadavg()[0], "asks": {}, "books": {}, "status": {}
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for count in options.folders:
            study = make_folders(folder / f"study_{count}", count)
            found["books"][str(count)] = measure_books(study, options.repeats)
            found["status"][str(count)] = measure_status(study, options.repeats)
            print(
                f"{count:6} folders  books {found['books'][str(count)]}  status {found['status'][str(count)]}",
                flush=True,
            )
        make_database(folder / "study.db", options.trials)
        for name in options.samplers:
            found["asks"][name] = measure_asks(folder / "study.db", name, options.repeats)
            print(f"{name:8} limit {LIMITS_S.get(name, LIMIT_S)} s  {found['asks'][name]}", flush=True)
    found["load_after"] = os.getloadavg()[0]
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

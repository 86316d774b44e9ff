"""kill -9 of the optimizer daemon alone, within one study: `python -m tests.scenarios.optimizer_kills --kills 20`.

A study on the tiny world by the native trainer and the real evaluator daemon. The optimizer daemon dies by SIGKILL at
random moments, spread over the study, and is started again by the same command; trainings, evaluators and the manager
live on. Then, from the database and the files alone: exactly as many finished trials as asked for, numbers without a
gap, no parameters drawn twice, start-up draws that are those of an undisturbed study, every invariant, and no process
left. `--scripted` does it with trainings and scores of milliseconds. Exit status 1 at a broken promise.
"""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import optuna
from optuna.trial import FrozenTrial

from optimizer_daemon.optuna_adapter.models import SAMPLERS
from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.search.load import load_space
from shared.files import read_model
from shared.schemas import Run, TrialState
from tests.scenarios.invariants import violations
from tests.scenarios.lab import Daemon, Lab, wait_until
from tests.scenarios.quick_lab import QuickLab

SEED = 42
PATIENCE_S = 900.0  # a busy machine may take long, a working one never does
FIRST_GUESS_S = 5.0  # of a trial; corrected as trials end

Say = Callable[[str], None]


def kill(lab: Lab, kills: int, trials: int, random: Random, say: Say, sampler: str = "tpe") -> list[str]:
    """Kill the daemon that often in one study of that many trials; return every broken promise."""
    done, complaints = 0, []
    manager = None if isinstance(lab, QuickLab) else lab.manager("--exit-when-finished")
    moments = sorted(random.uniform(0, trials) for _ in range(kills))
    places: Counter[str] = Counter()
    daemon, pace = _start(lab, trials, sampler), Pace()
    for moment in moments:
        if not pace.wait(lab, daemon, moment):
            break
        daemon.kill()
        done += 1
        place = _where(lab)
        places[place] += 1
        say(f"kill {done} at {moment:.2f} of {trials} trials, {place}")
        daemon = _start(lab, trials, sampler)
    if (status := daemon.wait(PATIENCE_S)) != 0:
        complaints.append(f"the daemon ended by itself with {status}: {daemon.said[-1500:]}")
    if done < kills:
        complaints.append(f"the study was over after {done} of {kills} kills")
    if manager is not None and (status := manager.wait(PATIENCE_S)) != 0:
        complaints.append(f"the manager ended with {status}: {manager.said[-1500:]}")
    with suppress(AssertionError):
        wait_until(lambda: not lab.processes(), 20)
    complaints += [f"a process is left: {command}" for command in lab.processes().values()]
    complaints += [*violations(lab.study, finished=trials), *_draws(lab, trials, sampler)]
    states = [read_model(trial.state, TrialState) for trial in lab.study.list_trials()]
    resumed, redone = sum(state.resumes for state in states), sum(state.attempt - 1 for state in states)
    say(
        f"{done} kills ({dict(places)}), {len(states)} trials, {resumed} trainings resumed and {redone} redone, "
        f"{len(complaints)} broken promises"
    )
    return complaints


def _start(lab: Lab, trials: int, sampler: str) -> Daemon:
    return lab.optimizer("--n-trials", trials, "--seed", SEED, "--sampler", sampler)


class Pace:
    """How long a trial takes here, for moments within one."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def wait(self, lab: Lab, daemon: Daemon, moment: float) -> bool:
        """Wait until that many trials are finished, a fraction by the clock; False when the daemon has ended."""
        whole = int(moment)
        while _finished(lab) < whole and daemon.exit_status is None:
            time.sleep(0.01)
        each_s = (time.monotonic() - self._begin) / whole if whole else FIRST_GUESS_S
        deadline = time.monotonic() + (moment - whole) * each_s
        while time.monotonic() < deadline and _finished(lab) == whole and daemon.exit_status is None:
            time.sleep(0.01)
        return daemon.exit_status is None


def _states(lab: Lab) -> Iterator[TrialState]:
    for trial in lab.study.list_trials():
        with suppress(FileNotFoundError):
            yield read_model(trial.state, TrialState)


def _finished(lab: Lab) -> int:
    return sum(state.state in ("complete", "pruned") for state in _states(lab))


def _where(lab: Lab) -> str:
    """What the daemon was at, as far as files tell."""
    if not lab.study.run.exists():
        return "before the study"
    if lab.trainers():
        return "a training alive"
    return "waiting for scores" if any(state.state == "trained" for state in _states(lab)) else "between trainings"


def _draws(lab: Lab, count: int, sampler: str) -> Iterator[str]:
    """What the database says of numbers and draws."""
    with contextlib.closing(sqlite3.connect(lab.study.database)) as connection:
        (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
    if verdict != "ok":
        yield f"integrity_check: {verdict}"
    run = read_model(lab.study.run, Run)
    trials: list[FrozenTrial] = optuna.load_study(study_name=run.study_name, storage=run.storage).trials
    finished = sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in trials)
    if finished != count:
        yield f"{finished} trials are finished, not {count}"
    if [trial.number for trial in trials] != list(range(count)):
        yield f"the numbers are {[trial.number for trial in trials]}"
    drawn = [trial.user_attrs["draw"]["values"] for trial in trials]
    if len({repr(sorted(values.items())) for values in drawn}) != len(drawn):
        yield f"parameters were drawn twice: {drawn}"
    start_up = SAMPLERS.load(sampler).start_up_trials or count
    with tempfile.TemporaryDirectory() as folder:
        space = load_space(str(lab.folder / "space.toml"))
        url = f"sqlite:///{folder}/undisturbed.db"
        undisturbed = TuningStudy.open("s", url, space, seed=SEED, folder_id="s", sampler="random")
        expected = [undisturbed.ask().values for _ in range(min(start_up, count))]
        undisturbed.close()
    if drawn[: len(expected)] != expected:
        yield f"the draws are {drawn}, without a kill {expected}"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="(default: 20)")
    parser.add_argument("--trials", type=int, default=12, help="finished trials of the study (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--sampler", default="tpe", help="(default: tpe)")
    parser.add_argument("--scripted", action="store_true", help="trainings and scores of milliseconds")
    parser.add_argument("--folder", type=Path, help="keep the study there (default: a temporary folder)")
    options = parser.parse_args()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with QuickLab(folder) if options.scripted else Lab(folder) as lab:
            complaints = kill(lab, options.kills, options.trials, Random(options.seed), say, options.sampler)
    for complaint in complaints:
        say(f"BROKEN: {complaint}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())

"""kill -9 at random: `python -m tests.scenarios.soak --kills 40`.

Real daemons and trainers run small studies on the tiny world. Every few seconds a victim dies by SIGKILL: the optimizer
daemon, the evaluator manager, an evaluator, or a trainer (its supervisor, the training itself, or both). Whoever is
gone is started again after a moment by the same command. When a study has had its share of kills it is stopped in
order, extended by one trial and left to finish; then every invariant is checked from the files alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

from shared.files import read_model
from shared.schemas import EvaluationState, TrialState
from tests.scenarios.invariants import violations
from tests.scenarios.lab import Daemon, Lab, wait_until

VICTIMS = ("manager", "evaluator", "optimizer", "trainer")
MANY_TRIALS = 1000  # never reached; the study is ended by a stop
SHORTEST_LIFE_S, LONGEST_LIFE_S = 0.3, 8.0
LONGEST_ABSENCE_S = 2.0
DEATHS_OF_A_TRAINING = 3  # one that dies a fourth time before it has saved anything has failed, and rightly so
DEATHS_OVER_A_CHECKPOINT = 3  # five in a row, while others are scored, make it suspect
EXPECTED = (0, -signal.SIGKILL)

Say = Callable[[str], None]


class Soak:
    """One study under fire.

    Args:
        lab: a study that was never started.
        random: decides who dies when.
        quotas: how often each victim has to die.
    """

    def __init__(self, lab: Lab, random: Random, quotas: dict[str, int], say: Say) -> None:
        self.lab = lab
        self.complaints: list[str] = []
        self.kills: Counter[str] = Counter()
        self._random = random
        self._left = Counter(quotas)
        self._say = say
        self._daemons: dict[str, Daemon] = {}
        self._absent_until: dict[str, float] = {}
        self._deaths: Counter[str] = Counter()  # of each trial's trainings

    def run(self) -> int:
        """Kill until the quotas are used up, let the study finish, check it; return how many trials it has."""
        while +self._left:
            self._revive()
            time.sleep(self._random.uniform(SHORTEST_LIFE_S, LONGEST_LIFE_S))
            self._strike()
        self._revive(at_once=True)
        wait_until(lambda: self._complete() >= 1, 300, "no trial was ever completed")
        return self._finish()

    def _revive(self, *, at_once: bool = False) -> None:
        """Start whoever is gone; somebody who went by himself is an error."""
        start: dict[str, Callable[[], Daemon]] = {
            "manager": self.lab.manager,
            "optimizer": lambda: self.lab.optimizer("--n-trials", MANY_TRIALS),
        }
        for name, begin in start.items():
            daemon = self._daemons.get(name)
            if daemon is not None and daemon.exit_status is None:
                continue
            if daemon is not None and daemon.exit_status not in EXPECTED:
                self.complaints.append(f"the {name} ended by itself with {daemon.exit_status}: {daemon.said[-1500:]}")
            if at_once or time.monotonic() >= self._absent_until.get(name, 0.0):
                self._daemons[name] = begin()

    def _strike(self) -> None:
        """Kill one process of a kind that has deaths left, when there is one."""
        spared = ("manager", "evaluator", "optimizer") if self._has_suspects() else ()
        kinds = [kind for kind in VICTIMS if self._left[kind] > 0 and kind not in spared]
        self._random.shuffle(kinds)
        for kind in kinds:
            if self._kill_one(kind):
                self._left[kind] -= 1
                self.kills[kind] += 1
                return

    def _has_suspects(self) -> bool:
        """Whether one more death or two would have a checkpoint suspected, and rightly so, of killing evaluators."""
        for trial in self.lab.study.list_trials():
            with suppress(FileNotFoundError):
                records = read_model(trial.evaluations.state, EvaluationState).checkpoints
                if any(record.interruptions_in_a_row >= DEATHS_OVER_A_CHECKPOINT for record in records):
                    return True
        return False

    def _kill_one(self, kind: str) -> bool:
        if kind in ("manager", "optimizer"):
            daemon = self._daemons.get(kind)
            if daemon is None or daemon.exit_status is not None:
                return False
            daemon.kill()
            self._absent_until[kind] = time.monotonic() + self._random.uniform(0.0, LONGEST_ABSENCE_S)
            return True
        held = self.lab.trainers() if kind == "trainer" else self.lab.evaluators()
        spared = {name for name, deaths in self._deaths.items() if deaths >= DEATHS_OF_A_TRAINING}
        trials = sorted(set(held) - (spared if kind == "trainer" else set()))
        if not trials:
            return False
        trial = self._random.choice(trials)
        pids = sorted(held[trial])
        if kind == "trainer":
            self._deaths[trial] += 1
        together = kind == "trainer" and self._random.random() < 0.3
        for pid in pids if together else [self._random.choice(pids)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return True

    def _finish(self) -> int:
        """Stop in order, extend the study to one more trial, and let both daemons end by themselves."""
        # Before it has its lock a daemon is just a program that SIGTERM ends.
        wait_until(lambda: "study opened" in self._daemons["optimizer"].said, 120, "the optimizer does not start")
        wait_until(lambda: "manager started" in self._daemons["manager"].said, 120, "the manager does not start")
        for name in ("optimizer", "manager"):
            status = self._daemons[name].stop()
            if status != 128 + signal.SIGTERM:
                self.complaints.append(f"an orderly stop of the {name} ended with {status}")
        target = self._complete() + self._unfinished() + 1
        manager = self.lab.manager("--exit-when-finished")
        optimizer = self.lab.optimizer("--n-trials", target)
        for daemon in (optimizer, manager):
            status = daemon.wait(600)
            if status != 0:
                self.complaints.append(f"the {daemon.name} ended with {status}: {daemon.said[-1500:]}")
        wait_until(lambda: not self.lab.processes(), 20, f"processes are left: {self.lab.processes()}")
        self.complaints += violations(self.lab.study, finished=target)
        self._say(f"study finished: {self._outcome()}")
        return len(self.lab.study.list_trials())

    def _states(self) -> list[TrialState]:
        found = []
        for trial in self.lab.study.list_trials():
            with suppress(FileNotFoundError):
                found.append(read_model(trial.state, TrialState))
        return found

    def _complete(self) -> int:
        return sum(state.state == "complete" for state in self._states())

    def _unfinished(self) -> int:
        return sum(state.ended is None for state in self._states())

    def _outcome(self) -> str:
        states = self._states()
        resumes, redos = sum(s.resumes for s in states), sum(s.attempt - 1 for s in states)
        counts = Counter(state.state for state in states)
        return f"{dict(counts)}, {resumes} resumed and {redos} redone trainings, {dict(self.kills)} kills"


def soak(folder: Path, kills: int, studies: int, seed: int, say: Say) -> list[str]:
    """Run the studies one after the other; return every broken promise.

    Args:
        kills: of each victim, in all studies together.
    """
    random, complaints = Random(seed), []
    for index in range(studies):
        quota = kills // studies + (index < kills % studies)
        home = folder / f"study_{index}"
        home.mkdir()
        with Lab(home) as lab:
            battle = Soak(lab, random, dict.fromkeys(VICTIMS, quota), say)
            battle.run()
            complaints += [f"study {index}: {sentence}" for sentence in battle.complaints]
    return complaints


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="of each victim (default: 40)")
    parser.add_argument("--studies", type=int, default=4, help="that they are spread over (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the studies there (default: a temporary folder)")
    options = parser.parse_args()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        complaints = soak(folder, options.kills, options.studies, options.seed, say)
    for complaint in complaints:
        say(f"BROKEN: {complaint}")
    say(f"{options.kills} kills of each of {', '.join(VICTIMS)}: {len(complaints)} broken promises")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())

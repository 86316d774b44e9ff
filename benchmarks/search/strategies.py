"""Ways to spend a budget of training epochs on a task: ours, and those that Optuna offers."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, PercentilePruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial

from benchmarks.search.tasks import Task, space, stage
from optimizer_daemon.optuna_adapter.draws import DRAW
from optimizer_daemon.optuna_adapter.feasible import FeasibleSpace
from optimizer_daemon.optuna_adapter.models import SAMPLERS
from optimizer_daemon.optuna_adapter.sampler import FeasibleSampler
from optimizer_daemon.search.curves import Curve
from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.pruning import Pruner, PrunerName

MOST_ASKS = 3_000  # a strategy that draws what is forbidden spends no epochs on it
FINALISTS = 3
FINALIST_SHARE = 0.2  # of the budget


@dataclass(frozen=True)
class Point:
    """What a strategy would recommend when so many epochs were trained."""

    epochs: int
    regret: float


@dataclass(frozen=True)
class Run:
    """One study of a strategy.

    Args:
        points: after each trial, in order.
        trials: how many were trained.
        infeasible: how many draws broke a rule.
    """

    points: list[Point]
    trials: int
    infeasible: int

    def at(self, epochs: float) -> float:
        """Return the regret of what is recommended after so many epochs; 1, that of a random choice, before any."""
        return next((point.regret for point in reversed(self.points) if point.epochs <= epochs), 1.0)

    def epochs_to(self, regret: float) -> float:
        """Return after how many epochs the recommendation is that good and stays so; infinity if never."""
        reached = float("inf")
        for point in reversed(self.points):
            if point.regret > regret:
                break
            reached = point.epochs
        return reached


Strategy = Callable[[Task, int, int], Run]
"""(task, epochs, seed) -> what came of it."""


class _Ledger:
    """What was measured so far, and the recommendation that follows."""

    def __init__(self, task: Task, budget: int) -> None:
        self._task, self._budget = task, budget
        self._measured: dict[int, tuple[Mapping[str, Value], list[float]]] = {}
        self.spent = 0
        self.trials = 0
        self.points: list[Point] = []

    def add(self, values: Mapping[str, Value], epochs: int, score: float | None, again: int | None = None) -> None:
        """Count a training; `again` is the trial that it repeats."""
        self.spent += epochs
        number = self.trials if again is None else again
        if again is None:
            self.trials += 1
        if self.spent > self._budget:
            return
        if score is not None:
            self._measured.setdefault(number, (values, []))[1].append(score)
        if self._measured:
            best, _ = min(self._measured.values(), key=lambda known: self._judged(known[1]))
            self.points.append(Point(self.spent, self._task.final(best)))

    def _judged(self, scores: list[float]) -> float:
        """A repeated trial is judged by its repetitions: the first score was chosen for being low."""
        repeated = any(len(known) > 1 for _, known in self._measured.values())
        if not repeated:
            return scores[0]
        return statistics.fmean(scores[1:]) if len(scores) > 1 else float("inf")

    def best(self, count: int) -> list[tuple[int, Mapping[str, Value]]]:
        ranked = sorted(self._measured.items(), key=lambda known: known[1][1][0])
        return [(number, values) for number, (values, _) in ranked[:count]]


def ours(model: str, pruner: PrunerName, finalists: bool, task: Task, budget: int, seed: int) -> Run:
    """Feasible draws of one of our samplers, our pruner, and the best trained again where `finalists` says so."""
    feasible = FeasibleSpace.of(stage())
    sampler = FeasibleSampler(stage(), seed, SAMPLERS.load(model))
    study = optuna.create_study()
    judge, ledger = Pruner(pruner), _Ledger(task, budget)
    peers: list[Curve] = []
    search = budget * (1 - FINALIST_SHARE) if finalists else budget
    while ledger.spent < search:
        number = len(study.get_trials(deepcopy=False))
        asked = create_trial(state=TrialState.RUNNING, params={}, distributions={})
        asked.number = number
        values = sampler.draw(study, asked)
        horizon = int(values["max_train_epochs"])
        seen: dict[int, float] = {}
        stopped = False
        for epoch, score in task.curve(values, _noise(task, seed, number)).items():
            seen[epoch] = score
            if judge.objection(Curve.of(horizon, seen), peers) is not None:
                stopped = True
                break
        final = None if stopped else seen[horizon]
        peers.append(Curve.of(horizon, seen, final))
        study.add_trial(
            create_trial(
                state=TrialState.PRUNED if stopped else TrialState.COMPLETE,
                value=final,
                params={name: values[name] for name in feasible.distributions},
                distributions=feasible.distributions,
                user_attrs={DRAW: {"values": values}},
                intermediate_values=seen,
            )
        )
        ledger.add(values, max(seen), final)
    if finalists:
        for number, values in ledger.best(FINALISTS):
            curve = task.curve(values, _noise(task, seed, 10_000 + number))
            ledger.add(values, max(curve), curve[max(curve)], again=number)
    return Run(ledger.points, ledger.trials, 0)


def optuna_s(
    make_sampler: Callable[[int], BaseSampler],
    make_pruner: Callable[[], BasePruner],
    task: Task,
    budget: int,
    seed: int,
    share: float = 1.0,
) -> Run:
    """A sampler and a pruner of Optuna's, as its users have them: what breaks a rule is told as pruned.

    Every training ends after `share` of its epochs, and is judged by that.
    """
    distributions = FeasibleSpace.of(stage()).distributions
    study = optuna.create_study(sampler=make_sampler(seed), pruner=make_pruner())
    ledger, infeasible = _Ledger(task, budget), 0
    for number in range(MOST_ASKS):
        if ledger.spent >= budget:
            break
        trial = study.ask(distributions)
        values = {name: space().parameters[name].snap(value) for name, value in trial.params.items()}
        if not space().is_feasible(values):
            infeasible += 1
            study.tell(trial, state=TrialState.PRUNED)
            continue
        last = share * int(values["max_train_epochs"])
        curve = {
            epoch: score for epoch, score in task.curve(values, _noise(task, seed, number)).items() if epoch <= last
        }
        epoch, score, stopped = 0, None, False
        for epoch, score in curve.items():
            trial.report(score, epoch)
            if trial.should_prune():
                stopped = True
                break
        if stopped:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, score)
        ledger.add(values, epoch, None if stopped else score)
    return Run(ledger.points, ledger.trials, infeasible)


def twice(strategy: Strategy, task: Task, budget: int, seed: int) -> Run:
    """A strategy with twice the budget, its epochs counted half."""
    run = strategy(task, 2 * budget, seed)
    return Run([Point(point.epochs // 2, point.regret) for point in run.points], run.trials, run.infeasible)


def _noise(task: Task, seed: int, number: int) -> Random:
    """The same for the same trial number of every strategy."""
    return Random(f"noise/{task.family}/{task.seed}/{seed}/{number}")


def _gp(seed: int) -> BaseSampler:
    return GPSampler(seed=seed)


def strategies() -> dict[str, Strategy]:
    """Every strategy by name; the first is what the others are compared with."""
    none, median = NopPruner, MedianPruner
    known: dict[str, Strategy] = {
        "Optuna default: TPE + Median": partial(optuna_s, _tpe, median),
        "TPE without pruner": partial(optuna_s, _tpe, none),
        "TPE + Percentile 75": partial(optuna_s, _tpe, partial(PercentilePruner, 75.0)),
        "TPE + Hyperband": partial(optuna_s, _tpe, partial(HyperbandPruner, min_resource=2, max_resource=20)),
        "GP without pruner": partial(optuna_s, _gp, none),
        "random": partial(optuna_s, _random, none),
        "random, twice the budget": partial(twice, partial(optuna_s, _random, none)),
        "every training cut at half": partial(optuna_s, _tpe, none, share=0.5),
        "ours: tpe + median": partial(ours, "tpe", "median", False),
        "ours: gp + median": partial(ours, "gp", "median", False),
        "ours: auto + median": partial(ours, "auto", "median", False),
        "ours: auto + median + finalists": partial(ours, "auto", "median", True),
    }
    return known


def _tpe(seed: int) -> BaseSampler:
    return TPESampler(seed=seed)


def _random(seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


def quietly() -> None:
    """Silence what Optuna says of each trial, and that some of its parts are new."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

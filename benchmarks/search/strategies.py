"""Ways to spend a budget of training epochs on a task: ours, and those that Optuna offers."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
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
from optimizer_daemon.search.curves import Curve, Forecast
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


@dataclass(frozen=True)
class _Trained:
    """A trial of ours; `final` is None where it was stopped or failed, `curve` where it failed."""

    values: Mapping[str, Value]
    epochs: int
    curve: Curve | None
    final: float | None


@lru_cache(maxsize=1)  # what is recommended afterwards changes no draw
def _search(model: str, pruner: PrunerName, task: Task, budget: int, seed: int) -> tuple[_Trained, ...]:
    """Draw by one of our samplers and stop by our pruner until the budget is spent."""
    feasible = FeasibleSpace.of(stage())
    sampler = FeasibleSampler(stage(), seed, SAMPLERS.load(model))
    study = optuna.create_study()
    judge = Pruner(pruner)
    peers: list[Curve] = []
    trained: list[_Trained] = []
    while sum(known.epochs for known in trained) < budget:
        asked = create_trial(state=TrialState.RUNNING, params={}, distributions={})
        asked.number = len(trained)
        values = sampler.draw(study, asked)
        horizon = int(values["max_train_epochs"])
        training = task.training(values, _noise(task, seed, len(trained)))
        seen: dict[int, float] = {}
        stopped_at = None
        for now, epoch, score in training.scores:
            if math.isfinite(score):
                seen[epoch] = score
            if now < training.epochs and judge.objection(Curve.of(horizon, seen), peers) is not None:
                stopped_at = now
                break
        final = training.final if stopped_at is None else None
        curve = Curve.of(horizon, seen, final) if stopped_at or final is not None else None
        if curve is not None:
            peers.append(curve)
        trained.append(_Trained(values, stopped_at or training.epochs, curve, final))
        study.add_trial(
            create_trial(
                state=TrialState.PRUNED if stopped_at else TrialState.FAIL if final is None else TrialState.COMPLETE,
                value=final,
                params={name: values[name] for name in feasible.distributions},
                distributions=feasible.distributions,
                user_attrs={DRAW: {"values": values}},
                intermediate_values=seen,
            )
        )
    return tuple(trained)


def ours(model: str, pruner: PrunerName, finalists: bool, task: Task, budget: int, seed: int) -> Run:
    """Feasible draws of one of our samplers, our pruner, and the best trained again where `finalists` says so."""
    ledger = _Ledger(task, budget)
    for known in _search(model, pruner, task, budget, seed):
        if finalists and ledger.spent >= budget * (1 - FINALIST_SHARE):
            break
        ledger.add(known.values, known.epochs, known.final)
    if finalists:
        for number, values in ledger.best(FINALISTS):
            repeated = task.training(values, _noise(task, seed, 10_000 + number))
            ledger.add(values, repeated.epochs, repeated.final, again=number)
    return Run(ledger.points, ledger.trials, 0)


def ours_by_forecast(model: str, pruner: PrunerName, task: Task, budget: int, seed: int) -> Run:
    """The same search; recommended is the finished trial with the best forecast, not the best measured score."""
    trained = _search(model, pruner, task, budget, seed)
    points, spent = [], 0
    for count, last in enumerate(trained, start=1):
        spent += last.epochs
        finished = [known for known in trained[:count] if known.final is not None]
        if spent > budget or not finished:
            continue
        curves = [known.curve for known in finished if known.curve is not None]
        forecast = Forecast(curves)
        ends = [forecast.end(curve) or 0.0 for curve in curves]
        points.append(Point(spent, task.final(finished[ends.index(min(ends))].values)))
    return Run(points, len(trained), 0)


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
        horizon = int(values["max_train_epochs"])
        training = task.training(values, _noise(task, seed, number))
        if share < 1.0:
            training = training.cut(share * horizon)
        stopped_at = None
        for now, epoch, score in training.scores:
            trial.report(score, epoch)
            if now < training.epochs and trial.should_prune():
                stopped_at = now
                break
        final = training.final if stopped_at is None else None
        if final is None:
            study.tell(trial, state=TrialState.PRUNED if stopped_at else TrialState.FAIL)
        else:
            study.tell(trial, final)
        ledger.add(values, stopped_at or training.epochs, final)
    return Run(ledger.points, ledger.trials, infeasible)


def repaired(make_sampler: Callable[[int], BaseSampler], task: Task, budget: int, seed: int) -> Run:
    """A sampler of Optuna's whose draws are moved to what is nearest to them and breaks no rule; nothing is pruned.

    Optuna's GP learns nothing from a pruned trial: where its best point is forbidden it would draw it for ever.
    """
    feasible, rng = FeasibleSpace.of(stage()), Random(seed)
    study = optuna.create_study(sampler=make_sampler(seed))
    ledger, infeasible = _Ledger(task, budget), 0
    while ledger.spent < budget:
        trial = study.ask(feasible.distributions)
        values = {name: space().parameters[name].snap(value) for name, value in trial.params.items()}
        study.tell(trial, state=TrialState.FAIL)
        if not space().is_feasible(values):
            infeasible += 1
            values = feasible.nearest(values, rng)
        training = task.training(values, _noise(task, seed, ledger.trials))
        if training.final is not None:
            study.add_trial(create_trial(params=values, distributions=feasible.distributions, value=training.final))
        ledger.add(values, training.epochs, training.final)
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
        "GP without pruner, draws repaired": partial(repaired, _gp),
        "random": partial(optuna_s, _random, none),
        "random, twice the budget": partial(twice, partial(optuna_s, _random, none)),
        "every training cut at half": partial(optuna_s, _tpe, none, share=0.5),
        "ours: tpe + median": partial(ours, "tpe", "median", False),
        "ours: gp + median": partial(ours, "gp", "median", False),
        "ours: auto + median": partial(ours, "auto", "median", False),
        "ours: auto + median + finalists": partial(ours, "auto", "median", True),
        "ours: auto + median, by forecast": partial(ours_by_forecast, "auto", "median"),
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
    warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)  # Optuna's pruner, of unscored ones

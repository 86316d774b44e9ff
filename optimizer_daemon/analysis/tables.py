"""top_N_trials.csv: the best trials, one a line, every figure as it was measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from optimizer_daemon.analysis.facts import PIXELS, StudyFacts, TrialFacts

_FIRST = ("rank", "trial", "optuna_number", "value", "feasible", "in_tie_set", "epoch", "checkpoint")
_LAST = ("training_s", "started", "ended")


def top_trials_csv(facts: StudyFacts, count: int) -> str:
    """Return the table of the best `count` complete trials; those that failed their gate come last.

    `value` is the objective, lower is better. A cell is empty where nothing was measured.
    """
    trials = facts.ranking[:count]
    scores = _names(trials, lambda trial: [] if trial.final is None else list(trial.final.metrics.scores))
    metrics = _names(trials, lambda trial: [] if trial.final is None else list(trial.final.metrics.metrics))
    metrics = [*(name for name in PIXELS if name in metrics), *(name for name in metrics if name not in PIXELS)]
    parameters = _names(trials, lambda trial: list(trial.parameters))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    figures = [name for metric in metrics for name in (metric, f"{metric}_std")]
    table.writerow([*_FIRST, *(_score(name) for name in scores), *figures, *parameters, *_LAST])
    for rank, trial in enumerate(trials, 1):
        table.writerow([*_row(facts, rank, trial, scores, metrics), *_ending(trial, parameters)])
    return text.getvalue()


def _score(name: str) -> str:
    return name if name.endswith("_score") else f"{name}_score"


def _row(
    facts: StudyFacts, rank: int, trial: TrialFacts, scores: Sequence[str], metrics: Sequence[str]
) -> list[object]:
    final = trial.final
    tied = facts.standing is not None and trial.number in facts.standing.tied
    row: list[object] = [rank, trial.number, trial.optuna_number, trial.value, trial.may_win, tied]
    row += [None, None] if final is None else [final.epoch, final.name]
    row += [None if final is None else final.scored(name) for name in scores]
    for name in metrics:
        row += [None, None] if final is None else [final.mean(name), final.std(name)]
    return row


def _ending(trial: TrialFacts, parameters: Sequence[str]) -> list[object]:
    times = [None if time is None else time.isoformat() for time in (trial.state.started, trial.state.ended)]
    return [*(trial.parameters.get(name) for name in parameters), trial.training_s, *times]


def _names(trials: Sequence[TrialFacts], names_of: Callable[[TrialFacts], list[str]]) -> list[str]:
    return list(dict.fromkeys(name for trial in trials for name in names_of(trial)))

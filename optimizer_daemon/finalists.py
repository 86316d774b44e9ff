"""The last trials of a stage train its best configurations again, each with a fresh seed.

The best of many scores owes some of its lead to luck; the score of a second training does not, for nobody chose it. So
once everything else is scored the last `--finalists` trials repeat the best configurations, and the winner is named
from them. A finalist counts as one as long as no search comes after it: with a larger `--n-trials` at least one more
trial is searched, the earlier finalists are then trials like all others, and new ones are made at the new end.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import mean
from typing import TYPE_CHECKING

from optimizer_daemon.search.expressions import Value
from shared.failpoints import reach
from shared.logs import log_change

if TYPE_CHECKING:
    from optimizer_daemon.optuna_adapter.study import Ended, TuningStudy

SEEDS_END = 2**31
"""Fresh seeds are below it: every random generator of every trainer takes them."""

_Configuration = tuple[tuple[str, Value], ...]
"""The values of a draw by name."""

_log = logging.getLogger(__name__)


def fresh_seed(study_seed: int, number: int) -> int:
    """Return the training seed of the finalist that is trial `number`, counted from 0; never the study's own."""
    rng = Random(f"{study_seed}/finalist/{number}")
    while (seed := rng.randrange(SEEDS_END)) == study_seed:
        pass
    return seed


@dataclass(frozen=True)
class Repeat:
    """A configuration to train again.

    Args:
        of: number of the trial that had it first, counted from 0.
        values: a value for each declared parameter.
        score: mean of its measured scores.
        request: identity of this repetition, so that a daemon killed in the middle makes no second one.
    """

    of: int
    values: dict[str, Value]
    score: float
    request: str


def due(ended: Iterable[Ended], stage: str | None, left: int, count: int, running: Iterable[int] = ()) -> Repeat | None:
    """Return the next finalist; None as long as the search goes on.

    Args:
        ended: every trial that the study was told about.
        stage: whose trials count.
        left: how many trials the stage still lacks.
        count: how many of its last ones are finalists, at most.
        running: trials that running finalists repeat, counted from 0.
    """
    ended = list(ended)
    known = {trial.draw.number: _configuration(trial) for trial in ended}
    trials = [trial for trial in ended if trial.draw.stage == stage]
    last_searched = max((trial.draw.number for trial in trials if not trial.draw.enqueued), default=-1)
    taken = {known[number] for number in running}
    failures: Counter[_Configuration] = Counter()
    scores: dict[_Configuration, dict[int, float]] = {}  # of each trial that had it
    for trial in trials:
        of = trial.draw.finalist_of
        if of is not None and trial.draw.number > last_searched:
            if trial.value is None:
                failures[known[of]] += 1
            else:
                taken.add(known[of])
        elif trial.value is not None and trial.reason is None:
            scores.setdefault(known[trial.draw.number], {})[trial.draw.number] = trial.value
    candidates = {name: mean(values.values()) for name, values in scores.items() if name not in taken}
    # Where all of them are made already, a larger target means more search, not the next best as further finalists.
    if not 1 <= left <= min(count - len(taken), len(candidates)):
        return None
    best = min(candidates, key=lambda name: (failures[name], candidates[name]))
    first = min(scores[best])
    request = f"finalist of {first} after {last_searched}, {failures[best]} failed"
    return Repeat(first, dict(best), candidates[best], request)


def line_up(study: TuningStudy, stage: str | None, left: int, count: int, running: Sequence[int | None]) -> bool:
    """Put the next finalist in line where one is due.

    Args:
        stage, left, count: as for `due`.
        running: of each running trial, which one it repeats as a finalist, counted from 0; None for the others.
    Returns:
        False where nothing can be drawn before the running trials are scored.
    """
    if not 1 <= left <= count or study.queued:
        return True
    finalists = [of for of in running if of is not None]
    if len(finalists) < len(running):
        return False
    repeat = due(study.ended(), stage, left, count, finalists)
    if repeat is not None:
        number = study.enqueue(repeat.values, repeat.request, finalist_of=repeat.of)
        log_change(_log, "finalist", trial=number + 1, repeats=repeat.of + 1, with_score=repeat.score)
        reach("optimizer.finalist_in_line")
    return True


def _configuration(trial: Ended) -> _Configuration:
    return tuple(sorted(trial.draw.values.items()))

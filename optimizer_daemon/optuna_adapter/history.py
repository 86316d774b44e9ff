"""What a draw learns from: past trials as a study that Optuna's samplers read and whose answers nobody stores.

A sampler on the real study would write its own attributes to the database, learn nothing of what a stopped training
would have reached, and draw otherwise after a restart. On this view a draw is a function of the trials alone.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import islice

from optuna import Study
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optimizer_daemon.search.pareto import fronts


class History(Study):
    """Finished and running trials, and one more that is being drawn: `asking`.

    Args:
        directions: one for each objective.
        trials: in the order they were drawn; a running one has its parameters.
    """

    def __init__(self, directions: Sequence[StudyDirection], trials: Iterable[FrozenTrial]) -> None:
        storage = InMemoryStorage()  # for what a sampler writes down beside its draw
        study = storage.create_new_study(directions, "history")
        super().__init__("history", storage)
        self._past = list(trials)
        self.asking = storage.get_trial(storage.create_new_trial(study))

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        del deepcopy, use_cache  # samplers only read
        return [trial for trial in self._past if states is None or trial.state in states]

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        return self._get_trials(deepcopy, states)

    @property
    def finished(self) -> list[FrozenTrial]:
        """The trials with a value."""
        return self._get_trials(states=(TrialState.COMPLETE,))

    def of(self, names: Iterable[str]) -> History:
        """Return the part of it in which all of these parameters were drawn."""
        wanted = set(names)
        return History(self.directions, (trial for trial in self._past if wanted <= trial.params.keys()))

    def newest(self, count: int) -> History:
        """Return it with at most this many finished trials: the best half of them and the latest ones.

        What runs stays. For models whose cost grows faster than the number of trials.
        """
        finished = self.finished
        if len(finished) <= count:
            return self
        best = {trial.number for trial in islice(best_first(finished, self.directions), count // 2)}
        latest = [trial.number for trial in reversed(finished) if trial.number not in best]
        kept = best | set(latest[: count - len(best)])
        running = TrialState.RUNNING
        return History(
            self.directions, (trial for trial in self._past if trial.state is running or trial.number in kept)
        )

    def evenly_constrained(self) -> History:
        """Return it with the same constraints on every finished trial; one that met no limit is well within it."""
        names = {name for trial in self.finished for name in trial.constraints}
        if not names:
            return self
        return History(
            self.directions,
            (
                trial if names <= trial.constraints.keys() else _within(trial, names - trial.constraints.keys())
                for trial in self._past
            ),
        )


def best_first(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> Iterator[FrozenTrial]:
    """Yield the trials front by front, those that failed their gate last; with one objective that is by its value."""
    signs = [-1.0 if direction is StudyDirection.MAXIMIZE else 1.0 for direction in directions]
    for infeasible in (False, True):
        group = [trial for trial in trials if is_infeasible(trial) is infeasible]
        points = [tuple(sign * value for sign, value in zip(signs, trial.values, strict=True)) for trial in group]
        for front in fronts(points):
            yield from (group[place] for place in front)


def with_values(trial: FrozenTrial, values: Sequence[float]) -> FrozenTrial:
    """Return a trial as if it had come to its end with these values."""
    changed = copy.copy(trial)
    changed.state = TrialState.COMPLETE
    changed.values = list(values)
    return changed


def _within(trial: FrozenTrial, names: Iterable[str]) -> FrozenTrial:
    changed = copy.copy(trial)
    changed.system_attrs = {**trial.system_attrs, **{f"constraints:{name}": -1.0 for name in names}}
    return changed


def is_infeasible(trial: FrozenTrial) -> bool:
    """Tell whether a measured limit, such as its gate, keeps a trial from winning."""
    return any(value > 0 for value in trial.constraints.values())

"""The front of a study with several objectives: which trials are on it, which one is its knee, and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping

from optimizer_daemon.search.objectives import losses
from optimizer_daemon.search.pareto import Point, front_of, knee_distances
from shared.schemas import AllTrials, Objective, TrialResult


def candidates(trials: AllTrials) -> list[TrialResult]:
    """Return the complete trials that passed their gate and have every objective."""
    names = {objective.name for objective in trials.objectives}
    return [
        trial
        for trial in trials.trials
        if trial.state == "complete" and trial.feasible is not False and names <= trial.values.keys()
    ]


def points_of(rows: list[TrialResult], trials: AllTrials) -> list[Point]:
    """Return the trials as points, lower is better."""
    return [losses(trial.values, trials.objectives) for trial in rows]


def front(trials: AllTrials) -> list[TrialResult]:
    """Return the trials that no other one is better than in every objective, the best in the first objective first."""
    known = candidates(trials)
    points = points_of(known, trials)
    return [known[place] for place in sorted(front_of(points), key=lambda place: (points[place], known[place].trial))]


def knee(members: list[TrialResult], trials: AllTrials) -> TrialResult | None:
    """Return the member with the most of everything; at a tie the one with the better score, then the earlier one."""
    distances = knee_distances(points_of(members, trials))
    ranked = sorted(zip(distances, members, strict=True), key=lambda known: (-known[0], known[1].value, known[1].trial))
    return ranked[0][1] if ranked else None


def shown_values(values: Mapping[str, float]) -> str:
    """Return objectives as text, for a line of people's."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


def meaning(objective: Objective) -> str:
    """Say in words what an objective's value is, and which end is better."""
    better = "lower" if objective.direction == "minimise" else "higher"
    distance = "" if objective.target is None else f"distance to {objective.target:g}, "
    return f"{objective.name}: {distance}{better} is better"

"""The front of a study with several objectives, as a file and as a picture: members, knee, hypervolume by trial."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from optimizer_daemon.optuna_adapter.hypervolume import hypervolume
from optimizer_daemon.search.pareto import Point, front_of, knee_distances, reference_point
from optimizer_daemon.trade_offs import candidates, front, knee, meaning, points_of
from shared.layout import StudyLayout
from shared.schemas import AllTrials, FrontGrowth, FrontMember, Objective, ParetoFront, TrialResult

MEASURED, INFEASIBLE, FRONT, KNEE = "#4878a8", "#c0c0c0", "#c04848", "#d08030"


def pareto_front(study: StudyLayout, trials: AllTrials) -> ParetoFront:
    """Return what pareto_front.json says of these trials."""
    members = front(trials)
    best = knee(members, trials)
    empty = ParetoFront(study_name=trials.study_name, updated=trials.updated, objectives=trials.objectives, front=())
    if best is None:
        return empty
    corner = reference_point(points_of(candidates(trials), trials))
    signs = [1.0 if objective.direction == "minimise" else -1.0 for objective in trials.objectives]
    history = _growth(trials, corner)
    distances = knee_distances(points_of(members, trials))
    return empty.model_copy(
        update={
            "front": tuple(
                _member(study, trial, distance, trials) for trial, distance in zip(members, distances, strict=True)
            ),
            "knee": best.trial,
            "reference_point": {
                objective.name: sign * value
                for objective, sign, value in zip(trials.objectives, signs, corner, strict=True)
            },
            "hypervolume": history[-1].hypervolume,
            "history": history,
        }
    )


def _member(study: StudyLayout, trial: TrialResult, distance: float, trials: AllTrials) -> FrontMember:
    assert trial.value is not None, "a complete trial has a score"
    return FrontMember(
        trial=trial.trial,
        optuna_number=trial.optuna_number,
        values={objective.name: trial.values[objective.name] for objective in trials.objectives},
        value=trial.value,
        checkpoint=study.trial(trial.trial).final_checkpoint.relative_to(study.root).as_posix(),
        knee_distance=distance,
    )


def _growth(trials: AllTrials, corner: Point) -> tuple[FrontGrowth, ...]:
    """Return the hypervolume after each trial; only what a trial adds to the front is computed again."""
    known = sorted(candidates(trials), key=lambda trial: (trial.ended is None, trial.ended or 0, trial.trial))
    members: list[Point] = []
    volume, history = 0.0, []
    for trial, point in zip(known, points_of(known, trials), strict=True):
        grown = [*members, point]
        kept = front_of(grown)
        if len(members) in kept:
            members = [grown[place] for place in kept]
            volume = hypervolume(members, corner)
        history.append(FrontGrowth(trial=trial.trial, hypervolume=volume))
    return tuple(history)


def pareto_figure(trials: AllTrials, found: ParetoFront) -> Figure:
    """A panel for each pair of objectives with all measured trials, the front and its knee; one for the hypervolume."""
    pairs = list(itertools.combinations(trials.objectives, 2))
    figure = Figure(figsize=(6 * (len(pairs) + 1), 5), layout="constrained")
    *panels, growth = figure.subplots(1, len(pairs) + 1)
    figure.suptitle(f"{trials.study_name}: {' against '.join(known.name for known in trials.objectives)}")
    for axes, (first, second) in zip(panels, pairs, strict=True):
        _draw_pair(axes, trials, found, first, second)
    growth.set(xlabel="complete trials, as they ended", ylabel="hypervolume (higher is better)", title="hypervolume")
    volumes = [known.hypervolume for known in found.history]
    growth.step(range(1, len(volumes) + 1), volumes, where="post", color=FRONT)
    growth.xaxis.set_major_locator(MaxNLocator(integer=True))
    growth.grid(alpha=0.3)
    return figure


def _draw_pair(axes: Axes, trials: AllTrials, found: ParetoFront, first: Objective, second: Objective) -> None:
    axes.set(xlabel=meaning(first), ylabel=meaning(second))
    on_front = {member.trial for member in found.front}
    complete = [trial for trial in trials.trials if trial.state == "complete" and trial.values]
    failed = [trial for trial in complete if trial.feasible is False]
    behind = [trial for trial in complete if trial.feasible is not False and trial.trial not in on_front]
    front_rows = [trial for trial in complete if trial.trial in on_front]
    for rows, colour, label in (
        (failed, INFEASIBLE, "failed its gate"), (behind, MEASURED, "measured"), (front_rows, FRONT, "front")
    ):  # fmt: skip
        _scatter(axes, rows, first, second, color=colour, label=label)
    _scatter(
        axes, [trial for trial in front_rows if trial.trial == found.knee], first, second, color="none", s=160,
        edgecolors=KNEE, linewidths=2, label=f"knee, trial {found.knee}",
    )  # fmt: skip
    for trial in front_rows:
        axes.annotate(
            str(trial.trial), (trial.values[first.name], trial.values[second.name]), xytext=(5, 5),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axes.grid(alpha=0.3)
    if complete:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no trial has its values yet", ha="center", va="center", transform=axes.transAxes)


def _scatter(axes: Axes, rows: Sequence[TrialResult], first: Objective, second: Objective, **looks: object) -> None:
    if rows:
        points = [(trial.values[first.name], trial.values[second.name]) for trial in rows]
        axes.scatter(*zip(*points, strict=True), zorder=3, **looks)  # type: ignore[arg-type]  # names of scatter's own

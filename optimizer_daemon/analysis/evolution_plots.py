"""score_evolution.png and epoch_vs_quality.png: how scores went from trial to trial, and from epoch to epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from optimizer_daemon.analysis.facts import PIXELS, CheckpointFacts, StudyFacts, TrialFacts
from optimizer_daemon.analysis.style import (
    BASE,
    BASELINES,
    BEST,
    FRONT,
    GOAL,
    INFEASIBLE,
    MEASURED,
    OTHERS,
    saying,
    span,
)
from shared.scoring_presets import goals_of

MOST_TRIALS_DRAWN = 48
"""Small pictures on the page of single trials: the best ones."""


def score_evolution_figure(facts: StudyFacts) -> Figure:
    """Every score of the final checkpoints by trial, each with its best so far."""
    scored = [trial for trial in facts.trials if trial.final is not None]
    names = _score_names(facts, scored)
    figure = Figure(figsize=(9, 2.6 * max(1, len(names))), layout="constrained")
    figure.suptitle(f"{facts.name}: scores of the final checkpoints")
    if not names:
        return saying(figure, "no trial has a score yet")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        _evolution(axes, name, scored, facts)
    panels[-1].set_xlabel("trial")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend(fontsize=8)
    return figure


def epoch_vs_quality_figure(facts: StudyFacts) -> Figure:
    """The objective and the seed's three figures by epoch: the best few trials in colour, all others in grey."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(f"{facts.name}: quality by epoch, the best trials in colour")
    drawn = [trial for trial in facts.trials if any(c.epoch is not None for c in trial.checkpoints)]
    if not drawn:
        return saying(figure, "no checkpoint has been evaluated yet")
    front = [trial for trial in facts.ranking if trial.may_win and trial in drawn][: len(FRONT)]
    panels = figure.subplots(2, 2, sharex=True).flatten()
    for axes, (name, value) in zip(panels, _qualities(facts.objective), strict=True):
        others = [list(_points(trial, value)) for trial in drawn if trial not in front]
        axes.add_collection(LineCollection([line for line in others if line], colors=OTHERS, linewidths=0.7, alpha=0.6))
        for colour, trial in zip(FRONT, front, strict=False):
            points = list(_points(trial, value))
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", ms=3, label=f"trial {trial.number}")
        if facts.base is not None and (of_base := value(facts.base)) is not None:
            axes.axhline(of_base, color=BASE, linestyle=":", linewidth=1, label="base model")
        _show_goal(axes, name, facts)
        axes.set_title(f"{name} (lower is better)" if name == facts.objective else name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.autoscale_view()
    panels[0].legend(fontsize=8)
    for axes in panels[2:]:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def trial_curves_figure(facts: StudyFacts) -> Figure:
    """The objective by epoch of each trial by itself, its best checkpoint marked; the best ones of many."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    ranked = {trial.number for trial in facts.ranking}
    rest = [trial for trial in facts.trials if trial.number not in ranked]
    drawn = [trial for trial in (*facts.ranking, *rest) if list(_points(trial, lambda c: c.score))]
    if not drawn:
        return saying(figure, "no checkpoint has been evaluated yet")
    left = len(drawn) - MOST_TRIALS_DRAWN
    note = f", the best {MOST_TRIALS_DRAWN} of {len(drawn)} trials" if left > 0 else ""
    drawn = drawn[:MOST_TRIALS_DRAWN]
    columns = min(6, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure.set_size_inches(11, 1.9 * rows + 0.6)
    figure.suptitle(f"{facts.name}: {facts.objective} by epoch (lower is better){note}")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, trial in zip(panels, drawn, strict=False):
        points = list(_points(trial, lambda c: c.score))
        axes.plot(*zip(*points, strict=True), color=MEASURED, marker="o", ms=2.5, linewidth=1)
        axes.plot(*min(points, key=lambda point: point[1]), color=BEST, marker="o", ms=5, linestyle="")
        state = "" if trial.may_win else f" ({'failed its gate' if trial.value is not None else trial.state.state})"
        axes.set_title(f"trial {trial.number}{state}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    for axes in panels[len(drawn) :]:
        axes.set_axis_off()
    return figure


def _score_names(facts: StudyFacts, scored: Sequence[TrialFacts]) -> list[str]:
    """The objective first, then every other score that any trial has."""
    others = dict.fromkeys(
        name
        for trial in scored
        if trial.final is not None
        for name, score in trial.final.metrics.scores.items()
        if score.value is not None
    )
    return [name for name in dict.fromkeys((facts.objective, *others)) if name in others]


def _evolution(axes: Axes, name: str, scored: Sequence[TrialFacts], facts: StudyFacts) -> None:
    points: list[tuple[int, float]] = []
    infeasible: list[tuple[int, float]] = []
    best: list[tuple[int, float]] = []
    maximise = False
    for trial in scored:
        if trial.final is None or (value := trial.final.scored(name)) is None:
            continue
        maximise = trial.final.metrics.scores[name].direction == "maximise"
        (points if trial.may_win else infeasible).append((trial.number, value))
        if trial.may_win:
            known = value if not best else (max if maximise else min)(value, best[-1][1])
            best.append((trial.number, known))
    for label, colour, found in (("measured", MEASURED, points), ("failed its gate", INFEASIBLE, infeasible)):
        if found:
            numbers, values = zip(*found, strict=True)
            axes.scatter(numbers, values, s=14, color=colour, label=label, zorder=3)
    if best:
        axes.step(*zip(*best, strict=True), where="post", color=BEST, label="best so far")
    if facts.base is not None and (of_base := facts.base.scored(name)) is not None:
        axes.axhline(of_base, color=BASE, linestyle=":", linewidth=1, label="base model")
    for colour, (label, baseline) in zip(BASELINES, facts.baselines.items(), strict=False):
        if (value := baseline.scored(name)) is not None:
            axes.axhline(value, color=colour, linestyle="--", linewidth=1, label=label)
    axes.set_title(f"{name} ({'higher' if maximise else 'lower'} is better)", fontsize=10)
    axes.grid(alpha=0.3)


def _qualities(objective: str) -> Iterator[tuple[str, Callable[[CheckpointFacts], float | None]]]:
    yield objective, lambda checkpoint: checkpoint.score
    for metric in PIXELS:
        yield metric, lambda checkpoint, metric=metric: checkpoint.mean(metric)  # type: ignore[misc]


def _points(trial: TrialFacts, value: Callable[[CheckpointFacts], float | None]) -> Iterator[tuple[int, float]]:
    for checkpoint in trial.checkpoints:
        if checkpoint.epoch is not None and (found := value(checkpoint)) is not None:
            yield checkpoint.epoch, found


def _show_goal(axes: Axes, name: str, facts: StudyFacts) -> None:
    band = goals_of(facts.plan.scoring).get(name) if facts.plan is not None else None
    if band is not None:
        span(axes, band.low, band.high, GOAL, "goal", vertical=False)

"""optimization_history.png and param_importances.png, as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from optimizer_daemon.analysis.style import BEST, FAILED, INFEASIBLE, MEASURED, saying
from optimizer_daemon.optuna_adapter.importances import Importance
from shared.schemas import AllTrials, TrialResult


def history_figure(trials: AllTrials) -> Figure:
    """Every trial's objective by number, the best so far, and the failed trials as marks at the bottom."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="trial", ylabel=f"{trials.objective} (lower is better)", title=f"{trials.study_name}: history")
    scored = [(trial, trial.value) for trial in trials.trials if trial.state == "complete" and trial.value is not None]
    if not scored:
        return saying(figure, "no trial has a score yet")
    for label, colour, feasible in (("measured", MEASURED, True), ("failed its gate", INFEASIBLE, False)):
        points = [(trial.trial, value) for trial, value in scored if (trial.feasible is not False) == feasible]
        if points:
            axes.scatter(*zip(*points, strict=True), color=colour, label=label, zorder=3)
    best = _best_so_far(scored)
    if best:
        axes.step(*zip(*best, strict=True), where="post", color=BEST, label="best so far")
    failed = [trial.trial for trial in trials.trials if trial.state == "failed"]
    if failed:
        bottom = min(value for _, value in scored)
        axes.scatter(failed, [bottom] * len(failed), marker="x", color=FAILED, label="failed, no score")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    if len(scored) == 1:
        axes.set_title(f"{trials.study_name}: history (one trial so far)")
    return figure


def importances_figure(trials: AllTrials, found: Mapping[str, Importance], why_not: str = "") -> Figure:
    """A bar for each parameter, with its interval.

    Args:
        why_not: said in place of the picture.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(
        title=f"{trials.study_name}: parameter importances",
        xlabel=f"share of the influence on {trials.objective} (line: 80 % interval)",
    )
    if not found:
        count = sum(trial.state == "complete" and trial.feasible is not False for trial in trials.trials)
        too_few = f"importances need two scored trials that passed their gate; there are {count}"
        return saying(figure, why_not or too_few)
    names = list(found)[::-1]
    shares = [found[name].share for name in names]
    axes.barh(names, shares, color=MEASURED)
    axes.bar_label(axes.containers[0], fmt="%.2f", padding=3)  # type: ignore[arg-type]  # barh makes a BarContainer
    sure = [(n, found[n].low, found[n].high) for n in names]
    for name, low, high in sure:
        if low is not None and high is not None:
            axes.plot([low, high], [name, name], color=BEST, linewidth=1.5, solid_capstyle="butt")
    return figure


def _best_so_far(scored: Sequence[tuple[TrialResult, float]]) -> list[tuple[int, float]]:
    best: list[tuple[int, float]] = []
    for trial, value in scored:
        if trial.feasible is not False:
            best.append((trial.trial, min(value, best[-1][1]) if best else value))
    return best

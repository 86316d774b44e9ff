"""The pictures of results/, drawn from all_trials.json: python -m optimizer_daemon.analysis.plots --output-dir DIR."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from optimizer_daemon.analysis.pareto import pareto_figure, pareto_front
from optimizer_daemon.database import Database
from optimizer_daemon.optuna_adapter.importances import importances
from optimizer_daemon.results import DIRECTION
from shared.commands import run_command
from shared.errors import DiskError, UserError
from shared.files import read_model, write_bytes, write_model
from shared.layout import StudyLayout
from shared.schemas import AllTrials, Run, TrialResult

MEASURED, INFEASIBLE, BEST, FAILED = "#4878a8", "#c0c0c0", "#c04848", "#d08030"


def history_figure(trials: AllTrials) -> Figure:
    """Every trial's objective by number, the best so far, and the failed trials as marks at the bottom."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="trial", ylabel=f"{trials.objective} (lower is better)", title=f"{trials.study_name}: history")
    scored = [(trial, trial.value) for trial in trials.trials if trial.state == "complete" and trial.value is not None]
    if not scored:
        return _saying(figure, "no trial has a score yet")
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


def importances_figure(trials: AllTrials, shares: Mapping[str, float]) -> Figure:
    """A bar for each parameter."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(
        title=f"{trials.study_name}: parameter importances", xlabel=f"share of the influence on {trials.objective}"
    )
    if not shares:
        count = sum(trial.state == "complete" and trial.feasible is not False for trial in trials.trials)
        return _saying(figure, f"importances need two scored trials that passed their gate; there are {count}")
    names = list(shares)[::-1]
    axes.barh(names, [shares[name] for name in names], color=MEASURED)
    axes.bar_label(axes.containers[0], fmt="%.2f", padding=3)  # type: ignore[arg-type]  # barh makes a BarContainer
    return figure


def main(arguments: Sequence[str]) -> int:
    """Draw both pictures; each replaces the earlier one all at once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="study folder")
    study = StudyLayout(parser.parse_args(arguments).output_dir)
    try:
        trials = read_model(study.results.all_trials, AllTrials)
        run = read_model(study.run, Run)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; name a study folder with results") from error
    assert trials.direction == DIRECTION, "the pictures say that lower is better"
    _write(study.results.optimization_history, history_figure(trials))
    shares = importances(run.study_name, Database.of(run, study).readable_url)
    _write(study.results.param_importances, importances_figure(trials, shares))
    if trials.objectives:
        found = pareto_front(study, trials)
        _make(study.results.analysis)
        _write(study.results.pareto_front_picture, pareto_figure(trials, found))
        write_model(study.results.pareto_front, found)
    return 0


def _best_so_far(scored: Sequence[tuple[TrialResult, float]]) -> list[tuple[int, float]]:
    best: list[tuple[int, float]] = []
    for trial, value in scored:
        if trial.feasible is not False:
            best.append((trial.trial, min(value, best[-1][1]) if best else value))
    return best


def _saying(figure: Figure, sentence: str) -> Figure:
    figure.axes[0].set_axis_off()
    figure.axes[0].text(0.5, 0.5, sentence, ha="center", va="center", fontsize=12)
    return figure


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DiskError(folder, error) from error


def _write(path: Path, figure: Figure) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(path, picture.getvalue())


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

"""metrics_comparison.png and parameter_correlation.png: what was measured against its goals, and what goes with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from optimizer_daemon.analysis.facts import CheckpointFacts, StudyFacts
from optimizer_daemon.analysis.relations import FEWEST, Relation
from optimizer_daemon.analysis.style import BASE, BASELINES, BEST, GOAL, MEASURED, OTHERS, saying, span
from shared.scores.formulas import (
    BRIGHTNESS_RANGE,
    CONTRAST_RANGE,
    SATURATION_RANGE,
    TARGET_BRIGHTNESS,
    TARGET_CONTRAST,
)
from shared.scoring_presets import goals_of


@dataclass(frozen=True)
class _Quantity:
    """What one histogram is of.

    Args:
        range_: the seed's acceptable range of single pictures; None where it names none.
        target: what the score pulls towards.
    """

    name: str
    value: Callable[[CheckpointFacts], float | None]
    range_: tuple[float, float] | None = None
    target: float | None = None


def metrics_comparison_figure(facts: StudyFacts) -> Figure:
    """Histograms of the final checkpoints' figures, with target, range and goal, and the base model, baselines and
    winner marked."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(f"{facts.name}: final checkpoints against targets and ranges")
    finals = [trial.final for trial in facts.trials if trial.final is not None]
    if not finals:
        return saying(figure, "no trial has a score yet")
    panels = figure.subplots(2, 3).flatten()
    for axes, quantity in zip(panels, _quantities(facts), strict=True):
        _histogram(axes, quantity, finals, facts)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, fontsize=8)
    return figure


def parameter_correlation_figure(facts: StudyFacts, found: Sequence[Relation]) -> Figure:
    """Spearman's rank correlation of each parameter with each figure; pale where it may be chance."""
    parameters = list(dict.fromkeys(relation.parameter for relation in found))
    measured = list(dict.fromkeys(relation.figure for relation in found))
    figure = Figure(figsize=(8, 1.8 + 0.42 * max(3, len(parameters))), layout="constrained")
    axes = figure.add_subplot()
    if not found:
        count = sum(trial.may_win for trial in facts.trials)
        return saying(
            figure,
            f"correlations need {FEWEST} trials that passed their gate, with parameters that differ; there are {count}",
        )
    table = np.full((len(parameters), len(measured)), np.nan)
    for relation in found:
        table[parameters.index(relation.parameter), measured.index(relation.figure)] = relation.rho
    image = axes.imshow(table, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for relation in found:
        row, column = parameters.index(relation.parameter), measured.index(relation.figure)
        dark = abs(relation.rho) > 0.6
        axes.text(
            column, row, f"{relation.rho:+.2f}", ha="center", va="center", fontsize=9,
            color="white" if dark else "black", fontweight="bold" if relation.is_sure else "normal",
            alpha=1.0 if relation.is_sure else 0.5,
        )  # fmt: skip
    axes.set_xticks(range(len(measured)), measured)
    axes.set_yticks(range(len(parameters)), parameters)
    axes.set_title(
        f"{facts.name}: rank correlation over {max(relation.trials for relation in found)} trials\n"
        "bold: the 95 % interval leaves 0 out; pale: may be chance",
        fontsize=10,
    )
    figure.colorbar(image, ax=axes, label="Spearman's rho")
    return figure


def _quantities(facts: StudyFacts) -> tuple[_Quantity, ...]:
    values = facts.plan.scoring.values if facts.plan is not None else {}
    brightness = float(values.get("target.brightness", TARGET_BRIGHTNESS))
    contrast = float(values.get("target.contrast", TARGET_CONTRAST))
    return (
        _Quantity("brightness", lambda c: c.mean("brightness"), BRIGHTNESS_RANGE, brightness),
        _Quantity("contrast", lambda c: c.mean("contrast"), CONTRAST_RANGE, contrast),
        _Quantity("saturation", lambda c: c.mean("saturation"), SATURATION_RANGE),
        _Quantity("brightness_std", lambda c: c.std("brightness"), None, 0.0),
        _Quantity("contrast_std", lambda c: c.std("contrast"), None, 0.0),
        _Quantity(facts.objective, lambda c: c.score),
    )


def _histogram(axes: Axes, quantity: _Quantity, finals: Sequence[CheckpointFacts], facts: StudyFacts) -> None:
    feasible = [value for c in finals if c.feasible and (value := quantity.value(c)) is not None]
    others = [value for c in finals if not c.feasible and (value := quantity.value(c)) is not None]
    if feasible or others:
        known = [*feasible, *others, *(quantity.range_ or ())]
        bins = np.linspace(
            min(known), max(known) + 1e-9, 31
        ).tolist()  # of what is shown: few trials lie close together
        axes.hist([feasible, others], bins, stacked=True, color=[MEASURED, OTHERS], label=["trials", "failed gate"])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if quantity.range_ is not None:
        span(axes, *quantity.range_, MEASURED, "range")
    band = goals_of(facts.plan.scoring).get(quantity.name) if facts.plan is not None else None
    if band is not None:
        span(axes, band.low, band.high, GOAL, "goal")
    if quantity.target is not None:
        axes.axvline(quantity.target, color=GOAL, linewidth=1.2, label="target")
    rivals = {"base model": facts.base} if facts.base is not None else {}
    for colour, (name, rival) in zip((BASE, *BASELINES), {**rivals, **facts.baselines}.items(), strict=False):
        if (value := quantity.value(rival)) is not None:
            axes.axvline(value, color=colour, linestyle=":", linewidth=1.5, label=name)
    if facts.winner is not None and facts.winner.final is not None:
        value = quantity.value(facts.winner.final)
        if value is not None:
            axes.axvline(value, color=BEST, linewidth=1.8, label=f"winner, trial {facts.winner.number}")
    axes.set_title(quantity.name, fontsize=10)
    axes.set_ylabel("trials")
    axes.tick_params(labelsize=8)

"""What all pictures of results/ have in common: colours, marks, and the sentence in place of a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any colour vision can tell apart.
MEASURED, BEST, FAILED, BASE, GOAL = "#0072b2", "#d55e00", "#e69f00", "#333333", "#009e73"
INFEASIBLE, OTHERS = "#c0c0c0", "#b0b0b0"
FRONT: Sequence[str] = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9")
"""Colours of the best few trials, the best first."""
BASELINES: Sequence[str] = ("#cc79a7", "#56b4e9", "#e69f00", "#f0e442")


def saying(figure: Figure, sentence: str) -> Figure:
    """Show a sentence in place of a picture that there is too little for."""
    axes = figure.axes[0] if figure.axes else figure.add_subplot()
    axes.set_axis_off()
    axes.text(0.5, 0.5, sentence, ha="center", va="center", fontsize=12, wrap=True)
    return figure


def png(figure: Figure) -> bytes:
    """Return the picture's file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def span(axes: Axes, low: float, high: float, colour: str, label: str, *, vertical: bool = True) -> None:
    """Shade a range of one axis."""
    (axes.axvspan if vertical else axes.axhspan)(low, high, color=colour, alpha=0.12, label=label, zorder=0)

"""The goal bands of a study's scoring, held against what was measured. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from shared.schemas import Metrics, ScoringPreset
from shared.scoring_presets import goals_of


@dataclass(frozen=True)
class Goal:
    """One goal and how near it a checkpoint came; everything 0-1.

    Args:
        figure: name of a metric; with _std behind it the metric's spread over the pictures.
        low: lower end of the closed band to reach.
        high: upper end.
        value: what was measured; None where it could not be.
    """

    figure: str
    low: float
    high: float
    value: float | None

    @property
    def missed_by(self) -> float | None:
        """How far outside the band; 0 inside, None where nothing was measured."""
        return None if self.value is None else max(self.low - self.value, self.value - self.high, 0.0)

    @property
    def reached(self) -> bool | None:
        """Whether the value lies in the band; None where nothing was measured."""
        return None if self.missed_by is None else self.missed_by == 0

    @property
    def verdict(self) -> str:
        """In words: reached, missed by how much, or not measured."""
        miss = self.missed_by
        return "not measured" if miss is None else f"missed by {miss:.4f}" if miss else "reached"

    @property
    def line(self) -> str:
        """One line for people."""
        goal = f"{self.low:.2f}-{self.high:.2f}"
        if self.value is None:
            return f"{self.figure:16} unknown   (goal {goal})"
        return f"{self.figure:16} {self.value:.4f}    (goal {goal}: {self.verdict})"


def goals_against(metrics: Metrics, scoring: ScoringPreset) -> tuple[Goal, ...]:
    """Return each goal of the scoring with what a checkpoint measured."""
    return tuple(
        Goal(figure, band.low, band.high, _value(metrics, figure)) for figure, band in goals_of(scoring).items()
    )


def _value(metrics: Metrics, figure: str) -> float | None:
    metric = metrics.metrics.get(figure.removesuffix("_std"))
    if metric is None:
        return None
    return metric.std if figure.endswith("_std") else metric.value

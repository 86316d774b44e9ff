"""A score curve as one line of characters. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evaluator_daemon.overview import Objective, Point


def sparkline(
    curve: Sequence[Point],
    best: Point | None,
    objective: Objective,
    width: int,
    bars: str,
    *,
    best_mark: str,
    failed_mark: str,
    gap_mark: str,
) -> str:
    """Draw a curve with one character for each checkpoint: a low bar is a low score.

    Args:
        width: the most characters; of a longer curve each character stands for several checkpoints and shows the one
            that matters most: the best of all, else the best of them.
        bars: the characters for low to high.
        best_mark: stands for the best checkpoint.
        failed_mark: for one that failed its gate.
        gap_mark: for one without a score.
    """
    scores = [point.score for point in curve if point.score is not None and point.feasible is not False]
    low, high = min(scores, default=0.0), max(scores, default=0.0)

    def drawn(point: Point) -> str:
        if point is best:
            return best_mark
        if point.score is None:
            return gap_mark
        if point.feasible is False:
            return failed_mark
        height = (point.score - low) / (high - low) if high > low else 0.0
        return bars[min(len(bars) - 1, int(height * len(bars)))]

    count = min(width, len(curve))
    parts = [curve[len(curve) * n // count : len(curve) * (n + 1) // count] for n in range(count)]
    return "".join(drawn(min(part, key=_importance(best, objective))) for part in parts)


def _importance(best: Point | None, objective: Objective) -> Callable[[Point], tuple[bool, bool, bool, float]]:
    sign = 1.0 if objective.direction == "minimise" else -1.0

    def key(point: Point) -> tuple[bool, bool, bool, float]:
        return point is not best, point.score is None, point.feasible is False, sign * (point.score or 0.0)

    return key

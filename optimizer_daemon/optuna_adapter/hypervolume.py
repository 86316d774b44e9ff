"""The hypervolume of a set of trade-offs, exactly, as Optuna computes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna._hypervolume import compute_hypervolume


def hypervolume(points: Sequence[tuple[float, ...]], reference: tuple[float, ...]) -> float:
    """Return the volume that the points dominate, up to the reference; lower is better everywhere.

    Args:
        points: (points, objectives), each at least as good as the reference in each objective.
    """
    if not points:
        return 0.0
    return float(compute_hypervolume(np.array(points), np.array(reference)))

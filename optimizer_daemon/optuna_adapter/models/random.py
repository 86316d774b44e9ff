"""Every trial as the start-up trials are drawn."""

from __future__ import annotations

from random import Random

from optimizer_daemon.optuna_adapter.feasible import FeasibleSpace
from optimizer_daemon.optuna_adapter.history import History
from optimizer_daemon.search.expressions import Value


class RandomDraws:
    """Learns nothing."""

    start_up_trials = None
    objectives = 1_000

    def propose(self, history: History, space: FeasibleSpace, seed: int) -> dict[str, Value]:
        """Draw by the space's own plan."""
        del history
        return space.draw(Random(seed))


MODEL = RandomDraws()

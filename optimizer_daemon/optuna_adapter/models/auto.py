"""The portfolio: a Gaussian process and a Parzen estimator in turns, both feasible, both on forecasts.

The process is the better one where the score is smooth in the parameters, the estimator where it has cliffs; which of
them it is, nobody knows beforehand. benchmarks/search has the figures.
"""

from __future__ import annotations

from optimizer_daemon.optuna_adapter.feasible import FeasibleSpace
from optimizer_daemon.optuna_adapter.history import History
from optimizer_daemon.optuna_adapter.models.gp import Gp
from optimizer_daemon.optuna_adapter.models.tpe import Tpe
from optimizer_daemon.search.expressions import Value


class Auto:
    """Asks one model for the even trials and another for the odd ones."""

    start_up_trials = 6
    objectives = 1_000

    def __init__(self) -> None:
        self._even, self._odd = Gp(), Tpe()

    def propose(self, history: History, space: FeasibleSpace, seed: int) -> dict[str, Value]:
        """Draw by the model whose turn it is."""
        turn = self._odd if len(history.get_trials()) % 2 else self._even
        return turn.propose(history, space, seed)


MODEL = Auto()

"""Passes new scores on: to the study, the trial's state file, the log, and to the pruner, which may object."""

from __future__ import annotations

import logging
from typing import Any

from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.runner import LiveTrial
from optimizer_daemon.scores import ScoreReader
from optimizer_daemon.search.curves import Curve, imputed
from optimizer_daemon.search.pruning import Pruner
from shared.failpoints import reach
from shared.logs import log_change
from shared.schemas import TrialState

_log = logging.getLogger(__name__)


class ScoreKeeper:
    """Keeps the scores of one study.

    Args:
        study: is told each score.
        reader: finds them.
        pruner: says which training is losing.
        objective: name of the score, for the log.
    """

    def __init__(self, study: TuningStudy, reader: ScoreReader, pruner: Pruner, objective: str) -> None:
        self._study = study
        self._reader = reader
        self._pruner = pruner
        self._objective = objective

    def look(self, live: LiveTrial) -> None:
        """Read what the evaluator has recorded of a trial since the last look."""
        if live.state.ended is not None and live.state.state != "pruned":
            return
        live.scores = self._reader.read(live.layout, live.params.max_train_epochs)
        new = [point for point in live.scores.curve if point not in live.state.curve]
        for point in new:
            self._study.report(live.state.optuna_number, point.epoch, point.value, point.values)
            score: dict[str, Any] = {self._objective: point.value, **point.values}
            log_change(_log, "checkpoint scored", trial=live.number, epoch=point.epoch, **score)
            reach("optimizer.reported")
        if new:
            live.write_state(curve=live.scores.curve)
            curve = _curve(live)
            spared = self._pruner.name == "none" or live.params.finalist_of is not None  # its whole score is wanted
            if live.state.state == "training" and not spared and curve is not None:
                live.objection = self._pruner.objection(curve, self._study.peers()) or ""

    def tell(self, state: TrialState) -> None:
        """Tell the study how a trial ended; a second time changes nothing."""
        if state.state == "failed":
            self._study.tell_failed(state.optuna_number, state.reason or "unknown")
        elif state.state == "pruned":
            self._study.tell_pruned(state.optuna_number, state.reason or "unknown")
        else:
            assert state.value is not None, "a complete trial has a value"
            infeasible_because = None if state.feasible is not False else state.reason
            self._study.tell_complete(state.optuna_number, state.value, infeasible_because, state.objectives)

    def imputed(self, live: LiveTrial) -> float | None:
        """Return what a stopped trial would probably have reached; None where that cannot be told."""
        curve = _curve(live)
        return None if curve is None else imputed(curve, self._study.peers())


def _curve(live: LiveTrial) -> Curve | None:
    epochs = live.params.max_train_epochs
    return None if epochs is None else Curve.of(epochs, {point.epoch: point.value for point in live.state.curve})

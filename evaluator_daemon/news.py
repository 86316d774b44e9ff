"""What the manager's log says about checkpoints: one line for each verdict, once."""

from __future__ import annotations

import logging
from array import array

from evaluator_daemon.folder import read_or_none
from evaluator_daemon.sweep import SETTLED, TrialView
from shared.layout import StudyLayout, TrialLayout
from shared.logs import log_change
from shared.schemas import CheckpointRecord, Metrics

_log = logging.getLogger(__name__)


class News:
    """Remembers what was said of each trial.

    Args:
        study: the folder that is watched.
    """

    def __init__(self, study: StudyLayout) -> None:
        self._study = study
        self.objective = "combined_score"  # the score to tell; the plan's, once there is one
        # Eight bytes a verdict: thousands of finished trials are remembered.
        self._said: dict[str, array[int]] = {}

    def say(self, trial: TrialView) -> None:
        """One line for each checkpoint that was recorded, quarantined or found truncated since the last sweep."""
        told = self._said.get(trial.name)
        news = {_verdict(record): record for record in trial.records if record.status in SETTLED}
        self._said[trial.name] = array("q", news)
        if told is None:
            log_change(_log, "trial seen", trial=trial.name, state=trial.state, checkpoints=len(trial.files))
            return
        evaluations = TrialLayout(self._study.root / trial.name).evaluations
        for record in (record for verdict, record in news.items() if verdict not in told):
            if record.status == "recorded":
                metrics = read_or_none(evaluations.checkpoint(record.checkpoint).metrics, Metrics)
                _say_recorded(trial.name, record, metrics, self.objective)
            else:
                why = record.quarantine.reason if record.quarantine else "its writer has gone"
                fields = {"trial": trial.name, "checkpoint": record.checkpoint, "reason": why}
                log_change(_log, f"checkpoint {record.status}", level=logging.WARNING, **fields)

    def forget(self, name: str) -> None:
        """A trial of this name is a new one."""
        self._said.pop(name, None)


def _verdict(record: CheckpointRecord) -> int:
    return hash((record.checkpoint, record.checkpoint_sha256, record.status))


def _say_recorded(trial: str, record: CheckpointRecord, metrics: Metrics | None, objective: str) -> None:
    if metrics is None:
        log_change(_log, "checkpoint recorded", trial=trial, checkpoint=record.checkpoint)
        return
    log_change(
        _log,
        "checkpoint recorded",
        trial=trial,
        checkpoint=record.checkpoint,
        epoch=metrics.epoch,
        brightness=metrics.metrics["brightness"].value,
        contrast=metrics.metrics["contrast"].value,
        saturation=metrics.metrics["saturation"].value,
        score=metrics.scores[objective].value,
        feasible=metrics.gate.feasible,
        seconds=metrics.seconds.total,
    )

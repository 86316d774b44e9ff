"""Where weight files are and where their results go: a trial's folder, or files anywhere under a label."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from evaluator_daemon.folder import look_at, max_train_epochs, read_or_none
from evaluator_daemon.sweep import TrialView, WeightFile
from shared.layout import EvaluationsLayout, LabelLayout, TrialLayout, checkpoint_epoch
from shared.safetensors_file import Checkpoint
from shared.schemas import CheckpointRecord, TrialParams


class Place(Protocol):
    """What an evaluator works through."""

    @property
    def name(self) -> str:
        """The trial's folder, or the label."""

    @property
    def evaluations(self) -> EvaluationsLayout:
        """Where the results go."""

    def is_there(self) -> bool:
        """Whether the folder still stands."""

    def look(self, records: Iterable[CheckpointRecord], plan_hash: str) -> TrialView:
        """Return what is on disk now."""

    def file(self, name: str) -> Path:
        """Return a checkpoint's weight file."""

    def params(self) -> TrialParams | None:
        """Return what is known of the training."""

    def epoch(self, checkpoint: Checkpoint) -> int | None:
        """Return the epoch a checkpoint was saved after."""


class TrialPlace:
    """A trial's own checkpoints."""

    def __init__(self, trial: TrialLayout) -> None:
        self.trial = trial
        self.name = trial.name
        self.evaluations = trial.evaluations

    def is_there(self) -> bool:
        """Whether nobody moved the trial away."""
        return self.trial.folder.is_dir()

    def look(self, records: Iterable[CheckpointRecord], plan_hash: str) -> TrialView:
        """Look at the trial's folder."""
        return look_at(self.trial, records, plan_hash, time.time())

    def file(self, name: str) -> Path:
        """Return the weight file in the trial's folder."""
        return self.trial.folder / f"{name}.safetensors"

    def params(self) -> TrialParams | None:
        """Return the trial's params.json."""
        return read_or_none(self.trial.params, TrialParams)

    def epoch(self, checkpoint: Checkpoint) -> int | None:
        """Return the epoch by the file's name, its metadata or params.json."""
        return checkpoint_epoch(
            checkpoint.path.name, checkpoint.epoch, max_train_epochs(self.trial), self.trial.output_name
        )


class LabelPlace:
    """Files from anywhere, read where they lie; nothing is known of their training.

    Args:
        files: checkpoint name -> weight file.
    """

    def __init__(self, layout: LabelLayout, files: Mapping[str, Path]) -> None:
        self.name = layout.folder.name
        self.evaluations = layout
        self._files = files

    def is_there(self) -> bool:
        """Whether the label's folder stands."""
        return self.evaluations.folder.is_dir()

    def look(self, records: Iterable[CheckpointRecord], plan_hash: str) -> TrialView:
        """Look at the files; what the folder holds from earlier is no work."""
        now_s = time.time()
        found = []
        for name, path in self._files.items():
            try:
                status = path.stat()
            except OSError:
                continue
            found.append(
                WeightFile(
                    name=name,
                    epoch=checkpoint_epoch(path.name, None, None, ""),
                    is_final=False,
                    size=status.st_size,
                    modified_ns=status.st_mtime_ns,
                    age_s=max(0.0, now_s - status.st_mtime),
                    changed_s=status.st_ctime,
                )
            )
        return TrialView(
            name=self.name,
            state=None,
            owner_lives=False,
            trainer_lives=False,
            idle_s=0.0,
            plan_hash=plan_hash,
            files=tuple(found),
            records=tuple(records),
        )

    def file(self, name: str) -> Path:
        """Return the weight file where it lies."""
        return self._files[name]

    def params(self) -> TrialParams | None:
        """Nothing: LoRAs of every making are welcome."""
        return None

    def epoch(self, checkpoint: Checkpoint) -> int | None:
        """Return the epoch by the file's name or its metadata."""
        return checkpoint_epoch(checkpoint.path.name, checkpoint.epoch, None, "")

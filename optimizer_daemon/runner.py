"""Carries out what was decided for one trial: start its training, follow it, stop it, set its remains aside."""

from __future__ import annotations

import logging
import shutil
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePosixPath

from optimizer_daemon.lifecycle import Ending, TrialView, ending_of
from optimizer_daemon.scores import TrialScores
from optimizer_daemon.trainers.base import Progress, TrainerPlugin
from optimizer_daemon.training_log import TrainingLog, last_lines
from shared.errors import DiskError, IncompleteCheckpointError, RefusedCheckpointError, UnreadableFileError
from shared.failpoints import reach
from shared.files import write_bytes, write_model
from shared.layout import TrialLayout, writer_of
from shared.logs import log_change
from shared.process import StopReport, child_environment
from shared.safetensors_file import read_header
from shared.schemas import Run, TrainerExit, TrialParams, TrialState
from shared.supervised import SupervisedProcess, adopt, start_supervised

SHORTEST_PATIENCE_S = 600.0
PATIENCE_STEPS = 20  # times the median step
QUOTED_LINES = 20

_log = logging.getLogger(__name__)


@dataclass
class LiveTrial:
    """One trial that the study has not been told about yet.

    Args:
        layout: its folder.
        params: what it trains with.
        state: as last written.
        log: its training log.
        process: its trainer, while that lives.
        scores: what the evaluator has recorded so far.
        progress: what the training said last.
        last_progress: when, in seconds of the monotonic clock.
    """

    layout: TrialLayout
    params: TrialParams
    state: TrialState
    log: TrainingLog
    process: SupervisedProcess | None = None
    scores: TrialScores = field(default_factory=TrialScores)
    progress: Progress | None = None
    last_progress: float = 0.0
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=100))

    @property
    def number(self) -> int:
        return self.state.trial

    def write_state(self, **changes: object) -> None:
        """Write trial_state.json with these fields changed."""
        self.state = self.state.model_copy(update=changes)
        write_model(self.layout.state, self.state)


class Runner:
    """Runs the trainings of one study.

    Args:
        trainer: who trains.
        run: the study.
    """

    def __init__(self, trainer: TrainerPlugin, run: Run) -> None:
        self._trainer = trainer
        self._run = run

    def start(self, live: LiveTrial, now: float) -> None:
        """Start the training; from its saved state where there is one."""
        plan = self._trainer.plan(live.params, live.layout, self._run)
        for path, text in plan.files.items():
            target = live.layout.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, text.encode())
        live.log = TrainingLog(live.layout.training_log)
        live.log.skip_to_end()
        live.progress, live.last_progress = None, now
        live.step_seconds.clear()
        live.process = start_supervised(
            plan.argv, directory=live.layout.folder, cwd=plan.cwd, env={**child_environment(), **plan.env}
        )
        reach("optimizer.trainer_started")

    def adopt(self, live: LiveTrial, now: float) -> bool:
        """Take over the trainer an earlier daemon left; False when nothing of it lives."""
        live.process = adopt(live.layout.folder)
        live.last_progress = now
        return live.process is not None

    def follow(self, live: LiveTrial, now: float) -> Iterator[Progress]:
        """Read what the training said since the last look; yield each epoch's first line once `live` has it."""
        for line in live.log.new_lines():
            progress = self._trainer.parse_progress(line)
            if progress is None or progress == live.progress:
                continue
            before, live.progress = live.progress, progress
            live.last_progress = now
            if progress.seconds_per_step is not None:
                live.step_seconds.append(progress.seconds_per_step)
            if progress.epoch is not None and (before is None or before.epoch != progress.epoch):
                yield progress

    def stop(self, live: LiveTrial, *, term_timeout_s: float, kill_timeout_s: float) -> StopReport | None:
        """End the training; None when nothing of it lived."""
        if live.process is None:
            return None
        return live.process.stop(term_timeout_s=term_timeout_s, kill_timeout_s=kill_timeout_s)

    def set_aside(self, live: LiveTrial) -> None:
        """Move everything the trainer wrote to attempts/NN/, so that a redo starts on a clean folder.

        Raises:
            DiskError: something could not be moved.
        """
        kept = _first_free_attempt(live.layout)
        try:
            kept.folder.mkdir(parents=True)
            for entry in sorted(live.layout.folder.iterdir()):
                if entry != live.layout.trainer_lock and _is_trainers(entry.name, is_folder=entry.is_dir()):
                    shutil.move(entry, kept.folder / entry.name)
                    reach("optimizer.remains_moved")
        except OSError as error:
            raise DiskError(kept.folder, error) from error
        log_change(_log, "remains set aside", trial=live.number, folder=kept.folder.relative_to(live.layout.folder))

    def view(self, live: LiveTrial, *, told: bool, evaluator_busy: bool) -> TrialView:
        """Return the trial as it stands."""
        alive = live.process is not None and live.process.is_alive
        median_s = statistics.median(live.step_seconds) if live.step_seconds else 0.0
        return TrialView(
            state=live.state.state,
            told=told,
            attempt=live.state.attempt,
            resumes=live.state.resumes,
            trainer_alive=alive,
            ending="unknown" if alive else self.ending(live),
            resumable=not alive and live.layout.training_state.exists(),
            final_complete=not alive and _is_whole(live.layout),
            last_progress=live.last_progress,
            patience_s=max(SHORTEST_PATIENCE_S, PATIENCE_STEPS * median_s),
            scoring=live.scores.scoring,
            evaluator_busy=evaluator_busy,
        )

    def ending(self, live: LiveTrial) -> Ending:
        """Return how the training of a trial ended."""
        return ending_of(_exit_record(live.layout))

    def why_failed(self, live: LiveTrial) -> str:
        """Say why a training that ended has failed, with its last lines where it does not say it itself."""
        record = _exit_record(live.layout)
        lines = last_lines(live.layout.training_log, QUOTED_LINES)
        if record is not None and ending_of(record) == "failed":
            return self._trainer.diagnose(record, lines)
        quoted = " | ".join(lines) or "(nothing)"
        log = f"tail -100 {live.layout.training_log}"
        if record is not None and ending_of(record) == "finished":
            final = live.layout.final_checkpoint.name
            return f"missing checkpoint: the training ended well but left no whole {final}; see {log}: {quoted}"
        return f"interrupted: the training was ended from outside {live.state.attempt} times; see {log}: {quoted}"


def _exit_record(trial: TrialLayout) -> TrainerExit | None:
    try:
        return SupervisedProcess(trial.folder, None).exit_record()
    except UnreadableFileError:
        return None  # a damaged record says as little as none


def _is_whole(trial: TrialLayout) -> bool:
    try:
        read_header(trial.final_checkpoint, trial.folder)
    except IncompleteCheckpointError:
        return False
    except RefusedCheckpointError:
        return True  # whole, and the evaluator says what is wrong with it
    return True


def _first_free_attempt(trial: TrialLayout) -> TrialLayout:
    number = 1
    while trial.attempt(number).exists():
        number += 1
    return TrialLayout(trial.attempt(number))


def _is_trainers(name: str, *, is_folder: bool) -> bool:
    try:
        return writer_of(PurePosixPath("trial_0001", name, *(["x"] if is_folder else []))) == "trainer"
    except (KeyError, ValueError):  # ValueError: a name such as .tmp-x, of which nothing is left
        return True  # no part of the contract, so the trainer's own affair


def now_local() -> datetime:
    """Return the time of day with its offset."""
    return datetime.now().astimezone()

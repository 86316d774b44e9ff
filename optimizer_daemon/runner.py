"""Carries out what was decided for one trial: start its training, follow it, stop it, set its remains aside."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeGuard

from optimizer_daemon.failures import WHERE
from optimizer_daemon.lifecycle import Action, Ending, TrialView, ending_of, signal_of
from optimizer_daemon.lora_training.memory import Memory, memory_that_ran_out
from optimizer_daemon.scores import TrialScores
from optimizer_daemon.slots import Standing
from optimizer_daemon.trainers.base import LaunchPlan, Preloads, ResumePoint, Tidies, TrainerPlugin
from optimizer_daemon.training_log import TrainingLog
from shared.errors import (
    DeviceBusyError,
    DiskError,
    IncompleteCheckpointError,
    RefusedCheckpointError,
    UnreadableFileError,
)
from shared.failpoints import reach
from shared.files import sweep_temp_files, write_bytes, write_model
from shared.gpu_lease import GpuLease, GpuPolicy, GpuUse
from shared.layout import TrialLayout
from shared.logs import log_change
from shared.preloaded import Preloaded
from shared.process import StopReport, child_environment
from shared.progress_bar import Progress
from shared.safetensors_file import read_header
from shared.schemas import Run, TrainerExit, TrialParams, TrialState
from shared.supervised import SupervisedProcess, adopt, start_supervised

SHORTEST_PATIENCE_S = 600.0
PATIENCE_STEPS = 20  # times the median step
QUOTED_LINES = 20
LOST_TERM_TIMEOUT_S = 10.0  # a training that is given up has nothing to save, only its GPU to leave in order
LOST_KILL_TIMEOUT_S = 10.0
HOST = "host"  # among the memories a trial ran short of; the others are GPUs

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
        objection: why the pruner would stop it; "" where it would not.
        told: what the training said last.
        progress: what is known from that and from what it had said before.
        last_progress: when, in seconds of the monotonic clock.
        first_not_finite: the step since which its loss is no number; None while it is one.
        step_seconds: seconds per step, as it said them.
        gpu: the card it trains on, or is about to; None on a CPU.
        leases: GPUs taken for its next start.
        patience_s: how long it may stand still, where its plan says so.
    """

    layout: TrialLayout
    params: TrialParams
    state: TrialState
    log: TrainingLog
    process: SupervisedProcess | None = None
    scores: TrialScores = field(default_factory=TrialScores)
    objection: str = ""
    told: Progress | None = None
    progress: Progress | None = None
    last_progress: float = 0.0
    first_not_finite: int | None = None
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    gpu: str | None = None
    leases: list[GpuLease] = field(default_factory=list)
    patience_s: float = SHORTEST_PATIENCE_S

    @property
    def number(self) -> int:
        return self.state.trial

    @property
    def is_training(self) -> bool:
        """Whether something of its trainer lives."""
        return self.process is not None and self.process.is_alive

    @property
    def standing(self) -> Standing:
        """How it stands to the slots."""
        alive = self.is_training
        return Standing(self.state.state, self.gpu, alive or bool(self.leases), alive and not _has_begun(self.progress))

    def write_state(self, **changes: object) -> None:
        """Write trial_state.json with these fields changed."""
        self.state = self.state.model_copy(update=changes)
        write_model(self.layout.state, self.state)


class Runner:
    """Runs the trainings of one study.

    Args:
        trainer: who trains.
        run: the study.
        policy: how trainings and evaluations share a GPU.
    """

    def __init__(self, trainer: TrainerPlugin, run: Run, policy: GpuPolicy = "share") -> None:
        self._trainer = trainer
        self._run = run
        self._policy = policy
        preload = trainer.preload(run) if isinstance(trainer, Preloads) else None
        self._preloaded = None if preload is None else Preloaded(preload)

    def close(self) -> None:
        """End what was started for trainings to come."""
        if self._preloaded is not None:
            self._preloaded.close()

    def may_start(self, live: LiveTrial, free: Sequence[str | None]) -> bool:
        """Take the leases a trial trains under; False as long as others use a GPU it is to have alone.

        And False while what all trainings import is imported for the first time.

        Args:
            free: cards that it may train on, of which it gets the first that others let it; None is the CPU.
        """
        if not live.leases and not any(self._lease(live, gpu) for gpu in free):
            return False
        return self._preloaded is None or self._preloaded.settled()

    def _lease(self, live: LiveTrial, gpu: str | None) -> bool:
        """Take all leases for a training on this card, or none."""
        uses = uses_of(gpu, self._policy, live.state.ran_short_of)
        leases = [GpuLease(name, use, inheritable=True) for name, use in uses.items()]
        try:
            for lease in leases:
                lease.acquire()
        except DeviceBusyError:
            for lease in leases:
                lease.release()
            return False
        live.gpu, live.leases = gpu, leases
        return True

    def start(self, live: LiveTrial, now: float) -> None:
        """Start the training; from its saved state where there is one."""
        sweep_temp_files(live.layout.folder)
        if isinstance(self._trainer, Tidies):
            self._trainer.tidy(live.layout, self._run)
        resume = self._trainer.resume_point(live.layout)
        plan = self._plan(live, resume)
        for path, text in plan.files.items():
            target = live.layout.folder / path
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DiskError(target.parent, error) from error
            write_bytes(target, text.encode())
        live.log = TrainingLog(live.layout.training_log)
        live.log.skip_to_end()
        live.told, live.progress, live.last_progress, live.first_not_finite = None, None, now, None
        live.step_seconds.clear()
        live.process = start_supervised(
            plan.argv,
            directory=live.layout.folder,
            cwd=plan.cwd,
            env={**child_environment(), **plan.env},
            pass_fds=[descriptor for lease in live.leases for descriptor in lease.filenos()],
            preloaded=self._preloaded,
        )
        for lease in live.leases:
            lease.release()  # our copies only: the trainer's tree holds its own
        live.leases.clear()
        reach("optimizer.trainer_started")

    def adopt(self, live: LiveTrial, now: float) -> bool:
        """Take over the trainer an earlier daemon left; False when nothing of it lives."""
        live.process = adopt(live.layout.folder)
        live.gpu, live.last_progress = live.state.gpu, now
        if live.process is not None:
            self._plan(live, None)  # for its patience
        return live.process is not None

    def _plan(self, live: LiveTrial, resume: ResumePoint | None) -> LaunchPlan:
        # The leased card by its name: numbers mean another card wherever CUDA_VISIBLE_DEVICES is set already.
        plan = self._trainer.plan(live.params, live.layout, self._run, gpu=live.gpu or "", resume=resume)
        live.patience_s = SHORTEST_PATIENCE_S if plan.patience_s is None else plan.patience_s
        return plan

    def follow(self, live: LiveTrial, now: float) -> Iterator[Progress]:
        """Read what the training said since the last look; yield each epoch's first line once `live` has it."""
        for line in _lines(live.log):
            told = self._trainer.parse_progress(line)
            if told is None or told == live.told:
                continue
            live.told, live.last_progress = told, now
            before, progress = live.progress, told.after(live.progress)
            live.progress = progress
            if progress.loss is not None and math.isfinite(progress.loss):
                live.first_not_finite = None
            elif progress.loss is not None and live.first_not_finite is None:
                live.first_not_finite = progress.step
            if progress.seconds_per_step is not None:
                live.step_seconds.append(progress.seconds_per_step)
            if progress.epoch is not None and (before is None or before.epoch != progress.epoch):
                yield progress

    def stop(self, live: LiveTrial, *, term_timeout_s: float, kill_timeout_s: float) -> StopReport | None:
        """End the training; None when nothing of it lived."""
        if live.process is None:
            return None
        return live.process.stop(term_timeout_s=term_timeout_s, kill_timeout_s=kill_timeout_s)

    def give_up(self, live: LiveTrial, action: Action) -> str:
        """End a training that is lost; say why."""
        report = self.stop(live, term_timeout_s=LOST_TERM_TIMEOUT_S, kill_timeout_s=LOST_KILL_TIMEOUT_S)
        if action is Action.STOP_DIVERGED:
            why = (
                f"diverged: the loss it shows is {live.progress and live.progress.loss} since step "
                f"{live.first_not_finite}, for {_not_finite_steps(live)} steps now; where that is a mean, as kohya's, "
                "one step was enough; lower the learning rates, or train with mixed_precision bf16 or no"
            )
        else:
            why = (
                f"hung: no progress line for {_patience_s(live):.0f} s; see whether the GPU, its driver or the disk of "
                "the pictures stands still"
            )
        if report is not None and report.killed:
            why += "; it did not heed SIGTERM and was killed"
        if report is not None and report.survivors:
            why += f"; even SIGKILL did not end {', '.join(map(str, report.survivors))}, restart the machine"
        return self._with_last_lines(live, why)

    def prune(self, live: LiveTrial) -> str:
        """End a training that is losing; say why."""
        report = self.stop(live, term_timeout_s=LOST_TERM_TIMEOUT_S, kill_timeout_s=LOST_KILL_TIMEOUT_S)
        if report is not None and report.survivors:
            return f"{live.objection}; even SIGKILL did not end {', '.join(map(str, report.survivors))}"
        return live.objection

    def excuse(self, live: LiveTrial) -> None:
        """Write down that memory ran short beside others, so that the training begins again without being blamed."""
        record = _exit_record(live)
        assert record is not None, "only a record tells of others"
        gpus = record.evaluators_on if signal_of(record) is None else ()
        reason = (
            f"out of memory on GPU {', '.join(gpus)}, where an evaluator was at work; trained again with it alone"
            if gpus
            else "out of memory on the host: the kernel killed the training; trained again once"
        )
        live.write_state(state="interrupted", reason=reason, ran_short_of=gpus or (HOST,))
        log_change(_log, "trial excused", level=logging.WARNING, trial=live.number, reason=reason)

    def view(self, live: LiveTrial, *, told: bool, evaluator_busy: bool) -> TrialView:
        """Return the trial as it stands."""
        alive = live.is_training
        return TrialView(
            state=live.state.state,
            told=told,
            attempt=live.state.attempt,
            resumes=live.state.resumes,
            trainer_alive=alive,
            ending="unknown" if alive else self.ending(live),
            resumable=not alive and self._trainer.resume_point(live.layout) is not None,
            final_complete=not alive and _is_whole(live.layout),
            last_progress=live.last_progress,
            patience_s=_patience_s(live),
            not_finite_steps=_not_finite_steps(live),
            losing=bool(live.objection),
            excused=bool(live.state.ran_short_of),
            all_recorded=live.scores.recorded == live.scores.seen,
            scoring=live.scores.scoring,
            evaluator_busy=evaluator_busy,
        )

    def ending(self, live: LiveTrial) -> Ending:
        """Return how the training of a trial ended."""
        record = _exit_record(live)
        if record is None or record.exit_status == 0:
            return ending_of(record)
        lines = live.log.last_lines(QUOTED_LINES)
        return ending_of(record, gpu_memory_ran_out=_memory_of(lines) == "GPU")

    def ended_well(self, live: LiveTrial) -> bool:
        """Whether the training came to its end; one that was stopped may end with status 0, too."""
        return self.ending(live) == "finished" and _is_whole(live.layout)

    def why_failed(self, live: LiveTrial) -> str:
        """Say why a training that ended has failed: cause, remedy, how far it was, its last lines."""
        record, ending = _exit_record(live), self.ending(live)
        if record is not None and ending in ("failed", "squeezed"):
            lines = live.log.last_lines(QUOTED_LINES)
            return self._with_last_lines(live, self._trainer.diagnose(record, lines))
        if record is not None and ending == "finished":
            final = live.layout.final_checkpoint.name
            why = f"missing checkpoint: the training ended with exit status 0 but left no whole {final}; make it save"
            return self._with_last_lines(live, f"{why} its last epoch under that name")
        number = signal_of(record) if record is not None else None
        by = f"signal {number}" if number is not None else "a signal that took its supervisor too"
        return self._with_last_lines(
            live,
            f"killed too often: {live.state.attempt} attempts were ended from outside, the last by {by}; look for who "
            "does it, dmesg names the kernel's own kills",
        )

    def _with_last_lines(self, live: LiveTrial, why: str) -> str:
        lines = live.log.last_lines(QUOTED_LINES)
        quoted = " | ".join(lines) or "(nothing)"
        return f"{why}{WHERE}{_how_far(live)}; last lines of {live.layout.training_log}: {quoted}"


def uses_of(gpu: str | None, policy: GpuPolicy, ran_short_of: Sequence[str]) -> dict[str, GpuUse]:
    """Return which leases a training takes, by GPU.

    Args:
        gpu: the card it trains on; None on a CPU, or where the trainer chooses one by itself.
        policy: of the study.
        ran_short_of: memories that ran out beside an evaluator: it is to have its card alone, whichever that is now.
    """
    short = [name for name in ran_short_of if name != HOST]
    if gpu is None:
        return dict.fromkeys(short, "exclusive trainer")
    return {gpu: "exclusive trainer" if short or policy == "defer" else "sharing trainer"}


def _lines(log: TrainingLog) -> Iterator[str]:
    yield from log.new_lines()
    yield log.unfinished


def _patience_s(live: LiveTrial) -> float:
    median_s = statistics.median(live.step_seconds) if live.step_seconds else 0.0
    return max(live.patience_s, PATIENCE_STEPS * median_s)


def _not_finite_steps(live: LiveTrial) -> int:
    if live.first_not_finite is None or live.progress is None:
        return 0
    return max(1, live.progress.step - live.first_not_finite + 1)


def _has_begun(progress: Progress | None) -> TypeGuard[Progress]:
    """Whether a training has taken its first step."""
    return progress is not None and progress.preparing is None and progress.step > 0


def _how_far(live: LiveTrial) -> str:
    progress = live.progress
    if not _has_begun(progress):
        return "before its first step"
    epoch = "" if progress.epoch is None else f" of epoch {progress.epoch}"
    return f"at step {progress.step}/{progress.steps}{epoch}"


def _memory_of(lines: list[str]) -> Memory | None:
    return memory_that_ran_out("\n".join(lines))


def _exit_record(live: LiveTrial) -> TrainerExit | None:
    """Return how the training ended; of the evaluators beside it those on its own card, where that is known."""
    try:
        record = SupervisedProcess(live.layout.folder, None).exit_record()
    except UnreadableFileError:
        return None  # a damaged record says as little as none
    if record is None or live.state.gpu is None:
        return record
    beside = tuple(gpu for gpu in record.evaluators_on if gpu == live.state.gpu)
    return record.model_copy(update={"evaluators_on": beside})


def _is_whole(trial: TrialLayout) -> bool:
    try:
        read_header(trial.final_checkpoint, trial.folder)
    except IncompleteCheckpointError:
        return False
    except RefusedCheckpointError:
        return True  # whole, and the evaluator says what is wrong with it
    return True


def now_local() -> datetime:
    """Return the time of day with its offset."""
    return datetime.now().astimezone()

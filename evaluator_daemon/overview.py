"""What a person sees of a study: a frozen tree, and the arithmetic behind it. Pure: no files, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from shared.finalists import Contender, Origin, contending
from shared.schemas import TERMINAL_STATES, Scalar

Direction = Literal["minimise", "maximise"]

MAIN_PARAMETERS = {"network_dim": "dim", "network_alpha": "alpha", "learning_rate": "lr"}
"""The parameters a trial is known by, and how they are called where room is short."""

_FINISHED = ("complete", "pruned")
_FIRST = ("training", "trained", "interrupted", "drawn")  # under way, in the order of how much happens there


@dataclass(frozen=True)
class Objective:
    """The score the study optimises.

    Args:
        name: as in metrics.json.
        direction: which end is better.
    """

    name: str = "combined_score"
    direction: Direction = "minimise"

    def is_better(self, one: float, other: float) -> bool:
        return one < other if self.direction == "minimise" else one > other


@dataclass(frozen=True)
class Point:
    """One scored checkpoint.

    Args:
        checkpoint: file name without .safetensors.
        epoch: epoch it was saved after, None when nothing tells it.
        score: the objective; None when it could not be computed.
        feasible: whether it passed its gate; None where that was not recorded.
    """

    checkpoint: str
    epoch: int | None
    score: float | None
    feasible: bool | None


@dataclass(frozen=True)
class Training:
    """What a living training said last.

    Args:
        step: optimizer steps done; with `preparing`, what is done of that.
        steps: all of them.
        preparing: what is done before the first step, such as "latents".
        seconds_per_step: mean so far.
        eta_s: seconds to its end, by its own estimate.
    """

    step: int
    steps: int
    preparing: str | None
    seconds_per_step: float | None
    eta_s: float | None


@dataclass(frozen=True)
class TrialOverview:
    """One trial.

    Args:
        name: its folder's name.
        number: as people count, None where the folder's name holds none.
        state: as in trial_state.json; None when there is no readable one.
        reason: why it is in that state.
        trainer_alive: its trainer's lock is held; None where that cannot be tried.
        epochs_done: epochs that are trained; None when nothing tells.
        epochs: epochs it will train.
        checkpoints: weight files that stand in its folder.
        checkpoints_expected: how many a whole training leaves.
        unscored: weight files without a verdict.
        scoring: the checkpoint a living evaluator has in hand.
        curve: the scored checkpoints, by epoch.
        best: the best of them that passed its gate, else None.
        value: the final score told to the study.
        feasible: whether the trial may win; None until that is decided.
        parameters: every hyperparameter.
        stage: the stage it was drawn in; None where there is none.
        origin: where they come from.
        finalist_of: the trial it repeats; None where it is no finalist.
        training: how far a living training is.
        started: when its training began.
        ended: when it reached its final state.
    """

    name: str
    number: int | None
    state: str | None
    reason: str | None
    trainer_alive: bool | None
    epochs_done: int | None
    epochs: int | None
    checkpoints: int
    checkpoints_expected: int | None
    unscored: int
    scoring: str | None
    curve: tuple[Point, ...]
    best: Point | None
    value: float | None
    feasible: bool | None
    parameters: Mapping[str, Scalar]
    stage: str | None
    origin: Origin
    finalist_of: int | None
    training: Training | None
    started: datetime | None
    ended: datetime | None

    @property
    def scored(self) -> int:
        """How many checkpoints have a score."""
        return sum(point.score is not None for point in self.curve)

    @property
    def label(self) -> str:
        """Its number, else its folder's name."""
        return self.name if self.number is None else str(self.number)


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi shows it; memory in MiB, utilisation in percent; None where it does not tell."""

    index: int
    name: str
    memory_used_mib: int | None
    memory_total_mib: int | None
    utilisation_percent: int | None


@dataclass(frozen=True)
class EvaluatorAtWork:
    """One living evaluator.

    Args:
        trial: its trial's folder.
        activity: starting, waiting, evaluating or deferred.
        checkpoint: what it has in hand.
    """

    trial: str
    activity: str
    checkpoint: str | None


@dataclass(frozen=True)
class Queue:
    """What is to be scored.

    Args:
        waiting: complete checkpoints that wait, as the living manager counts them; without a manager every weight file
            that has no verdict.
        proven: `waiting` comes from a living manager, which has seen that these files are complete.
        deferred: evaluators that wait for GPU memory, or for the training to end.
        evaluators: those that live.
    """

    waiting: int
    proven: bool
    deferred: int
    evaluators: tuple[EvaluatorAtWork, ...]


@dataclass(frozen=True)
class Trouble:
    """Something that went wrong.

    Args:
        time: when.
        place: the trial, checkpoint or log it is told in.
        text: the sentence.
    """

    time: datetime
    place: str
    text: str


@dataclass(frozen=True)
class Best:
    """The best checkpoint of all.

    Args:
        trial: folder of its trial.
        checkpoint: file name.
        file_exists: it has not been removed to save space.
        final: it is the trial's last one, which alone decides the trial's score.
    """

    trial: str
    checkpoint: str
    epoch: int | None
    score: float
    file_exists: bool
    final: bool


@dataclass(frozen=True)
class Overview:
    """A study at one moment.

    Args:
        time: that moment.
        folder: the study folder.
        study: its name, else the folder's.
        status: running, stopped or finished as in run.json; "waiting for run.json", "no run.json" where there are
            trials all the same, "unreadable", or "gone" with the folder.
        optimizer_alive, evaluator_alive: the daemons' locks are held; None where that cannot be tried.
        manager_status: as the manager wrote it; None without one.
        device: where the manager evaluates.
        target: how many trials are wanted.
        finished: trials that count towards it.
        failed: trials that do not.
        eta_s: estimated seconds of work left; None when nothing tells.
        quarantined: checkpoints that are not tried again.
        last_quarantine: the latest of them.
        best: over the checkpoints that passed their gate.
        winner: the complete trial with the best final score that passed its gate, as the optimizer ranks them.
        trials: those under way first, then the best first.
        unreadable: one sentence for each damaged file.
    """

    time: datetime
    folder: str
    study: str
    status: str
    optimizer_alive: bool | None
    evaluator_alive: bool | None
    manager_status: str | None
    device: str | None
    gpus: tuple[Gpu, ...]
    objective: Objective
    target: int | None
    finished: int
    failed: int
    eta_s: float | None
    queue: Queue
    quarantined: int
    last_quarantine: Trouble | None
    last_error: Trouble | None
    best: Best | None
    winner: str | None
    trials: tuple[TrialOverview, ...] = ()
    unreadable: tuple[str, ...] = field(default=())


def best_point(curve: Iterable[Point], objective: Objective) -> Point | None:
    """Return the best scored checkpoint that did not fail its gate; of equals the earliest."""
    best: Point | None = None
    for point in curve:
        if point.score is None or point.feasible is False:
            continue
        if best is None or best.score is None or objective.is_better(point.score, best.score):
            best = point
    return best


def sorted_curve(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return points by epoch, those of unknown epoch last."""
    return tuple(sorted(points, key=lambda p: (p.epoch is None, p.epoch or 0, p.checkpoint)))


def epochs_done(
    state: str | None,
    epochs: int | None,
    progress: Training | None,
    epoch_of_bar: int | None,
    saved: Iterable[int | None],
) -> int | None:
    """Return how many epochs of a trial are trained.

    Args:
        epoch_of_bar: the running epoch, counted from 1, where the progress bar tells it.
        saved: epochs of the checkpoints that stand in the folder.
    """
    if state in ("complete", "trained") and epochs is not None:
        return epochs
    known = [epoch for epoch in saved if epoch is not None]
    if progress is not None and progress.preparing is None:
        if epochs is not None and progress.steps > 0:
            known.append(min(epochs, epochs * progress.step // progress.steps))
        elif epoch_of_bar is not None:
            known.append(epoch_of_bar - 1)
    return max(known, default=None if state is None else 0)


def in_order(trials: Iterable[TrialOverview], objective: Objective) -> tuple[TrialOverview, ...]:
    """Return the trials as they are shown: under way first, then by best score, then those without one."""
    sign = 1.0 if objective.direction == "minimise" else -1.0

    def key(trial: TrialOverview) -> tuple[int, bool, bool, float, bool, int, str]:
        under_way = trial.state in _FIRST or trial.trainer_alive is True or trial.scoring is not None
        rank = _FIRST.index(trial.state) if trial.state in _FIRST else 0 if under_way else len(_FIRST)
        score = trial.best.score if trial.best is not None else None
        infeasible = trial.feasible is False and not under_way
        by_score = 0.0 if under_way or score is None else sign * score
        unscored = score is None and not under_way
        return rank, unscored, infeasible, by_score, trial.number is None, trial.number or 0, trial.name

    return tuple(sorted(trials, key=key))


def seconds_left(trials: Iterable[TrialOverview], target: int | None, now: datetime, *, slots: int = 1) -> float | None:
    """Estimate the work left: the mean time of a finished trial for each one that is missing, less what ran already.

    Args:
        slots: how many trials run at once.

    Returns:
        Seconds; 0 when the target is reached, None when no trial is finished or no target known.
    """
    trials = list(trials)
    finished = [trial for trial in trials if trial.state in _FINISHED]
    took = [
        (trial.ended - trial.started).total_seconds()
        for trial in finished
        if trial.started is not None and trial.ended is not None
    ]
    if target is None:
        return None
    left = target - len(finished)
    if left <= 0:
        return 0.0
    if not took:
        return None
    mean = sum(took) / len(took)
    running = [trial.started for trial in trials if trial.state == "training" and trial.trainer_alive and trial.started]
    spent = sum(min(mean, max(timedelta(), now - started).total_seconds()) for started in running[:left])
    return (left * mean - spent) / min(slots, left)


def latest(troubles: Iterable[Trouble | None]) -> Trouble | None:
    """Return the latest; of equally late ones the first."""
    known = [trouble for trouble in troubles if trouble is not None]
    return max(known, key=lambda trouble: trouble.time, default=None)


def winner(trials: Sequence[TrialOverview], objective: Objective) -> TrialOverview | None:
    """Return the best complete trial that passed its gate, of the finalists where they have scores, as the optimizer.

    Of equals it is the one with the lowest number.
    """
    best: TrialOverview | None = None
    contenders = contending(Contender(t.number or 0, t.origin, _may_win(t), t.stage) for t in trials)
    for trial in sorted(trials, key=lambda t: (t.number is None, t.number or 0, t.name)):
        if not _may_win(trial) or trial.value is None or (trial.number or 0) not in contenders:
            continue
        if best is None or best.value is None or objective.is_better(trial.value, best.value):
            best = trial
    return best


def _may_win(trial: TrialOverview) -> bool:
    return trial.state == "complete" and trial.value is not None and trial.feasible is not False


def is_over(state: str | None) -> bool:
    """Whether a trial's state is final."""
    return state in TERMINAL_STATES


def to_json(overview: Overview) -> dict[str, Any]:
    """Return the tree as JSON values; times are ISO 8601 with offset, durations seconds."""
    shown: dict[str, Any] = _plain(asdict(overview))
    for trial, row in zip(overview.trials, shown["trials"], strict=True):
        row["scored"] = trial.scored
    return shown


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.isoformat() if isinstance(value, datetime) else value

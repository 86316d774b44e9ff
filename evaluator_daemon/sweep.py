"""What is on disk against what is recorded: which work there is, in which order. Pure: no files, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shared.schemas import TERMINAL_STATES, CheckpointRecord, TrialStateName

TRUNCATED_AFTER_S = 120.0
"""An incomplete file nobody writes is truncated after this long once its trainer has gone."""
TRUNCATED_AFTER_S_WITHOUT_STATE = 600.0
"""The same where nothing tells whether a trainer lives."""
MAX_STRIKES = 3
SUSPECT_AFTER_INTERRUPTIONS = 5

SETTLED = ("recorded", "quarantined", "truncated")


@dataclass(frozen=True)
class WeightFile:
    """One weight file as a look at the folder shows it.

    Args:
        name: file name without .safetensors.
        epoch: epoch of the checkpoint, None when nothing tells it.
        is_final: it is the trial's unsuffixed checkpoint.
        size: bytes.
        modified_ns: modification time, ns since 1970.
        age_s: seconds since then.
        changed_s: when anything about it, its mode too, last changed; seconds since 1970.
    """

    name: str
    epoch: int | None
    is_final: bool
    size: int
    modified_ns: int
    age_s: float
    changed_s: float = 0.0


@dataclass(frozen=True)
class TrialView:
    """A trial at one moment.

    Args:
        name: its folder's name.
        state: as in trial_state.json; None when there is no such file.
        owner_lives: its trainer's or the optimizer's lock is held.
        trainer_lives: its trainer's lock is held.
        idle_s: seconds since the last change of a weight file or of the folder.
        plan_hash: the evaluation plan asked for.
    """

    name: str
    state: TrialStateName | None
    owner_lives: bool
    trainer_lives: bool
    idle_s: float
    plan_hash: str
    files: tuple[WeightFile, ...]
    records: tuple[CheckpointRecord, ...]


def is_settled(file: WeightFile, records: Iterable[CheckpointRecord], plan_hash: str) -> bool:
    """Whether nothing is left to do for exactly these bytes. Any change of the file opens the question again."""
    return any(
        record.checkpoint == file.name
        and record.plan_hash == plan_hash
        and (record.size, record.modified_ns) == (file.size, file.modified_ns)
        and record.status in SETTLED
        and not _may_be_readable_now(file, record)
        for record in records
    )


def _may_be_readable_now(file: WeightFile, record: CheckpointRecord) -> bool:
    """A chmod changes neither size nor modification time.

    The file's clock may be a file server's: only records that lack its time then are held against ours.
    """
    verdict = record.quarantine
    if verdict is None or verdict.code != "unreadable":
        return False
    if record.changed_s is None:
        return file.changed_s > verdict.since.timestamp()
    return abs(file.changed_s - record.changed_s) > 1e-6  # a float of seconds since 1970 keeps 0.2 us


def open_files(trial: TrialView) -> list[WeightFile]:
    """The trial's unsettled files in the order to evaluate them.

    While the optimizer waits for the score of a trained trial the final one comes first, else epoch by epoch; what
    was interrupted goes to the back.
    """
    interrupted = {r.checkpoint: len(r.attempts) for r in trial.records if r.attempts and r.status not in SETTLED}

    def order(file: WeightFile) -> tuple[bool, int, bool, int, str]:
        waited_for = trial.state == "trained" and file.is_final
        return (not waited_for, interrupted.get(file.name, 0), file.epoch is None, file.epoch or 0, file.name)

    return sorted((f for f in trial.files if not is_settled(f, trial.records, trial.plan_hash)), key=order)


def is_over(trial: TrialView, idle_timeout_s: float) -> bool:
    """Whether no further checkpoint will come: the trial is final, or everybody who could write one has gone."""
    if trial.state in TERMINAL_STATES:
        return True
    if trial.state is not None:
        return not trial.owner_lives
    return trial.idle_s >= idle_timeout_s and not trial.trainer_lives


def is_truncated(file: WeightFile, trial: TrialView) -> bool:
    """Whether an incomplete or unreadable file will stay so: nobody writes it and it has not changed for long."""
    if trial.trainer_lives:
        return False
    return file.age_s >= (TRUNCATED_AFTER_S_WITHOUT_STATE if trial.state is None else TRUNCATED_AFTER_S)


def wanted_trials(trials: Sequence[TrialView], idle_timeout_s: float, *, once: bool) -> list[TrialView]:
    """The trials that need an evaluator, most urgent first.

    Trained trials, for whose score the optimizer waits; running ones with work; other finished ones with work, pruned
    last; then, unless `once`, running trials whose first or next checkpoint is still to come.
    """

    def rank(trial: TrialView) -> int | None:
        if open_files(trial):
            if trial.state == "trained":
                return 0
            if trial.state == "pruned":
                return 3
            return 2 if is_over(trial, idle_timeout_s) else 1
        return None if once or is_over(trial, idle_timeout_s) else 4

    ranked = [(order, trial) for trial in trials if (order := rank(trial)) is not None]
    return [trial for _, trial in sorted(ranked, key=lambda pair: pair[0])]


def quarantine_code(record: CheckpointRecord, *, others_succeeded: bool) -> str | None:
    """Why a checkpoint must not be tried again, after its latest attempt ended; None when it may."""
    if record.strikes >= MAX_STRIKES:
        return "three_strikes"
    if record.interruptions_in_a_row >= SUSPECT_AFTER_INTERRUPTIONS and others_succeeded:
        return "suspect"
    return None


def back_off_s(failures: int, chance: float = 1.0) -> float:
    """How long to wait before an evaluator that failed `failures` times in a row is started again: 2, 4, ... 300 s.

    Args:
        chance: in [0, 1); what failed together is tried again apart, after half the time to the whole.
    """
    return min(300.0, 2.0 ** min(failures, 9)) * (0.5 + 0.5 * chance) if failures else 0.0

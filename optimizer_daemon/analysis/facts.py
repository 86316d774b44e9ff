"""What a study found, as one frozen picture of its folder: every table, plot and report is made from this alone.

`gather.gather(study)` builds it from the files of the folder, without Optuna and without a daemon; `standing.py` works
out what only the comparison of checkpoints tells. Numbers of trials are those people see, counted from 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from optimizer_daemon.goals import Goal
from shared.schemas import AllTrials, CurvePoint, EvaluationPlan, Metrics, Run, Sample, Scalar, TrialParams, TrialState
from shared.scores.comparing import Comparison

PIXELS = ("brightness", "contrast", "saturation")
"""The seed's three figures, 0-1; every evaluation has them."""

BASE_MODEL = "base model"
"""What the base model alone is called among checkpoints."""


@dataclass(frozen=True)
class CheckpointFacts:
    """One evaluated checkpoint.

    Args:
        name: its file name without .safetensors; "base model" for the base model alone.
        epoch: after which it was saved; None where nothing tells.
        objective: name of the study's score.
        metrics: everything measured; `metrics.samples` names the pictures.
        folder: where its pictures lie, sample_0.png and so on, and grid.png.
        weights: the file; None once it was deleted, and for the base model.
        goals: the goal bands against what was measured.
    """

    name: str
    epoch: int | None
    objective: str
    metrics: Metrics
    folder: Path
    weights: Path | None
    goals: tuple[Goal, ...]

    @property
    def score(self) -> float | None:
        """The objective; lower is better. None where a metric that it needs is missing."""
        return self.scored(self.objective)

    def scored(self, name: str) -> float | None:
        """Return a score by name."""
        score = self.metrics.scores.get(name)
        return None if score is None else score.value

    def mean(self, metric: str) -> float | None:
        """Return a metric's mean over the pictures."""
        found = self.metrics.metrics.get(metric)
        return None if found is None else found.value

    def std(self, metric: str) -> float | None:
        """Return a metric's standard deviation over the pictures."""
        found = self.metrics.metrics.get(metric)
        return None if found is None else found.std

    def per_image(self, metric: str) -> tuple[float, ...]:
        """Return a metric's value of each picture that has one."""
        found = self.metrics.metrics.get(metric)
        return tuple(v for v in (found.per_image or () if found is not None else ()) if v is not None)

    @property
    def feasible(self) -> bool:
        """Whether it passed its gate and so may win."""
        return self.metrics.gate.feasible

    @property
    def sentinels_passed(self) -> bool:
        """Whether no picture is black or flat."""
        check = self.metrics.gate.checks.get("sentinels")
        return check is None or check.passed is not False

    @property
    def pictures(self) -> tuple[tuple[Sample, Path], ...]:
        """Each sample with the file of its picture."""
        return tuple((sample, self.folder / Path(sample.file).name) for sample in self.metrics.samples)

    @property
    def in_goal_bands(self) -> bool:
        """Whether every goal is reached."""
        return all(goal.reached for goal in self.goals)


@dataclass(frozen=True)
class QuarantinedFacts:
    """A checkpoint that could not be evaluated.

    Args:
        code: short stable word, such as three_strikes or not_finite.
    """

    trial: int
    checkpoint: str
    code: str
    reason: str


@dataclass(frozen=True)
class TrialFacts:
    """One trial.

    Args:
        params: its parameters, drawn and derived, and where they come from.
        state: how far it got; its value is what Optuna was told.
        checkpoints: the evaluated ones, by epoch; the final one last.
        final: the one that decides; None until it has a score.
        training_s: how long its last attempt trained, in seconds; None where that is not recorded.
        peak_memory: most host memory of its training, in bytes; None where that is not recorded.
        quarantined: checkpoints without an evaluation.
    """

    params: TrialParams
    state: TrialState
    checkpoints: tuple[CheckpointFacts, ...]
    final: CheckpointFacts | None
    training_s: float | None
    peak_memory: int | None
    quarantined: tuple[QuarantinedFacts, ...]

    @property
    def number(self) -> int:
        """As in the folder's name, counted from 1."""
        return self.params.trial

    @property
    def optuna_number(self) -> int:
        """Counted from 0."""
        return self.params.optuna_number

    @property
    def parameters(self) -> Mapping[str, Scalar]:
        return self.params.parameters

    @property
    def drawn(self) -> Mapping[str, Scalar]:
        """The parameters that were not computed from others."""
        return {name: value for name, value in self.parameters.items() if name not in self.params.derived}

    @property
    def value(self) -> float | None:
        """The objective; None unless complete."""
        return self.state.value

    @property
    def may_win(self) -> bool:
        """Whether it is complete, has a value and passed its gate."""
        return self.state.state == "complete" and self.value is not None and self.state.feasible is not False

    @property
    def curve(self) -> tuple[CurvePoint, ...]:
        """The objective by epoch, as the pruner saw it."""
        return self.state.curve

    @property
    def took_s(self) -> float | None:
        """Seconds from the start of its training to its end, with scoring; None while it runs."""
        started, ended = self.state.started, self.state.ended
        return None if started is None or ended is None else (ended - started).total_seconds()


@dataclass(frozen=True)
class Standing:
    """How sure the ranking of the trials is, from their final checkpoints on the common grid of prompts and seeds.

    Args:
        tied: trials that the pictures cannot tell from the best one, the best score first, the winner among them.
        certainty: chance that the winner is truly the best of those compared, 0-1; None where too few pictures tell.
        compared: how many trials were compared: the best ones, at most standing.MOST_COMPARED.
        pictures: per checkpoint.
        why_not: why the winner could not be compared; else "".
    """

    tied: tuple[int, ...]
    certainty: float | None
    compared: int
    pictures: int
    why_not: str = ""


@dataclass(frozen=True)
class Overtaken:
    """A trial whose final checkpoint is certainly not its best one.

    Args:
        better: the earlier checkpoint with the best score.
        tied: names of the checkpoints that cannot be told from it, itself first; the final one is not among them.
    """

    trial: int
    better: CheckpointFacts
    final: CheckpointFacts
    tied: tuple[str, ...]


@dataclass(frozen=True)
class Rate:
    """One of the seed's four rates.

    Args:
        name: rejected, stable, quality failure or optimal.
        count: trials it is true of.
        of: trials it could be true of.
        meaning: what is counted.
        before: what the user's first search space had, e.g. "40-50 %".
        hoped: what search space V2.1 was to reach.
    """

    name: Literal["rejected", "stable", "quality failure", "optimal"]
    count: int
    of: int
    meaning: str
    before: str
    hoped: str

    @property
    def share(self) -> float | None:
        """0-1; None where there was nothing to count."""
        return self.count / self.of if self.of else None


@dataclass(frozen=True)
class Timings:
    """Where the time went; seconds.

    Args:
        first: when the first training started.
        last: when the last trial ended.
        training_s: of all trials together.
        evaluation_s: of all checkpoints together.
        median_trial_s: from start to end of a finished trial.
        median_evaluation_s: of one checkpoint.
    """

    first: datetime | None
    last: datetime | None
    training_s: float
    evaluation_s: float
    median_trial_s: float | None
    median_evaluation_s: float | None


@dataclass(frozen=True)
class StudyFacts:
    """Everything.

    Args:
        folder: of the study.
        name: of the study; the folder's, where run.json is missing or damaged.
        run: run.json; None where it is missing or damaged.
        objective: name of the score; lower is better.
        made: when this was gathered.
        trials: by number; those whose files are missing or damaged are left out and named in `problems`.
        results: the same trials as results/all_trials.json has them.
        ranking: the complete trials, best first; those that failed their gate last.
        winner: the best trial that passed its gate, as results/best_parameters.json names it.
        standing: how sure that is; None without a winner.
        overtaken: trials among the best whose earlier checkpoint certainly beats the final one.
        best_checkpoint: the one with the best score of all that may win, of any epoch and trial; its luck is not
            discounted. None without one.
        base: the base model alone; None until it was rendered.
        baselines: the LoRAs passed by --baseline, by name.
        against: "base model" or a baseline's name -> the winner's final checkpoint, the first side, held against it.
        rates: the seed's four.
        problems: each missing or damaged file, in words.
    """

    folder: Path
    name: str
    run: Run | None
    objective: str
    made: datetime
    trials: tuple[TrialFacts, ...]
    results: AllTrials
    ranking: tuple[TrialFacts, ...]
    winner: TrialFacts | None
    standing: Standing | None
    overtaken: tuple[Overtaken, ...]
    best_checkpoint: tuple[TrialFacts, CheckpointFacts] | None
    base: CheckpointFacts | None
    baselines: Mapping[str, CheckpointFacts]
    against: Mapping[str, Comparison]
    rates: tuple[Rate, ...]
    timings: Timings
    problems: tuple[str, ...]

    @property
    def plan(self) -> EvaluationPlan | None:
        """The evaluation plan; None where nothing is rendered, or run.json cannot be read."""
        return self.run.plan if self.run is not None else None

    def trial(self, number: int) -> TrialFacts:
        """Return a trial by the number people see.

        Raises:
            KeyError: there is none.
        """
        for trial in self.trials:
            if trial.number == number:
                return trial
        raise KeyError(number)

    @property
    def failures(self) -> tuple[TrialFacts, ...]:
        """The trials that failed; `state.reason` says why."""
        return tuple(trial for trial in self.trials if trial.state.state == "failed")

    def count(self, *states: str) -> int:
        """Return how many trials are in one of these states."""
        return sum(trial.state.state in states for trial in self.trials)

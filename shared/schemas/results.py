"""results/analysis/summary_statistics.json: what the study found, in figures."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.schemas.base import (
    Count,
    Epoch,
    Fraction,
    Name,
    OptunaNumber,
    Record,
    Seconds,
    Time,
    TrialNumber,
    VersionedFile,
)
from shared.schemas.optimizer import TrialStateName


class Spread(Record):
    """How a figure is spread over the trials."""

    count: Count = Field(description="Trials that have it.")
    mean: float = Field(description="Mean.")
    std: float = Field(description="Standard deviation; 0 for one trial.")
    minimum: float = Field(description="Smallest.")
    median: float = Field(description="Median.")
    maximum: float = Field(description="Largest.")


class WinnerFigures(Record):
    """The best trial, and how sure that is."""

    trial: TrialNumber = Field(description="The best trial that passed its gate.")
    optuna_number: OptunaNumber = Field(description="Its number in the Optuna database.")
    value: float = Field(description="Its objective.")
    checkpoint: str | None = Field(description="The deciding checkpoint, relative to the study folder; null if gone.")
    epoch: Epoch | None = Field(description="Its epoch; null when nothing tells it.")
    certainty: Fraction | None = Field(
        description="Chance that it is truly the best of those compared; null where too few pictures tell."
    )
    tie_set: tuple[TrialNumber, ...] = Field(
        description="Trials that the pictures cannot tell from the best one, the best score first."
    )
    compared: Count = Field(description="How many trials were compared: the best ones, at most 100.")
    pictures: Count = Field(description="Pictures per checkpoint.")
    why_not: str = Field(description="Why certainty is null; else empty.")


class GoalFigures(Record):
    """One goal."""

    low: float = Field(description="Lower end of the band to reach.")
    high: float = Field(description="Upper end.")
    value: float | None = Field(description="What was measured; null where it could not be.")
    missed_by: float | None = Field(description="How far outside the band; 0 when reached, null if not measured.")


class DifferenceFigures(Record):
    """The winner against somebody else, in one score or metric."""

    winner: float | None = Field(description="The winner's figure.")
    other: float | None = Field(description="The other's.")
    difference: float | None = Field(description="Winner minus other on the same prompts and seeds; null if unknown.")
    low: float | None = Field(description="Lower end of its paired 95 % interval; null where too few pictures tell.")
    high: float | None = Field(description="Upper end.")
    verdict: Name = Field(description="Of the winner: better, worse, differs, or cannot be told and the like.")


class RateFigures(Record):
    """One of the four rates the search space was made for."""

    count: Count = Field(description="Trials it is true of.")
    of: Count = Field(description="Trials it could be true of.")
    share: Fraction | None = Field(description="count / of; null where there was nothing to count.")
    meaning: Name = Field(description="What is counted.")
    before: Name = Field(description="What the first search space had.")
    hoped: Name = Field(description="What search space V2.1 was to reach.")


class ImportanceFigures(Record):
    """How much one parameter decides the objective."""

    share: Fraction = Field(description="Its share by PED-ANOVA.")
    low: Fraction | None = Field(description="Lower end of the 80 % bootstrap interval; null with too few trials.")
    high: Fraction | None = Field(description="Upper end.")


class CorrelationFigures(Record):
    """How one parameter goes with one figure."""

    parameter: Name = Field(description="The parameter; name=choice for a choice.")
    figure: Name = Field(description="The objective, or a metric's mean.")
    rho: float = Field(ge=-1, le=1, description="Spearman's rank correlation.")
    low: float = Field(ge=-1, le=1, description="Lower end of its 95 % interval.")
    high: float = Field(ge=-1, le=1, description="Upper end.")
    trials: Count = Field(description="Trials it is over.")


class EarlierCheckpoint(Record):
    """A trial whose earlier checkpoint beats the final one by more than chance explains."""

    trial: TrialNumber = Field(description="The trial.")
    checkpoint: Name = Field(description="The earlier checkpoint's name.")
    file: str | None = Field(description="Its file, relative to the study folder; null if gone.")
    epoch: Epoch | None = Field(description="Its epoch.")
    score: float = Field(description="Its objective.")
    final_score: float | None = Field(description="The final checkpoint's.")
    tie_set: tuple[Name, ...] = Field(description="Checkpoints that cannot be told from it, itself first.")


class BestAnywhere(Record):
    """The checkpoint with the best score of all epochs of all trials; its luck is not discounted."""

    trial: TrialNumber = Field(description="Its trial.")
    checkpoint: Name = Field(description="Its name.")
    epoch: Epoch | None = Field(description="Its epoch.")
    score: float = Field(description="Its objective.")


class Failure(Record):
    """A trial that failed."""

    trial: TrialNumber = Field(description="The trial.")
    reason: Name = Field(description="Why.")


class TimeFigures(Record):
    """Where the time went."""

    first: Time | None = Field(description="When the first training started.")
    last: Time | None = Field(description="When the last trial ended.")
    training: Seconds = Field(description="All trainings together, their last attempts.")
    evaluation: Seconds = Field(description="All evaluations together.")
    median_trial: Seconds | None = Field(description="Of a finished trial, from start to end.")
    median_evaluation: Seconds | None = Field(description="Of one checkpoint.")


class SummaryStatistics(VersionedFile):
    """What the study found, in figures; OPTIMIZATION_REPORT.md says the same in words."""

    study_name: Name = Field(description="Name of the Optuna study.")
    updated: Time = Field(description="When this file was written.")
    objective: Name = Field(description="Name of the score.")
    direction: Literal["minimise", "maximise"] = Field(description="Which end of the score is better.")
    trials: dict[TrialStateName, Count] = Field(description="How many trials are in each state; absent for none.")
    winner: WinnerFigures | None = Field(description="The best trial; null until there is one.")
    values: Spread | None = Field(description="The objective over the complete trials that passed their gate.")
    metrics: dict[Name, Spread] = Field(description="Each metric's mean over the same trials' final checkpoints.")
    goals: dict[Name, dict[Name, GoalFigures]] = Field(
        description="Goals of the winner, of the base model and of each baseline."
    )
    against: dict[Name, dict[Name, DifferenceFigures]] = Field(
        description="The winner against the base model and each baseline, by score or metric."
    )
    rates: dict[Name, RateFigures] = Field(description="The four rates.")
    importances: dict[Name, ImportanceFigures] = Field(description="Of each parameter, the largest first.")
    correlations: tuple[CorrelationFigures, ...] = Field(description="Of parameters with figures.")
    overtaken: tuple[EarlierCheckpoint, ...] = Field(description="Trials whose final checkpoint is not their best.")
    best_checkpoint: BestAnywhere | None = Field(description="The best of all epochs of all trials.")
    failures: tuple[Failure, ...] = Field(description="The trials that failed.")
    times: TimeFigures = Field(description="Where the time went, in seconds.")
    problems: tuple[str, ...] = Field(description="Files that were missing or damaged, and what could not be told.")

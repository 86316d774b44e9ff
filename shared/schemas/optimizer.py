"""What the optimizer daemon writes: the run, each trial's parameters and state, the results."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from shared.schemas.base import (
    Count,
    Epoch,
    Name,
    OptunaNumber,
    Record,
    Scalar,
    Sha256,
    Time,
    TrialNumber,
    VersionedFile,
)
from shared.schemas.pictures import StudyPictures
from shared.schemas.plan import EvaluationPlan

RunStatus = Literal["running", "stopped", "finished"]
TrialStateName = Literal["drawn", "training", "trained", "complete", "pruned", "failed", "interrupted"]
Direction = Literal["minimise", "maximise"]
TERMINAL_STATES: frozenset[TrialStateName] = frozenset({"complete", "pruned", "failed"})
"""States a trial never leaves."""


class Trainer(Record):
    """The command that trains."""

    name: Name = Field(description="Registered name: kohya, native, command or a workload's own.")
    version: str | None = Field(default=None, description="Its version or commit; null when it has none.")
    python: str | None = Field(
        default=None, description="Interpreter it runs under; null when it is no Python program."
    )
    directory: str | None = Field(default=None, description="Folder of its program: a checkout of kohya's sd-scripts.")
    family: Literal["sd15", "sdxl"] | None = Field(
        default=None, description="Family of the base model; null when it says none that is known."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="The study file's [trainer.<name>] table: settings of every training."
    )


class Objective(Record):
    """One of several things that a study optimises at once."""

    name: Name = Field(description="Score or quantity, as in metrics.json.")
    direction: Direction = Field(description="Which end of its value is better.")
    target: float | None = Field(
        default=None,
        description="What the quantity is to reach: its value is |mean - target|; null where it is the mean.",
    )


class Baseline(Record):
    """A LoRA of the user's own that the study is held against."""

    file: Name = Field(description="File it was copied from.")
    sha256: Sha256 = Field(description="Identity of its content: the hash of its tensor data.")


class WarmUpRule(Record):
    """A rule of the search space that depends on the data set."""

    when: Name = Field(description="What it refuses, in the language of search spaces.")
    reason: Name = Field(description="Why.")


class StageOfRun(Record):
    """The stage that a run is in."""

    name: Name = Field(description="Its name, which its trials have in their params.json.")
    number: int = Field(ge=1, description="Its place among the stages of the run.")
    of: int = Field(ge=1, description="How many stages the run has.")
    trials: int = Field(ge=1, description="Finished trials to reach in it.")
    epochs: int | None = Field(default=None, ge=1, description="Epochs of each of its trials.")
    study_trials: int = Field(ge=1, description="Finished trials of the whole study after the last stage of the run.")


class Run(VersionedFile):
    """The one truth about a study: what it is and under which settings it runs."""

    folder_id: Name = Field(description="Random identity of this folder, also kept in the Optuna study as its owner.")
    study_name: Name = Field(description="Name of the Optuna study.")
    storage: Name = Field(description="Optuna storage URL of the live database.")
    workload: Name = Field(description="Kind of study: its defaults, constraints and objective.")
    score_source: Literal["evaluator", "trainer"] = Field(description="Who measures the objective.")
    status: RunStatus = Field(description="running while the daemon lives, stopped after an orderly stop, finished.")
    created: Time = Field(description="When the study folder was made.")
    updated: Time = Field(description="When this file was written.")
    base_model: str | None = Field(default=None, description="Path of the base model; its identity is in the plan.")
    plan: EvaluationPlan | None = Field(
        description="The evaluation plan, frozen at the first start; null when the trainer scores."
    )
    plan_hash: Sha256 | None = Field(description="Identity of the plan, recorded with every evaluation.")
    pictures: StudyPictures | None = Field(
        default=None, description="The data set's pictures at the first start; null where no metric looks at them."
    )
    dataset_files: dict[Name, Sha256] | None = Field(
        default=None,
        description="The data set at the first start, by path: its TOML (what it says), pictures and captions. null "
        "until the next start of a study that an earlier version began.",
    )
    baselines: dict[str, Baseline] = Field(
        default_factory=dict, description="LoRAs the study is held against, by name; their copies lie in baseline/."
    )
    trainer: Trainer = Field(description="The trainer.")
    settings: dict[str, Scalar | tuple[Scalar, ...] | None] = Field(
        description="Effective settings of the optimizer daemon by flag name, without the dashes."
    )
    slots: int = Field(default=1, ge=1, description="Trainings that may run at once.")
    warm_up_rule: WarmUpRule | None = Field(
        default=None,
        description="That a warm-up takes at most half of a training, on this data set; null where the search space "
        "draws no warm-up, where the steps could not be told, and in studies of an earlier version.",
    )
    stage: StageOfRun | None = Field(
        default=None, description="The stage that runs, or ran last; null for a run without stages."
    )
    threads_per_process: int = Field(ge=1, description="CPU threads each trainer and each evaluator gets.")
    versions: dict[str, str] = Field(description="Versions of this program, Python and the libraries in use.")

    @model_validator(mode="after")
    def _hash_belongs_to_plan(self) -> Self:
        if self.plan_hash != (self.plan and self.plan.digest()):
            raise ValueError("plan_hash is not the hash of plan")
        if self.score_source == "evaluator" and self.plan is None:
            raise ValueError("score_source is evaluator but there is no plan")
        return self


class TrialParams(VersionedFile):
    """The frozen values one trial runs with."""

    trial: TrialNumber = Field(description="Number of the trial, as in its folder's name.")
    optuna_number: OptunaNumber = Field(description="Number of the trial in the Optuna database.")
    parameters: dict[str, Scalar] = Field(
        description="Every hyperparameter, the derived ones such as network_alpha too."
    )
    derived: tuple[Name, ...] = Field(default=(), description="Which parameters were computed rather than drawn.")
    origin: Literal["sampler", "enqueued", "finalist"] = Field(description="Where the values come from.")
    finalist_of: TrialNumber | None = Field(default=None, description="The trial this one repeats with a fresh seed.")
    stage: str | None = Field(default=None, description="Stage of a staged search the trial was drawn in.")
    training_seed: int = Field(ge=0, description="Seed of the training.")

    @property
    def max_train_epochs(self) -> int | None:
        """Epochs the trial trains; None for a workload that does not count in epochs."""
        epochs = self.parameters.get("max_train_epochs")
        return epochs if isinstance(epochs, int) else None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_numbers(self.trial, self.optuna_number)
        _check_derived(self.derived, self.parameters)
        if (self.origin == "finalist") != (self.finalist_of is not None):
            raise ValueError("origin finalist and finalist_of belong together")
        return self


class CurvePoint(Record):
    """One scored checkpoint of a trial."""

    epoch: Epoch = Field(description="Epoch of the checkpoint.")
    value: float = Field(description="Objective measured there.")
    checkpoint: Name = Field(description="Checkpoint's file name without .safetensors.")
    values: dict[Name, float] = Field(
        default_factory=dict, description="Each objective by name, when the study has several."
    )


class TrialState(VersionedFile):
    """How far a trial got."""

    trial: TrialNumber = Field(description="Number of the trial, as in its folder's name.")
    optuna_number: OptunaNumber = Field(description="Number of the trial in the Optuna database.")
    state: TrialStateName = Field(
        description="drawn, training, trained (score pending); complete, pruned, failed are final; interrupted goes on."
    )
    reason: str | None = Field(default=None, description="Why, for pruned, failed and interrupted.")
    attempt: int = Field(ge=1, description="Which attempt this is; a redo from zero counts one up.")
    resumes: Count = Field(default=0, description="How often this attempt went on from its training state.")
    ran_short_of: tuple[Name, ...] = Field(
        default=(),
        description="Memory that ran out while others used it too: the host's, or GPUs by UUID. That is excused once: "
        "the trial trained again, with those GPUs to itself.",
    )
    gpu: Name | None = Field(
        default=None, description="GPU this attempt's training runs or ran on, by UUID; null on a CPU."
    )
    drawn: Time = Field(description="When the parameters were drawn.")
    started: Time | None = Field(default=None, description="When this attempt's training started.")
    ended: Time | None = Field(default=None, description="When the trial reached its final state.")
    value: float | None = Field(
        default=None,
        description="Objective told to the study; null until complete. When the study has several, the score of its "
        "scoring, by which trainings are stopped.",
    )
    imputed_value: float | None = Field(
        default=None, description="What a pruned trial would probably have reached; never a measurement."
    )
    objectives: dict[str, float] = Field(
        default_factory=dict, description="Each objective by name, when the study has several."
    )
    feasible: bool | None = Field(
        default=None, description="Whether the scored checkpoint passed its gate; null until scored."
    )
    curve: tuple[CurvePoint, ...] = Field(
        default=(), description="Objective of the checkpoints scored so far, by epoch."
    )
    finalist_of: TrialNumber | None = Field(default=None, description="The trial this one repeats with a fresh seed.")
    deleted: tuple[Name, ...] = Field(default=(), description="Weight files removed to save space.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_numbers(self.trial, self.optuna_number)
        if (self.state in TERMINAL_STATES) != (self.ended is not None):
            raise ValueError(f"state {self.state} and ended {self.ended} contradict each other")
        if self.state in ("pruned", "failed", "interrupted") and not self.reason:
            raise ValueError(f"state {self.state} needs a reason")
        if self.state == "complete" and self.value is None and not self.objectives:
            raise ValueError("state complete needs a value")
        return self


class BestParameters(VersionedFile):
    """The best trial so far, with everything needed to train it again."""

    study_name: Name = Field(description="Name of the Optuna study.")
    updated: Time = Field(description="When this file was written.")
    trial: TrialNumber = Field(description="The best trial.")
    optuna_number: OptunaNumber = Field(description="Its number in the Optuna database.")
    chosen_as: Literal["best", "knee"] = Field(
        default="best",
        description="best: it has the best objective. knee: the study has several; it is the knee of their front, see "
        "analysis/pareto_front.json.",
    )
    objective: Name = Field(description="Name of the score.")
    direction: Direction = Field(description="Which end of the score is better.")
    value: float = Field(description="The trial's objective.")
    values: dict[Name, float] = Field(
        default_factory=dict, description="Each objective by name, when the study has several."
    )
    checkpoint: str | None = Field(
        default=None, description="Checkpoint that decided it, relative to the study folder."
    )
    checkpoint_sha256: Sha256 | None = Field(default=None, description="Identity of that checkpoint.")
    finalist_of: TrialNumber | None = Field(
        default=None, description="The trial it repeats with a fresh seed, where it is a finalist."
    )
    first_value: float | None = Field(
        default=None, description="That trial's own objective, which it was chosen by: luck may have a part in it."
    )
    epoch: Epoch | None = Field(default=None, description="Its epoch.")
    parameters: dict[str, Scalar] = Field(description="Every hyperparameter, the derived ones too.")
    derived: tuple[Name, ...] = Field(default=(), description="Which parameters were computed rather than drawn.")
    tie_set: tuple[TrialNumber, ...] = Field(
        default=(), description="Trials the measurements cannot tell from the best one, itself included."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_numbers(self.trial, self.optuna_number)
        _check_derived(self.derived, self.parameters)
        return self


class TrialResult(Record):
    """One line of the study's history."""

    trial: TrialNumber = Field(description="Number of the trial.")
    optuna_number: OptunaNumber = Field(description="Its number in the Optuna database.")
    state: TrialStateName = Field(description="State as in trial_state.json.")
    reason: str | None = Field(default=None, description="Why, for pruned, failed and interrupted.")
    value: float | None = Field(default=None, description="Objective; null when there is none.")
    values: dict[Name, float] = Field(
        default_factory=dict, description="Each objective by name, when the study has several."
    )
    feasible: bool | None = Field(default=None, description="Whether it passed its gate; null until scored.")
    parameters: dict[str, Scalar] = Field(description="Every hyperparameter, the derived ones too.")
    derived: tuple[Name, ...] = Field(default=(), description="Which parameters were computed rather than drawn.")
    curve: tuple[CurvePoint, ...] = Field(default=(), description="Objective of the scored checkpoints, by epoch.")
    stage: str | None = Field(default=None, description="Stage of a staged search the trial was drawn in.")
    origin: Literal["sampler", "enqueued", "finalist"] = Field(
        default="sampler", description="Where its values come from."
    )
    finalist_of: TrialNumber | None = Field(default=None, description="The trial this one repeats with a fresh seed.")
    started: Time | None = Field(default=None, description="When its training started.")
    ended: Time | None = Field(default=None, description="When it reached its final state.")


class BaselineResult(Record):
    """What is known of a LoRA the study is held against."""

    name: Name = Field(description="Its name.")
    value: float | None = Field(default=None, description="Objective; null when there is none.")
    feasible: bool | None = Field(default=None, description="Whether it passed its gate; null until scored.")
    reason: str | None = Field(default=None, description="Why it has no score, or failed its gate.")
    scores: dict[str, float | None] = Field(default_factory=dict, description="Each score by name.")


class AllTrials(VersionedFile):
    """Every trial of the study."""

    study_name: Name = Field(description="Name of the Optuna study.")
    updated: Time = Field(description="When this file was written.")
    objective: Name = Field(description="Name of the score.")
    direction: Direction = Field(description="Which end of the score is better.")
    objectives: tuple[Objective, ...] = Field(
        default=(),
        description="What is optimised, when that are several things; objective then only ranks running trainings.",
    )
    trials: tuple[TrialResult, ...] = Field(description="The trials by number.")
    baselines: tuple[BaselineResult, ...] = Field(default=(), description="The LoRAs of --baseline, by name.")


class FrontMember(Record):
    """A trial that no other one is better than in every objective."""

    trial: TrialNumber = Field(description="Number of the trial.")
    optuna_number: OptunaNumber = Field(description="Its number in the Optuna database.")
    values: dict[Name, float] = Field(description="Each objective by name.")
    value: float = Field(description="The score of the study's scoring.")
    checkpoint: str = Field(description="Checkpoint that was measured, relative to the study folder.")
    knee_distance: float = Field(
        description="How far it lies before the plane through the ends of the axes, every objective scaled over the "
        "front to 0 (best) and 1 (worst)."
    )


class FrontGrowth(Record):
    """How much the trials up to one have reached together."""

    trial: TrialNumber = Field(description="The trial, in the order in which they ended.")
    hypervolume: float = Field(ge=0, description="Hypervolume of all trials up to it.")


class ParetoFront(VersionedFile):
    """The best trade-offs of a study with several objectives. Only trials that passed their gate count."""

    study_name: Name = Field(description="Name of the Optuna study.")
    updated: Time = Field(description="When this file was written.")
    objectives: tuple[Objective, ...] = Field(min_length=2, description="What is optimised.")
    front: tuple[FrontMember, ...] = Field(description="Its members, the best in the first objective first.")
    knee: TrialNumber | None = Field(
        default=None,
        description="The member with the greatest knee_distance, at a tie the one with the better score; null without "
        "a front.",
    )
    reference_point: dict[Name, float] | None = Field(
        default=None,
        description="Where hypervolumes are measured from: the worst value of each objective so far, and a tenth of "
        "its spread beyond; null without a front. It moves with the trials, so compare hypervolumes of one file only.",
    )
    hypervolume: float | None = Field(
        default=None, ge=0, description="What the front dominates up to there, the product of the objectives' units."
    )
    history: tuple[FrontGrowth, ...] = Field(
        default=(), description="The same after each complete trial, from the same reference point."
    )


def _check_numbers(trial: int, optuna_number: int) -> None:
    if trial != optuna_number + 1:
        raise ValueError(f"trial {trial} is not optuna_number {optuna_number} + 1")


def _check_derived(derived: tuple[str, ...], parameters: dict[str, Scalar]) -> None:
    if unknown := sorted(set(derived) - set(parameters)):
        raise ValueError(f"derived names {', '.join(unknown)}, which parameters lacks")

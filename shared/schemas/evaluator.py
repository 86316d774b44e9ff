"""What an evaluator writes: each checkpoint's measurements, the trial's summary, the record of attempts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.schemas.base import Count, Epoch, Fraction, Name, Pixels, Record, Seconds, Sha256, Time, Unit, VersionedFile
from shared.schemas.plan import EvaluationPlan

MetricStatus = Literal["ok", "unavailable", "failed"]
Outcome = Literal["running", "recorded", "strike", "interruption"]
CheckpointStatus = Literal["waiting", "evaluating", "recorded", "quarantined", "truncated"]


class Metric(Record):
    """One measured quantity. What could not be measured is null, never 0."""

    version: Name = Field(description="Version of the definition; figures of different versions are not comparable.")
    direction: Literal["minimise", "maximise", "target"] = Field(
        description="Which end is better; target when the scoring preset names a value to reach."
    )
    status: MetricStatus = Field(
        description="ok; unavailable when its weights or libraries are missing; failed when measuring went wrong."
    )
    reason: str | None = Field(default=None, description="Why it is not ok.")
    value: float | None = Field(description="Mean over the images, or the figure of the whole set; null unless ok.")
    std: float | None = Field(default=None, description="Standard deviation over the images; null for a set's figure.")
    per_image: tuple[float | None, ...] | None = Field(
        default=None, description="Value of each sample in order; null for a set's figure."
    )
    nearest: tuple[str, ...] | None = Field(
        default=None, description="For each sample the file it was found nearest to; null where none is looked for."
    )

    @model_validator(mode="after")
    def _null_unless_ok(self) -> Self:
        if self.status == "ok" and (self.value is None or self.reason is not None):
            raise ValueError("status ok needs a value and no reason")
        if self.status != "ok" and (self.value is not None or self.std is not None or not self.reason):
            raise ValueError(f"status {self.status} needs a reason, and value and std must be null")
        return self


class Score(Record):
    """A figure computed from metrics."""

    value: float | None = Field(description="The score; null when a metric it requires is missing.")
    direction: Literal["minimise", "maximise"] = Field(description="Which end is better.")
    left_out: tuple[Name, ...] = Field(default=(), description="Metrics the score had to do without.")


class GateCheck(Record):
    """One condition a checkpoint must meet to be eligible, whatever its score."""

    passed: bool | None = Field(description="The verdict; null when it could not be checked.")
    value: float | None = Field(default=None, description="Measured value, where the condition has one.")
    limit: float | None = Field(default=None, description="Limit it is held against.")
    reason: str | None = Field(default=None, description="Why it did not pass or could not be checked.")

    @model_validator(mode="after")
    def _reason_unless_passed(self) -> Self:
        if (self.passed is True) == bool(self.reason):
            raise ValueError("a check needs a reason exactly when it did not pass")
        return self


class Gate(Record):
    """Whether the checkpoint may win."""

    feasible: bool = Field(description="Whether no check failed.")
    checks: dict[str, GateCheck] = Field(description="Each check by name: the image sentinels, the CLIP gate.")

    @model_validator(mode="after")
    def _feasible_follows(self) -> Self:
        if self.feasible != all(check.passed is not False for check in self.checks.values()):
            raise ValueError("feasible contradicts the checks")
        return self


class Sample(Record):
    """One rendered image."""

    file: Name = Field(description="Picture beside this file.")
    prompt: Name = Field(description="Its prompt.")
    seed: int = Field(ge=0, description="Its seed.")
    negative_prompt: str | None = Field(default=None, description="Its negative prompt, empty for none; null if old.")
    width: Pixels | None = Field(default=None, description="Its width; null in files from before it was kept.")
    height: Pixels | None = Field(default=None, description="Its height; null in files from before it was kept.")
    steps: int | None = Field(default=None, ge=1, description="Sampling steps; null if the file is that old.")
    sampler: Name | None = Field(default=None, description="Image sampler; null if the file is that old.")
    cfg_scale: float | None = Field(default=None, ge=0, description="Guidance scale; null if the file is that old.")


class PhaseSeconds(Record):
    """Where the time of an evaluation went."""

    load: Seconds = Field(description="Reading, checking and applying the weights.")
    render: Seconds = Field(description="Rendering the images.")
    measure: Seconds = Field(description="Computing the metrics.")
    total: Seconds = Field(description="Everything together.")


class Metrics(VersionedFile):
    """Everything measured for one checkpoint."""

    trial_name: Name = Field(description="Folder of the trial, or the label of an evaluation outside any trial.")
    checkpoint: Name = Field(description="Checkpoint's file name without .safetensors.")
    checkpoint_sha256: Sha256 | None = Field(
        description="Identity of the checkpoint: the hash of its tensor data; null for the base model alone."
    )
    plan_hash: Sha256 = Field(description="Identity of the evaluation plan.")
    epoch: Epoch | None = Field(description="Epoch it was saved after; null when nothing tells it.")
    evaluation_time: Time = Field(description="When the evaluation ended.")
    samples: tuple[Sample, ...] = Field(min_length=1, description="The images in order.")
    metrics: dict[str, Metric] = Field(description="Each metric by name.")
    scores: dict[str, Score] = Field(description="Each score by name; combined_score is always there.")
    gate: Gate = Field(description="Whether the checkpoint may win.")
    seconds: PhaseSeconds = Field(description="Where the time went.")
    batch_size: Annotated[int, Unit("images")] = Field(
        ge=1, description="Images rendered at once; smaller than the plan's after memory ran out."
    )
    device: Name = Field(description="Device that rendered.")
    library_versions: dict[str, str] = Field(description="Versions of the libraries that rendered and measured.")

    @model_validator(mode="after")
    def _one_value_per_image(self) -> Self:
        for name, metric in self.metrics.items():
            if metric.per_image is not None and len(metric.per_image) != len(self.samples):
                raise ValueError(f"metric {name} has {len(metric.per_image)} values for {len(self.samples)} samples")
        return self


class SummaryEntry(Record):
    """One checkpoint in the summary. The first five fields are those the earlier scripts wrote."""

    epoch: Epoch | None = Field(description="Epoch it was saved after; null when nothing tells it.")
    mean_brightness: Fraction | None = Field(description="Mean of RGB over the images.")
    mean_contrast: Fraction | None = Field(description="Standard deviation of RGB, mean over the images.")
    mean_saturation: Fraction | None = Field(description="HSV saturation, mean over the images.")
    evaluation_time: Time = Field(description="When the evaluation ended.")
    std_brightness: float | None = Field(default=None, description="Standard deviation of brightness over the images.")
    std_contrast: float | None = Field(default=None, description="Standard deviation of contrast over the images.")
    std_saturation: float | None = Field(default=None, description="Standard deviation of saturation over the images.")
    scores: dict[str, float | None] = Field(default_factory=dict, description="Each score by name.")
    metric_status: dict[str, MetricStatus] = Field(default_factory=dict, description="Each metric's status by name.")
    feasible: bool | None = Field(default=None, description="Whether the checkpoint may win; null when not recorded.")
    checkpoint_sha256: Sha256 | None = Field(default=None, description="Identity of the checkpoint.")
    plan_hash: Sha256 | None = Field(default=None, description="Identity of the evaluation plan.")
    seconds: Seconds | None = Field(default=None, description="How long the evaluation took.")


class BestCheckpoint(Record):
    """Which checkpoint has the best objective among those that may win, and how sure that is."""

    checkpoint: Name = Field(description="Its name.")
    epoch: Epoch | None = Field(description="Epoch it was saved after; null when nothing tells it.")
    objective: Name = Field(description="The score that decides.")
    score: float = Field(description="Its value.")
    certainty: Fraction | None = Field(
        description="Chance that it is truly the best of them; null where too few pictures or values tell."
    )
    tie_set: tuple[Name, ...] = Field(
        min_length=1,
        description="Checkpoints that cannot be told from the true best, best score first, itself among them.",
    )


class EvaluationSummary(VersionedFile):
    """How quality went with the epochs, in the shape the earlier scripts wrote, with fields added."""

    trial_name: Name = Field(description="Folder of the trial, or the label of an evaluation outside any trial.")
    total_checkpoints_evaluated: Count = Field(description="Number of entries below.")
    checkpoints: dict[str, SummaryEntry] = Field(description="Each evaluated checkpoint by name, in epoch order.")
    last_update: Time = Field(description="When this file was written.")
    best: BestCheckpoint | None = Field(
        default=None, description="The best of those whose gate is passed; null when there is none, or not recorded."
    )

    @model_validator(mode="after")
    def _total_counts_entries(self) -> Self:
        if self.total_checkpoints_evaluated != len(self.checkpoints):
            raise ValueError(
                f"total_checkpoints_evaluated is {self.total_checkpoints_evaluated} "
                f"but there are {len(self.checkpoints)} checkpoints"
            )
        return self


class LabelledPlan(VersionedFile):
    """What is evaluated under a label outside any trial, and with which plan; written before the first rendering."""

    label: Name = Field(description="The folder's name.")
    plan: EvaluationPlan = Field(description="The plan of everything under this label.")
    files: dict[str, str | None] = Field(
        description="Weight file of each checkpoint by name, absolute; null for the base model alone."
    )


class Attempt(Record):
    """One try to evaluate a checkpoint, written before it starts."""

    started: Time = Field(description="When it started.")
    ended: Time | None = Field(default=None, description="When it ended; null while it runs.")
    outcome: Outcome = Field(
        description="running; recorded; strike when it ended by itself without a result; interruption when stopped."
    )
    reason: str | None = Field(default=None, description="What went wrong.")

    @model_validator(mode="after")
    def _ended_unless_running(self) -> Self:
        if (self.outcome == "running") != (self.ended is None):
            raise ValueError(f"outcome {self.outcome} and ended {self.ended} contradict each other")
        if self.outcome in ("strike", "interruption") and not self.reason:
            raise ValueError(f"outcome {self.outcome} needs a reason")
        return self


class Quarantine(Record):
    """Why a checkpoint is not tried again until its file changes or somebody asks for it."""

    code: Name = Field(description="Short stable word: three_strikes, suspect, or the code of a refused file.")
    reason: Name = Field(description="The sentence for people.")
    since: Time = Field(description="When it was quarantined.")


class CheckpointRecord(Record):
    """What is known about one content under one name and one plan."""

    checkpoint: Name = Field(description="Checkpoint's file name without .safetensors.")
    checkpoint_sha256: Sha256 | None = Field(description="Hash of the tensor data; null where there is none to hash.")
    plan_hash: Sha256 = Field(description="Identity of the evaluation plan.")
    epoch: Epoch | None = Field(description="Epoch it was saved after; null when nothing tells it.")
    size: Annotated[int, Unit("bytes")] = Field(ge=0, description="Size of the file when it was last looked at.")
    modified_ns: Annotated[int, Unit("ns since 1970")] = Field(description="Its modification time then.")
    changed_s: Annotated[float, Unit("s since 1970")] | None = Field(
        default=None,
        description="When anything about it, its mode too, had last changed then; null where nobody looked, or if old.",
    )
    status: CheckpointStatus = Field(
        description="waiting for an evaluation, evaluating, recorded, quarantined, or truncated until the file changes."
    )
    attempts: tuple[Attempt, ...] = Field(default=(), description="Every try since the last retry request.")
    quarantine: Quarantine | None = Field(default=None, description="Why it is quarantined or truncated.")
    same_as: str | None = Field(default=None, description="Checkpoint of equal content whose evaluation stands for it.")

    @classmethod
    def of_result(cls, metrics: Metrics) -> Self:
        """Return the record of a checkpoint from its result alone; its file counts as never looked at."""
        return cls(
            checkpoint=metrics.checkpoint,
            checkpoint_sha256=metrics.checkpoint_sha256,
            plan_hash=metrics.plan_hash,
            epoch=metrics.epoch,
            size=0,
            modified_ns=0,
            status="recorded",
        )

    @property
    def strikes(self) -> int:
        """How many attempts ended by themselves without a result."""
        return sum(attempt.outcome == "strike" for attempt in self.attempts)

    @property
    def interruptions_in_a_row(self) -> int:
        """How many of the latest finished attempts were interrupted, one after the other."""
        outcomes = [attempt.outcome for attempt in self.attempts if attempt.outcome != "running"]
        return next((n for n, outcome in enumerate(reversed(outcomes)) if outcome != "interruption"), len(outcomes))

    @model_validator(mode="after")
    def _status_follows(self) -> Self:
        reasons = {"quarantined": (True,), "truncated": (True, False)}.get(self.status, (False,))
        if (self.quarantine is not None) not in reasons:
            raise ValueError(f"status {self.status} and quarantine contradict each other")
        if (self.status == "evaluating") != any(attempt.outcome == "running" for attempt in self.attempts):
            raise ValueError(f"status {self.status} and the attempts contradict each other")
        return self


class EvaluationState(VersionedFile):
    """The evaluator's memory: nothing is evaluated twice, nothing is tried for ever."""

    trial_name: Name = Field(description="Folder of the trial, or the label of an evaluation outside any trial.")
    updated: Time = Field(description="When this file was written.")
    checkpoints: tuple[CheckpointRecord, ...] = Field(description="One record per name, content and plan.")

    @model_validator(mode="after")
    def _unique(self) -> Self:
        keys = [(record.checkpoint, record.checkpoint_sha256, record.plan_hash) for record in self.checkpoints]
        if len(set(keys)) != len(keys):
            raise ValueError("two records share name, content and plan")
        return self

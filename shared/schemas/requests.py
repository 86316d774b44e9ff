"""Commands to a daemon, dropped as files by anybody, and the daemon's answers.

A person may write a request by hand, so these files need no checksum and no more fields than the command has.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, RootModel, model_validator

from shared.layout import LABEL_PATTERN
from shared.schemas.base import Name, Scalar, Time, TrialNumber, VersionedFile
from shared.schemas.plan import EvaluationPlan


class Request(VersionedFile):
    """What every request has."""

    asked_by: str | None = Field(default=None, description="Who asks, for the log.")
    asked: Time | None = Field(default=None, description="When.")


class Enqueue(Request):
    """Run this configuration next. It is refused, with every failing rule, where it breaks a constraint."""

    kind: Literal["enqueue"] = Field(description="The command.")
    parameters: dict[str, Scalar] = Field(
        default_factory=dict,
        description="Hyperparameters; the sampler draws the others. None are needed of a finalist.",
    )
    finalist_of: TrialNumber | None = Field(
        default=None, description="A complete trial, which this one repeats with a fresh seed; null for none."
    )
    training_seed: int | None = Field(default=None, ge=0, description="Seed of the training; null for the usual one.")

    @model_validator(mode="after")
    def _says_what(self) -> Self:
        if not self.parameters and self.finalist_of is None:
            raise ValueError("parameters are needed, or finalist_of")
        return self


class Pause(Request):
    """Start no more trials; the running ones go on."""

    kind: Literal["pause"] = Field(description="The command.")


class Resume(Request):
    """Start trials again."""

    kind: Literal["resume"] = Field(description="The command.")


class Stop(Request):
    """Stop in order: running trials are interrupted and go on at the next start."""

    kind: Literal["stop"] = Field(description="The command.")


class Set(Request):
    """Change settings of the running daemon."""

    kind: Literal["set"] = Field(description="The command.")
    settings: dict[str, Scalar] = Field(min_length=1, description="New values by flag name, without the dashes.")


class Analyze(Request):
    """Write the files of results/ anew; answered when they are written."""

    kind: Literal["analyze"] = Field(description="The command.")
    top_n: int = Field(default=10, ge=1, description="Trials in the table of the best ones.")


class Evaluate(Request):
    """Evaluate a weight file outside its trial; the results go to `evaluations/<label>/`."""

    kind: Literal["evaluate"] = Field(description="The command.")
    file: Name | None = Field(
        description="Weight file, absolute or relative to the study folder; null for the base model alone."
    )
    label: str = Field(pattern=LABEL_PATTERN, description="Folder below evaluations/ for the results.")
    plan: EvaluationPlan | None = Field(default=None, description="Plan to use; null for the study's.")
    priority: int = Field(default=0, description="Higher comes first; ordinary checkpoints have 0.")


class Retry(Request):
    """Forget the strikes and the quarantine of a checkpoint and evaluate it again."""

    kind: Literal["retry"] = Field(description="The command.")
    trial_name: Name = Field(description="Folder of the trial, or the label of an evaluation outside any trial.")
    checkpoint: str | None = Field(
        default=None, description="Checkpoint's file name without .safetensors; null for all of the trial."
    )


class OptimizerRequest(
    RootModel[Annotated[Enqueue | Pause | Resume | Stop | Set | Analyze, Field(discriminator="kind")]]
):
    """A command to the optimizer daemon; `root` is the command itself."""

    checksum_required: ClassVar[bool] = False


class EvaluatorRequest(RootModel[Annotated[Evaluate | Retry, Field(discriminator="kind")]]):
    """A command to the evaluator daemon; `root` is the command itself."""

    checksum_required: ClassVar[bool] = False


class Answer(VersionedFile):
    """What became of a request."""

    request: Name = Field(description="File name of the request.")
    kind: str | None = Field(description="The command; null when the request could not be read.")
    ok: bool = Field(description="Whether it was carried out.")
    result: dict[str, Scalar | None] = Field(
        default_factory=dict, description="What it led to, e.g. the trial's number."
    )
    error: str | None = Field(default=None, description="Why it was not carried out.")
    answered: Time = Field(description="When it was answered.")

    @model_validator(mode="after")
    def _error_unless_ok(self) -> Self:
        if self.ok == bool(self.error):
            raise ValueError("an answer needs an error exactly when it is not ok")
        return self

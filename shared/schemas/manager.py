"""What the evaluator manager writes about itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.schemas.base import Count, Name, Record, Time, VersionedFile


class ActiveEvaluator(Record):
    """One evaluator process, or one trial a reused worker is busy with."""

    trial_name: Name = Field(description="Folder of the trial, or the label of an evaluation outside any trial.")
    pid: int = Field(ge=1, description="Process id.")
    started: Time = Field(description="When it was started.")
    activity: Literal["starting", "waiting", "evaluating", "deferred"] = Field(
        description="deferred: waits for GPU memory or for the training to end."
    )
    checkpoint: str | None = Field(default=None, description="Checkpoint in hand.")


class QuarantinedCheckpoint(Record):
    """A view of a quarantine; the truth is in the trial's evaluation_state.json."""

    trial_name: Name = Field(description="Folder of the trial, or the label of an evaluation outside any trial.")
    checkpoint: Name = Field(description="Checkpoint's file name without .safetensors.")
    code: Name = Field(description="Short stable word.")
    reason: Name = Field(description="The sentence for people.")
    since: Time = Field(description="When it was quarantined.")


class EvaluatorManagerState(VersionedFile):
    """What the manager is doing. For display only: whether it lives is told by its lock."""

    status: Literal["waiting", "running", "stopped"] = Field(
        description="waiting for run.json, running, or stopped in order."
    )
    host: Name = Field(description="Machine it runs on.")
    pid: int = Field(ge=1, description="Process id.")
    started: Time = Field(description="When it was started.")
    heartbeat: Time = Field(description="When this file was written.")
    device: Name = Field(description="Device it evaluates on.")
    gpu_policy: Literal["share", "defer"] = Field(
        description="share the GPU with the training, or defer evaluations until it ends."
    )
    waiting_checkpoints: Count = Field(description="Complete checkpoints not yet evaluated.")
    evaluators: tuple[ActiveEvaluator, ...] = Field(default=(), description="Evaluators that live.")
    quarantine: tuple[QuarantinedCheckpoint, ...] = Field(default=(), description="Every quarantined checkpoint.")

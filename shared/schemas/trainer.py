"""What the supervisor of a training writes when the training ends."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from shared.schemas.base import Bytes, Count, Name, Seconds, Time, VersionedFile


class TrainerExit(VersionedFile):
    """How a training ended; its absence while nobody holds trainer.lock means the supervisor itself was killed."""

    command: tuple[Name, ...] = Field(min_length=1, description="The command that ran, program first.")
    pid: int = Field(ge=1, description="Process id it had.")
    exit_status: int | None = Field(ge=0, le=255, description="Its exit status; null when a signal ended it.")
    signal: int | None = Field(ge=1, description="The signal that ended it; null when it exited by itself.")
    started: Time = Field(description="When it was started.")
    ended: Time = Field(description="When it ended.")
    seconds: Seconds = Field(description="How long it ran by the monotonic clock.")
    start_ticks: Count | None = Field(
        default=None,
        description="When its process started, in clock ticks since boot; with pid and boot_id its identity.",
    )
    boot_id: Name | None = Field(default=None, description="The kernel's name of that boot.")
    peak_memory: Bytes | None = Field(
        default=None, description="Most host memory that any one of its processes had resident at once."
    )
    oom_kills: Count | None = Field(
        default=None, description="Processes that the kernel killed for want of memory on this machine while it ran."
    )
    evaluators_on: tuple[Name, ...] = Field(
        default=(), description="GPUs, by UUID, that an evaluator held in its last seconds."
    )

    @model_validator(mode="after")
    def _one_ending(self) -> Self:
        if (self.exit_status is None) == (self.signal is None):
            raise ValueError("exactly one of exit_status and signal must be null")
        return self

"""collect.json: what the collecting process of one trial is told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

JOB = "collect.json"


class Job(BaseModel):
    """One training by another program. All paths are absolute, all patterns are below `output_dir`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: tuple[str, ...] = Field(min_length=1, description="the program and its arguments")
    cwd: Path = Field(description="where it runs")
    stop_signal: Literal["SIGTERM", "SIGINT"] = Field(description="what it is stopped by")
    output_dir: Path = Field(description="where it writes")
    trial_dir: Path = Field(description="where its checkpoints are brought")
    output_name: str = Field(description="name of the final checkpoint without suffix")
    epochs: int | None = Field(description="epochs of the training; null where it does not count in epochs")
    steps_per_epoch: int | None = Field(description="optimizer steps of one epoch; null where nothing needs them")
    first_epoch: int = Field(description="the number that the program gives to its first epoch, 0 or 1")
    checkpoints: tuple[str, ...] = Field(description="patterns of the intermediate checkpoints")
    final: str | None = Field(description="pattern of the final checkpoint; null: the one of the last epoch")
    state: str | None = Field(description="pattern of the state to go on from")
    progress: tuple[str, ...] = Field(description="regular expressions of its progress; empty for those of tqdm's bars")

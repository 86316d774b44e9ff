"""What all groups of settings of train_config.toml have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Rate = Annotated[float, Field(ge=0)]
Steps = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)]
"""Optimizer steps, or a fraction of all of them."""


class StrictSettings(BaseModel):
    """Unknown keys are refused: a misspelt one would train with a default and spoil the trial."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


def count_steps(given: int | float, total_steps: int) -> int:
    """Return `given` in optimizer steps; a fraction is one of `total_steps`."""
    return int(given * total_steps) if isinstance(given, float) else given

"""The draw of a trial as its study keeps it."""

from __future__ import annotations

from collections.abc import Mapping

from optuna.trial import FrozenTrial

from optimizer_daemon.search.expressions import Value

DRAW = "draw"
"""User attribute of a trial: {"stage": ..., "values": the whole draw}, stored before anything is suggested; with
"request" and "training_seed" where somebody asked for it, and "finalist_of" for one that is trained again."""


def drawn_values(trial: FrozenTrial) -> Mapping[str, Value]:
    """Return a value for each declared parameter; empty for a trial that was not drawn yet."""
    values: Mapping[str, Value] = trial.user_attrs.get(DRAW, {}).get("values", {})
    return values


def stage_name(trial: FrozenTrial) -> str | None:
    """Return the stage that a trial was drawn in."""
    name: str | None = trial.user_attrs.get(DRAW, {}).get("stage")
    return name

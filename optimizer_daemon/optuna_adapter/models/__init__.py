"""How the next configuration follows from the trials before: one model for each name that --sampler takes.

A model is a function of (history, space, seed), so a restart changes no draw. The models rest on private hooks of
Optuna's samplers, which tests/optimizer_daemon/optuna_adapter/test_hooks.py holds to their contract.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from optimizer_daemon.optuna_adapter.feasible import FeasibleSpace
from optimizer_daemon.optuna_adapter.history import History
from optimizer_daemon.search.expressions import Value
from shared.errors import SettingsError
from shared.registry import Registry


@runtime_checkable
class Model(Protocol):
    """One way to draw.

    Args:
        start_up_trials: how many trials must be finished before it is asked; None: it is never asked, every trial is
            drawn as the first ones are.
        objectives: the most that it can do with.
    """

    start_up_trials: int | None
    objectives: int

    def propose(self, history: History, space: FeasibleSpace, seed: int) -> dict[str, Value]:
        """Return a feasible value for each parameter; equal arguments give equal values."""
        ...


SAMPLERS: Registry[Model] = Registry(
    "sampler",
    Model,
    {name: f"{__name__}.{name}:MODEL" for name in ("auto", "cmaes", "gp", "nsga2", "random", "tpe")},
)
"""Every sampler by the name that --sampler takes."""


def load_sampler(name: str, objectives: int) -> Model:
    """Return what draws by a name of --sampler.

    Args:
        objectives: how many things the study optimises; 1 for one score.
    Raises:
        UnknownPluginError: there is no such sampler.
        SettingsError: it cannot do with so many objectives.
    """
    model = SAMPLERS.load(name)
    if model.objectives < objectives:
        able = ", ".join(other for other in SAMPLERS.names if SAMPLERS.load(other).objectives >= objectives)
        raise SettingsError(
            "--sampler", name, f"it knows one objective, and --objectives names {objectives}; take one of {able}"
        )
    return model

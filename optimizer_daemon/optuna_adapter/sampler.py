"""Feasible draws: whole configurations of a search space, none of which breaks a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any, Protocol

from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.parameters import CategoricalParameter, FloatParameter, Parameter
from optimizer_daemon.search.space import SearchSpace
from shared.registry import Registry

DRAW = "draw"
"""User attribute of a trial: {"stage": ..., "values": the whole draw}, stored before anything is suggested; with
"request" and "training_seed" where somebody asked for it."""

START_UP_TRIALS = 10
MODEL_TRIES = 50


class MakeModel(Protocol):
    """How a search learns from the trials before: seed -> a sampler of joint draws; None where it does not learn."""

    def __call__(self, seed: int) -> BaseSampler | None: ...


SAMPLERS: Registry[MakeModel] = Registry(
    "sampler", MakeModel, {name: f"{__name__}:{name}" for name in ("tpe", "random")}
)
"""Every sampler by the name that --sampler takes."""


def tpe(seed: int) -> BaseSampler:
    """Tree-structured Parzen estimator over the joint space."""
    return TPESampler(n_startup_trials=0, constant_liar=False, seed=seed)


def random(seed: int) -> None:
    """Every draw as the start-up trials are drawn."""
    del seed  # the draws have a generator of their own


class FeasibleSampler(BaseSampler):
    """Draws from the space's own start-up plan first, then by a model; what breaks a rule is drawn again.

    Each draw depends on (seed, trial number) and the finished trials alone, so a restarted daemon neither repeats the
    draws of an earlier one nor changes one it is asked to make again.

    Args:
        space: the search space.
        seed: the study's seed.
        pinned: parameters that have this value and are unknown to Optuna.
        make_model: what draws once there are enough finished trials.
    """

    def __init__(self, space: SearchSpace, seed: int, pinned: Mapping[str, Value], make_model: MakeModel = tpe) -> None:
        self._space = _with_pinned(space, pinned)
        self._seed = seed
        self._make_model = make_model
        self.distributions: dict[str, BaseDistribution] = {
            name: distribution_of(parameter) for name, parameter in space.parameters.items() if name not in pinned
        }

    def draw(self, study: Study, trial: FrozenTrial) -> dict[str, Value]:
        """Return a feasible value for each declared parameter, the pinned ones too."""
        rng = Random(f"{self._seed}/{trial.number}")
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        model = self._make_model(rng.getrandbits(32)) if len(finished) >= START_UP_TRIALS else None
        if model is not None:
            for _ in range(MODEL_TRIES):
                # A parameter of one value is none of TPE's business; its joint model takes all the others.
                wide = {name: known for name, known in self.distributions.items() if not known.single()}
                modelled = model.sample_relative(study, trial, wide)
                values = {
                    name: parameter.snap(modelled[name]) if name in modelled else parameter.draw(rng)
                    for name, parameter in self._space.parameters.items()
                }
                if self._space.is_feasible(values):
                    return values
        return self._space.draw(rng)

    # What Optuna asks for when it suggests: always the stored draw, whole.

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        draw: dict[str, Value] = trial.user_attrs[DRAW]["values"]
        return {name: draw[name] for name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # Optuna comes here for a value outside its distribution; drawn alone it could break a rule.
        raise AssertionError(f"{param_name} of trial {trial.number} does not fit {param_distribution}")


def distribution_of(parameter: Parameter) -> BaseDistribution:
    """Return Optuna's form of a declared parameter."""
    if isinstance(parameter, CategoricalParameter):
        return CategoricalDistribution(parameter.choices)
    if isinstance(parameter, FloatParameter):
        return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)
    return IntDistribution(parameter.low, parameter.high, step=parameter.step)


def _with_pinned(space: SearchSpace, pinned: Mapping[str, Value]) -> SearchSpace:
    choices: dict[str, Parameter] = {
        name: CategoricalParameter(type="categorical", choices=(value,)) for name, value in pinned.items()
    }
    return replace(space, parameters={**space.parameters, **choices})

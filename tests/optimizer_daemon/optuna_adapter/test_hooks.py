"""The private parts of Optuna and cmaes that the models rest on still are what the models take them for."""

from __future__ import annotations

import inspect

import numpy as np
import optuna
import pytest
from cmaes import CatCMAwM
from optuna._gp.acqf import BaseAcquisitionFunc
from optuna._gp.search_space import SearchSpace
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import GPSampler, NSGAIISampler, TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.trial import create_trial

SPACE = {"x": FloatDistribution(0.0, 1.0), "kind": CategoricalDistribution(["a", "b"])}


def study() -> optuna.Study:
    made = optuna.create_study()
    for number in range(12):
        params = {"x": number / 12, "kind": "ab"[number % 2]}
        made.add_trial(create_trial(params=params, distributions=SPACE, value=float(number)))
    return made


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_tpe_asks_its_estimator_class_for_candidates_and_takes_one_of_them():
    asked = []

    class Only(_ParzenEstimator):
        def sample(self, rng, size):
            asked.append(size)
            return {"x": np.full(size, 0.125), "kind": np.full(size, 1.0)}

    sampler = TPESampler(n_startup_trials=0, multivariate=True, seed=1)
    sampler._parzen_estimator_cls = Only
    made = study()
    assert sampler.sample_relative(made, made.ask()._get_latest_trial(), SPACE) == {"x": 0.125, "kind": "b"}
    assert asked == [24]


def test_the_gp_takes_the_point_that_its_own_search_returns():
    class Only(GPSampler):
        def _optimize_acqf(self, acqf, best_params):
            assert isinstance(acqf, BaseAcquisitionFunc)
            assert isinstance(acqf.search_space, SearchSpace)
            assert best_params.shape == (1, 2)
            assert acqf.eval_acqf_no_grad(np.array([[0.1, 0.0], [0.2, 1.0]])).shape == (2,)
            assert acqf.search_space._bounds[1, 1] == 2
            points = acqf.search_space.get_normalized_params([{}, {}], [{"x": 0.5, "kind": "b"}, {"x": 0, "kind": "a"}])
            return points[0]

    sampler = Only(n_startup_trials=0, seed=1)
    made = study()
    assert sampler.sample_relative(made, made.ask()._get_latest_trial(), SPACE) == {"x": 0.5, "kind": "b"}


def test_nsga2_s_two_strategies_select_and_breed():
    sampler = NSGAIISampler(population_size=4, seed=1)
    made = study()
    parents = sampler._elite_population_selection_strategy(made, made.trials)
    assert sorted(trial.number for trial in parents) == [0, 1, 2, 3]
    child = sampler._child_generation_strategy(made, SPACE, parents)
    assert child.keys() <= SPACE.keys()


def test_cma_es_can_be_told_solutions_that_it_did_not_ask_for():
    cma = CatCMAwM(x_space=[[0.0, 1.0]], z_space=[[0.0, 0.5, 1.0]], c_space=[2, 3], sigma=0.3, seed=1)
    one_hot = np.zeros((2, 3), dtype=bool)
    one_hot[:, 1] = True
    told = [
        (CatCMAwM.Solution(np.array([0.9]), np.array([1.0]), one_hot, np.array([0.9, 1.0])), float(rank))
        for rank in range(cma.population_size)
    ]
    before = cma._mean.copy()
    cma.tell(told)
    assert cma._mean[0] > before[0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (optuna.Study._get_trials, ["self", "deepcopy", "states", "use_cache"]),
        (_ParzenEstimator.__init__, ["self", "observations", "search_space", "parameters", "predetermined_weights"]),
        (_ParzenEstimator.sample, ["self", "rng", "size"]),
        (GPSampler._optimize_acqf, ["self", "acqf", "best_params"]),
        (SearchSpace.get_normalized_params, ["self", "trials", "trial_params"]),
    ],
)
def test_signatures(function, expected):
    assert parameters(function) == expected

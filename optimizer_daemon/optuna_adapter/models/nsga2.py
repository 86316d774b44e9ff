"""NSGA-II. Its generations are the finished trials in their order, so that a restart changes nothing."""

from __future__ import annotations

from random import Random
from typing import Any

from optuna.samplers import NSGAIISampler
from optuna.trial import FrozenTrial

from optimizer_daemon.optuna_adapter.feasible import FeasibleSpace
from optimizer_daemon.optuna_adapter.history import History
from optimizer_daemon.search.expressions import Value

POPULATION = 10  # a night has some thirty trials; of Optuna's fifty all would be drawn at random


class Nsga2:
    """Crosses and mutates the fittest."""

    start_up_trials = POPULATION
    objectives = 1_000

    def propose(self, history: History, space: FeasibleSpace, seed: int) -> dict[str, Value]:
        """Draw a child of the best of all whole generations."""
        sampler = NSGAIISampler(population_size=POPULATION, seed=seed)
        known, rng = history.of(space.wide), Random(seed)
        trials = known.finished
        parents: list[FrozenTrial] = []
        for start in range(0, len(trials) - POPULATION + 1, POPULATION):
            generation = trials[start : start + POPULATION]
            parents = sampler._elite_population_selection_strategy(known, generation + parents)
        if not parents:
            return space.draw(rng)

        def child() -> dict[str, Any]:
            kept = sampler._child_generation_strategy(known, space.wide, parents)
            return {  # a mutated parameter is left out
                name: kept[name] if name in kept else space.space.parameters[name].draw(rng) for name in space.wide
            }

        return space.resampled(child, rng)


MODEL = Nsga2()

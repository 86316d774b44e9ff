"""Synthetic tasks over the V2.1 search space: what a training would score, without training. Frozen.

Strategies are compared on these tasks, so nothing here may change once a figure was recorded: what is new is a new
family.
Scores are minimised. A task's noise-free final score is 0 at its best feasible configuration and has a mean of 1 over
feasible draws, so a regret of 0.2 is a fifth of the way from the best to a random configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from random import Random

from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.load import load_space
from optimizer_daemon.search.space import SearchSpace
from optimizer_daemon.search.stage import Stage

SMOOTH = ("bowl", "corner", "interactions", "flat")
HARD = ("cliff", "rugged", "crossing")
FAULTY = "faulty"
"""The bowl where trainings crash, scores are NaN, and each comes when the next checkpoint is already there."""
FAMILIES = (*SMOOTH, *HARD, FAULTY)
SAVE_EVERY = 2  # epochs
CHECKPOINT_NOISE = 0.10  # of one checkpoint's score: prompts and seeds
TRAINING_NOISE = 0.08  # of one training: its own seed
CRASHES = 0.1  # of the trainings of the faulty family
UNSCORED = 0.05  # of its checkpoints
_CALIBRATION_DRAWS = 4_000


@lru_cache(maxsize=1)
def space() -> SearchSpace:
    """The space of all tasks."""
    return load_space("v2.1")


@lru_cache(maxsize=1)
def stage() -> Stage:
    """All of it."""
    return Stage.of(space())


@dataclass(frozen=True)
class Training:
    """What one training would give.

    Args:
        scores: (epoch at which it is known, epoch of the checkpoint, score) in the order in which they come; NaN where
            a checkpoint could not be scored.
        epochs: how long it trains.
        crashed: it ended by itself before its last epoch.
    """

    scores: list[tuple[int, int, float]]
    epochs: int
    crashed: bool = False

    @property
    def final(self) -> float | None:
        """The score of its last checkpoint; None where it has none."""
        score = math.nan if self.crashed else self.scores[-1][2]
        return score if math.isfinite(score) else None

    def cut(self, epochs: float) -> Training:
        """Return one that ends at the last checkpoint of so many epochs."""
        kept = [known for known in self.scores if known[1] <= epochs]
        return Training(kept, min(self.epochs, kept[-1][1] if kept else int(epochs)), self.crashed)


@dataclass(frozen=True)
class Task:
    """One made-up study.

    Args:
        family: one of FAMILIES.
        seed: which task of it.
    """

    family: str
    seed: int

    def final(self, values: Mapping[str, Value]) -> float:
        """Return the noise-free score of a whole training."""
        low, mean = self._scale
        return (self._raw(values) - low) / (mean - low)

    def curve(self, values: Mapping[str, Value], noise: Random) -> dict[int, float]:
        """Return the measured score of each checkpoint of one training, by epoch."""
        epochs = int(values["max_train_epochs"])
        offset = noise.gauss(0.0, TRAINING_NOISE)
        clean = self.final(values)
        points = {}
        for epoch in [*range(SAVE_EVERY, epochs, SAVE_EVERY), epochs]:
            fraction = epoch / epochs
            points[epoch] = clean + self._ahead(values, fraction) + offset + noise.gauss(0.0, CHECKPOINT_NOISE)
        return points

    def training(self, values: Mapping[str, Value], noise: Random) -> Training:
        """Return what one training gives, with this family's faults."""
        points = self.curve(values, noise)
        last = max(points)
        if self.family != FAULTY:
            return Training([(epoch, epoch, score) for epoch, score in points.items()], last)
        end = noise.choice(list(points)) if noise.random() < CRASHES else last
        scores = []
        for then, (epoch, score) in zip([*list(points)[1:], last], points.items(), strict=True):
            unscored = noise.random() < UNSCORED
            if then <= end:
                scores.append((then, epoch, math.nan if unscored else score))
        return Training(scores, end, crashed=end < last)

    def _ahead(self, values: Mapping[str, Value], fraction: float) -> float:
        """How much worse than at its end a training is at a fraction of it."""
        unit = _unit(values)
        if self.family == "crossing":
            # What is slow at first ends well: early scores mislead.
            pace = 1.5 + 4.0 * unit["learning_rate"]
            gap = 0.6 + 0.9 * (1.0 - unit["learning_rate"])
        else:
            pace, gap = 3.0, 0.8
        return gap * (math.exp(-pace * fraction) - math.exp(-pace))

    def _raw(self, values: Mapping[str, Value]) -> float:
        unit, shape = _unit(values), self._shape
        near = sum(weight * (unit[name] - best) ** 2 for name, (best, weight) in shape.numbers.items())
        kinds = sum(effects[str(values[name])] for name, effects in shape.choices.items())
        score = near + kinds
        if self.family == "interactions":
            for first, second, strength in shape.pairs:
                score += strength * (unit[first] - 0.5) * (unit[second] - 0.5)
        if self.family == "flat":
            score = math.sqrt(score + 0.01)
        if self.family == "cliff":
            hot = unit["learning_rate"] * (0.4 + unit["network_alpha_ratio"])
            score += 1.5 if hot > shape.cliff else 0.0
        if self.family == "rugged":
            score += sum(
                0.12 * math.sin(shape.waves * math.tau * unit[name] + phase) for name, phase in shape.phases.items()
            )
        return score

    @cached_property
    def _shape(self) -> _Shape:
        rng = Random(f"{self.family}/{self.seed}")
        numbers = {}
        for name in ("learning_rate", "text_encoder_lr", "network_alpha_ratio", "lr_warmup_steps", "max_train_epochs"):
            best, weight = rng.uniform(0.2, 0.8), rng.choice((0.3, 1.0, 2.0))
            if self.family == "corner" and name in ("network_alpha_ratio", "lr_warmup_steps", "max_train_epochs"):
                best, weight = rng.uniform(0.85, 1.0), 2.0
            numbers[name] = (best, weight)
        choices = {
            name: {str(choice): rng.uniform(0.0, 0.4) for choice in space().parameters[name].ends}
            for name in ("network_dim", "optimizer_type", "lr_scheduler", "gradient_accumulation_steps")
        }
        names = list(numbers)
        pairs = tuple((*rng.sample(names, 2), rng.uniform(-1.5, 1.5)) for _ in range(3))
        return _Shape(
            numbers, choices, pairs, rng.uniform(0.45, 0.75), rng.randint(2, 4),
            {name: rng.uniform(0, math.tau) for name in names[:3]},
        )  # fmt: skip

    @cached_property
    def _scale(self) -> tuple[float, float]:
        """The best raw score, by draws and a climb from the best of them, and the mean of feasible draws."""
        rng = Random(f"scale/{self.family}/{self.seed}")
        drawn = [space().draw(rng) for _ in range(_CALIBRATION_DRAWS)]
        scores = [self._raw(values) for values in drawn]
        best = min(scores)
        ranked = sorted(zip(scores, range(len(drawn)), strict=True))
        for score, place in ranked[:8]:
            values = drawn[place]
            for step in range(400):
                moved = _moved(values, rng, 0.3 * (1 - step / 400) + 0.01)
                if space().is_feasible(moved) and (found := self._raw(moved)) < score:
                    values, score = moved, found
            best = min(best, score)
        return best, sum(scores) / len(scores)


@dataclass(frozen=True)
class _Shape:
    numbers: dict[str, tuple[float, float]]
    choices: dict[str, dict[str, float]]
    pairs: tuple[tuple[str, str, float], ...]
    cliff: float
    waves: int
    phases: dict[str, float]


def _unit(values: Mapping[str, Value]) -> dict[str, float]:
    """Return each numeric parameter as a share of its range."""
    return {
        "learning_rate": math.log(float(values["learning_rate"]) / 6e-5) / math.log(2.0),
        "text_encoder_lr": math.log(float(values["text_encoder_lr"]) / 3e-5) / math.log(8 / 3),
        "network_alpha_ratio": (float(values["network_alpha_ratio"]) - 0.25) / 0.65,
        "lr_warmup_steps": (float(values["lr_warmup_steps"]) - 50) / 150,
        "max_train_epochs": (float(values["max_train_epochs"]) - 12) / 8,
    }


def _moved(values: Mapping[str, Value], rng: Random, width: float) -> dict[str, Value]:
    """Return a neighbour of a configuration; it may break a rule."""
    moved = dict(values)
    name = rng.choice(list(values))
    parameter = space().parameters[name]
    low, high = (float(parameter.low), float(parameter.high)) if hasattr(parameter, "low") else (0.0, 0.0)
    if name in ("learning_rate", "text_encoder_lr"):
        moved[name] = min(max(float(values[name]) * math.exp(rng.gauss(0.0, width)), low), high)
    else:
        moved[name] = parameter.draw(rng)
    return moved

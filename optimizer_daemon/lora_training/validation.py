"""The loss on images that are not trained on, as sd-scripts measures it: at fixed timesteps, with fixed noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.lora_training.dataset import Batch, TrainingData
from optimizer_daemon.lora_training.learner import Learner

_TIMESTEPS = 4
_SAY_EVERY_S = 1.0


@dataclass(frozen=True)
class Validation:
    """What is measured, and when.

    Args:
        batches: the images; none to measure nothing.
        times: the timesteps at which each batch is seen, e.g. (200, 400, 600, 800).
        seed: of the noise.
        every_n_epochs: epochs between two validations.
        every_n_steps: optimizer steps between two more; None for none.
    """

    batches: Sequence[Batch]
    times: tuple[int, ...]
    seed: int
    every_n_epochs: int
    every_n_steps: int | None

    @classmethod
    def of(cls, config: TrainConfig, data: TrainingData, steps: int) -> Validation:
        """Return the settings' validation on a noise schedule of `steps` timesteps."""
        seed = config.seed if config.validation_seed is None else config.validation_seed
        between = np.linspace(config.min_timestep or 0, config.max_timestep or steps, _TIMESTEPS + 2, dtype=int)[1:-1]
        return cls(
            batches=data.validation_batches(seed)[: config.max_validation_steps],
            times=tuple(map(int, between)),
            seed=seed,
            every_n_epochs=config.validate_every_n_epochs or 1,
            every_n_steps=config.validate_every_n_steps,
        )

    def is_due_after_epoch(self, epoch: int) -> bool:
        """Whether to measure after this epoch, counted from 1."""
        return bool(self.batches) and epoch % self.every_n_epochs == 0

    def is_due_after_step(self, step: int) -> bool:
        """Whether to measure after this optimizer step of all, counted from 1."""
        return bool(self.batches) and self.every_n_steps is not None and step % self.every_n_steps == 0

    def loss(self, learner: Learner, check_stop: Callable[[], None]) -> float:
        """Return the mean over the batches and timesteps; the training goes on afterwards as if there had been none.

        Args:
            learner: what has been learned so far.
            check_stop: called before each batch; may raise.
        """
        losses, said_at = [], time.monotonic()
        with learner.evaluating(self.seed):
            for number, batch in enumerate(self.batches, 1):
                check_stop()
                losses += [learner.loss(batch, timestep).item() for timestep in self.times]
                if time.monotonic() - said_at >= _SAY_EVERY_S:  # who watches takes silence for a hang
                    print(f"\nvalidating: {number}/{len(self.batches)} batches", flush=True)
                    said_at = time.monotonic()
        return float(np.mean(losses))

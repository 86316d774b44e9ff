"""What a training says: the bar that sd-scripts draws, its lines on stdout, its TensorBoard tags.

Reading a loss makes a GPU finish everything before it, so losses are collected and read about once a second.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from optimizer_daemon.lora_training.state import Position
from shared.errors import UserError

READ_EVERY_S = 1.0
MOST_NOT_FINITE = 20  # steps in a row

_BAR = "{l_bar}{bar:10}{r_bar}"  # as wide as sd-scripts' own, whatever COLUMNS says


class MeanLoss:
    """Mean over the last epoch's batches: a batch's loss replaces the one at its place in the epoch before."""

    def __init__(self, losses: Sequence[float] = ()) -> None:
        self.losses = list(losses)

    def add(self, place: int, loss: float) -> None:
        """Note the loss of the batch at `place` of an epoch, counted from 0."""
        if place < len(self.losses):
            self.losses[place] = loss
        else:
            self.losses.append(loss)

    @property
    def value(self) -> float:
        """The mean of those that are numbers: fp16 skips a step at times, and recovers."""
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        return math.fsum(finite) / len(finite) if finite else math.nan


class Reporter:
    """Reports one training; a context manager that leaves the terminal on a fresh line.

    Args:
        epochs, total_steps: of the whole training.
        start: where it begins.
        losses: of an interrupted training, for the mean.
        logging_dir: TensorBoard folder; None for none.
        rate_names: of the rates that `step` is given.
    """

    def __init__(
        self,
        *,
        epochs: int,
        total_steps: int,
        start: Position,
        losses: Sequence[float],
        logging_dir: Path | None,
        rate_names: Sequence[str],
    ) -> None:
        self.mean = MeanLoss(losses)
        self._epochs = epochs
        self._epoch = start.epoch
        self._rate_names = rate_names
        self._pending: list[tuple[int, Sequence[int], Tensor, Sequence[float]]] = []
        self._read_at = time.monotonic()
        self._not_finite = 0
        # An interrupted run may have logged steps that are trained again now. What goes by epochs may stand
        # twice, with the same value, after a kill between an epoch's end and its state.
        purge = start.step + 1 if start.step else None
        self._board = SummaryWriter(str(logging_dir / "network_train"), purge_step=purge) if logging_dir else None
        self._bar = tqdm(
            total=total_steps,
            initial=start.step,
            desc="steps",
            smoothing=0,
            bar_format=_BAR,
            file=sys.stderr,
            mininterval=math.inf,  # drawn by us alone
        )

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def begin_epoch(self, epoch: int) -> None:
        """Announce an epoch."""
        self._epoch = epoch
        print(f"\nepoch {epoch}/{self._epochs}\n", flush=True)
        self._draw()

    def step(self, step: int, places: Sequence[int], losses: list[Tensor], rates: Sequence[float]) -> None:
        """Note one optimizer step.

        Args:
            step: its number, counted from 1.
            places: of its batches in the epoch, counted from 0.
            losses: of its batches, scalars on any device.
            rates: learning rates for the next step, as `rate_names` has them.
        Raises:
            UserError: too many steps in a row had a loss that is not finite.
        """
        self._pending.append((step, places, torch.stack(losses), rates))
        self._bar.update()
        if time.monotonic() - self._read_at >= READ_EVERY_S:
            self.catch_up()

    def catch_up(self) -> None:
        """Read the losses so far and show them.

        Raises:
            UserError: see `step`.
        """
        if self._pending:
            values = torch.cat([losses for _, _, losses, _ in self._pending]).tolist()
            for step, places, _, rates in self._pending:
                self._note(step, places, [values.pop(0) for _ in places], rates)
            self._pending.clear()
            self._draw()
        self._read_at = time.monotonic()

    def validated(self, after: Literal["epoch", "step"], number: int, loss: float) -> None:
        """Report a validation.

        Args:
            after: what came before it.
            number: of that epoch or optimizer step, counted from 1.
            loss: the mean on images that are not trained on.
        Raises:
            UserError: see `step`.
        """
        self.catch_up()
        print(f"\nvalidation loss after {after} {number}: {loss:.5f}", flush=True)
        if self._board is not None:
            self._board.add_scalar(f"loss/validation/{after}_average", loss, number)
            self._board.add_scalar(f"loss/validation/{after}_divergence", loss - self.mean.value, number)

    def end_epoch(self, epoch: int) -> None:
        """Close an epoch.

        Raises:
            UserError: see `step`.
        """
        self.catch_up()
        if self._board is not None:
            self._board.add_scalar("loss/epoch_average", self.mean.value, epoch)
            self._board.flush()

    def saving(self, path: Path) -> None:
        """Announce a checkpoint."""
        print(f"\nsaving checkpoint: {path}", flush=True)

    def _note(self, step: int, places: Sequence[int], losses: list[float], rates: Sequence[float]) -> None:
        for place, loss in zip(places, losses, strict=True):
            self.mean.add(place, loss)
        current = math.fsum(losses) / len(losses)
        self._not_finite = 0 if math.isfinite(current) else self._not_finite + 1
        if self._not_finite >= MOST_NOT_FINITE:
            raise UserError(
                f"the loss was {current} for {MOST_NOT_FINITE} steps in a row, last at step {step} of epoch "
                f"{self._epoch}; lower the learning rates, or train with mixed_precision bf16 or no"
            )
        if self._board is not None:
            self._board.add_scalar("loss/current", current, step)
            self._board.add_scalar("loss/average", self.mean.value, step)
            for name, rate in zip(self._rate_names, rates, strict=True):
                self._board.add_scalar(f"lr/{name}", rate, step)

    def _draw(self) -> None:
        # Whoever watches stops a training that says NaN for long, so it is said only of the latest step.
        loss = {"avr_loss": math.nan if self._not_finite else self.mean.value} if self.mean.losses else {}
        self._bar.set_postfix({**loss, "epoch": f"{self._epoch}/{self._epochs}"}, refresh=True)

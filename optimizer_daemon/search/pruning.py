"""Whether a running training is clearly losing. Pure: curves in, a reason out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from optimizer_daemon.search.curves import Curve, quantile

PrunerName = Literal["median", "percentile", "none"]

LEAST_PEERS = 5  # finished ones
PROTECTED = 2  # the best trials of the study so far are never stopped
_SHARES: dict[PrunerName, float] = {"median": 0.5, "percentile": 0.75}


@dataclass(frozen=True)
class Pruner:
    """When to stop a training.

    Args:
        name: median stops what is worse than half of its peers at the same fraction of the training, percentile only
            what is worse than three quarters of them, none never.
        warmup_epochs: nothing is stopped before this epoch.
    """

    name: PrunerName
    warmup_epochs: int = 4

    def objection(self, curve: Curve, peers: Iterable[Curve]) -> str | None:
        """Say why a training is to be stopped; None when it may go on.

        Args:
            curve: its scores so far.
            peers: the other trials that passed their gate; stopped ones count up to their last score.
        """
        if self.name == "none" or not curve.points or curve.epoch < self.warmup_epochs:
            return None
        if curve.epoch >= curve.horizon:
            return None  # nothing is left to save
        known = list(peers)
        finals = sorted(peer.final for peer in known if peer.final is not None)
        if len(finals) < LEAST_PEERS:
            return None
        fraction, score = curve.smoothed[-1]
        if score <= finals[PROTECTED - 1]:
            return None
        scores = [then for peer in known if (then := peer.at(fraction)) is not None]
        if len(scores) < LEAST_PEERS:
            return None
        bound = quantile(scores, _SHARES[self.name])
        if score <= bound:
            return None
        return (
            f"worse than {self._worse_than} at {fraction:.0%} of the training: {score:.5f} at epoch {curve.epoch}, "
            f"theirs {bound:.5f} ({len(scores)} trials)"
        )

    @property
    def _worse_than(self) -> str:
        return "the median of its peers" if self.name == "median" else "three quarters of its peers"

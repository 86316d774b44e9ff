"""The pictures that only the validation loss sees: the split of kohya's sd-scripts (library/train_util.py).

A pure choice by order and seed, so that every trial, and either trainer, holds out the same ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def split_for_validation(items: Sequence[T], split: float, seed: int) -> tuple[list[T], list[T]]:
    """Return the pictures to train on and those to validate with.

    The two are rounded apart, as in sd-scripts: where `len(items) * split` is rounded up, one picture is in both.

    Args:
        items: the pictures of one folder, sorted by path.
        split: share of the pictures to validate with, 0 to 1; 0 leaves the order alone too.
        seed: validation_seed.
    """
    if split == 0:
        return list(items), []
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return shuffled[: math.ceil(len(items) * (1 - split))], shuffled[len(items) - round(len(items) * split) :]

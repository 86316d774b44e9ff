"""Pictures are rendered with the text encoder's layer that the trainer trains with."""

from __future__ import annotations

from typing import Any

import pytest

from examples.tiny_world.paths import BASE_MODEL, DATASET_TOML
from optimizer_daemon.trainers import TRAINERS
from optimizer_daemon.trainers.base import SkipsClipLayers, TrainerInput
from shared.errors import UserError
from shared.schemas import Trainer


def layer(name: str, **options: Any) -> int:
    trainer = TRAINERS.load(name)
    assert isinstance(trainer, SkipsClipLayers)
    given = Trainer(name=name, python="/python", directory="/sd-scripts", family="sd15", options=options)
    return trainer.clip_skip(TrainerInput(BASE_MODEL, DATASET_TOML, None, given, "cpu"))


@pytest.mark.parametrize(
    ("trainer", "options", "trained"),
    [
        ("kohya", {}, 2),
        ("kohya", {"clip_skip": 1}, 1),
        ("kohya", {"v2": True}, 1),
        ("native", {}, 1),
        ("native", {"clip_skip": 2}, 2),
    ],
)
def test_the_table_of_the_study_file_names_the_layer(trainer: str, options: dict[str, Any], trained: int):
    assert layer(trainer, **options) == trained


@pytest.mark.parametrize("asked", [0, "2", True])
def test_kohya_refuses_a_layer_that_is_none(asked: object):
    with pytest.raises(UserError, match=r"\[trainer.kohya\] clip_skip: .* will not do; write 1 for the last layer"):
        layer("kohya", clip_skip=asked)

"""`python -m optimizer_daemon.lora_training.choices`: can these optimizers and courses of the rates be had here?

Reads a JSON list of {"config": settings of train_config.toml, "steps": optimizer steps} from stdin and prints the first
fault, or nothing. A process of its own, for whoever asks does without torch.
"""

from __future__ import annotations

import contextlib
import json
import sys

import torch
from torch import nn

from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.lora_training.optimizers import create_optimizer
from optimizer_daemon.lora_training.schedulers import create_lr_scheduler
from shared.errors import UserError


class SampleNetwork:
    """One small layer for each part that is trained, with the groups of the real LoRA."""

    def __init__(self, config: TrainConfig) -> None:
        untrained = config.untrained(("text_encoder",))
        encoders = [[f"text_encoder {number}"] for number in range(len(config.text_encoder_rates))]
        self.encoder_names = [[] if "text_encoder" in untrained else names for names in encoders]
        self.unet_names = [] if "unet" in untrained else ["unet"]

    @property
    def text_encoder_names(self) -> list[str]:
        """The layers of all text encoders."""
        return [name for names in self.encoder_names for name in names]

    def parameters_of(self, names: list[str], ending: str = "") -> list[nn.Parameter]:
        """Return both matrices of each layer, or the one of this name."""
        return [nn.Parameter(torch.zeros(4, 4)) for _ in names for _ in range(1 if ending else 2)]


def first_fault(asked: str) -> str:
    """Return what is wrong with the first training that cannot be had, "" where all can."""
    for training in json.loads(asked):
        config = TrainConfig.model_validate(training["config"])
        try:
            made = create_optimizer(config, SampleNetwork(config))
            create_lr_scheduler(config, made.optimizer, training["steps"])
        except UserError as error:
            return str(error)
    return ""


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # a module of the user's may print
        found = first_fault(sys.stdin.read())
    print(found)

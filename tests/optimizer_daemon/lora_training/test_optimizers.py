"""Torch optimizers and learning-rate schedules by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.lora_training.lora import LoraNetwork
from optimizer_daemon.lora_training.optimizers import create_optimizer
from optimizer_daemon.lora_training.schedulers import create_lr_scheduler
from shared.errors import SettingsError
from tests.optimizer_daemon.lora_training.test_config import NEEDED
from tests.optimizer_daemon.lora_training.troublesome import NoOptimizer


class CLIPMLP(nn.Module):
    """Stands for a block of a text encoder; LoRA goes by the class's name, as in sd-scripts."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)


class Transformer2DModel(nn.Module):
    """Stands for a block of a UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(64, 64, 1)
        self.other = nn.Conv2d(64, 64, 3)


def config(**changes) -> TrainConfig:
    return TrainConfig.model_validate({**NEEDED, **changes})


def network(*untrained: str, encoders: int = 1) -> LoraNetwork:
    torch.manual_seed(0)
    texts = [nn.Sequential(CLIPMLP()) for _ in range(encoders)]
    return LoraNetwork(nn.Sequential(Transformer2DModel()), texts, rank=64, alpha=1.0, untrained=untrained)


@pytest.mark.parametrize(
    ("settings", "kind", "description"),
    [
        ({}, "AdamW", "torch.optim.adamw.AdamW"),
        ({"optimizer_type": "adamw"}, "AdamW", "torch.optim.adamw.AdamW"),
        (
            {"optimizer_args": {"betas": [0.9, 0.99], "weight_decay": 0.1}},
            "AdamW",
            "torch.optim.adamw.AdamW(betas=(0.9, 0.99),weight_decay=0.1)",
        ),
        ({"optimizer_type": "AdamW8bit"}, "AdamW8bit", "bitsandbytes.optim.adamw.AdamW8bit"),
        ({"optimizer_type": "Lion"}, "Lion", "bitsandbytes.optim.lion.Lion"),
        (
            {"optimizer_type": "Adafactor"},
            "Adafactor",
            "transformers.optimization.Adafactor(scale_parameter=False,relative_step=False,warmup_init=False)",
        ),
        ({"optimizer_type": "RAdam"}, "RAdam", "torch.optim.radam.RAdam"),
        ({"optimizer_type": "torch.optim.SGD"}, "SGD", "torch.optim.sgd.SGD"),
    ],
    ids=["default", "any case", "with arguments", "8 bit", "Lion", "Adafactor", "a torch name", "any class"],
)
def test_what_runs_is_what_was_named(settings, kind: str, description: str):
    made = create_optimizer(config(unet_lr=2e-4, text_encoder_lr=5e-5, **settings), network())
    assert type(made.optimizer).__name__ == kind
    assert made.description == description
    assert made.groups == ("textencoder", "unet")
    assert [group["lr"] for group in made.optimizer.param_groups] == [5e-5, 2e-4]


def test_eight_bit_states_are_eight_bit_on_a_cpu_too():
    lora = network()
    made = create_optimizer(config(optimizer_type="AdamW8bit", learning_rate=1e-2), lora)
    before = [weight.detach().clone() for weight in lora.parameters()]
    for weight in lora.parameters():
        weight.grad = torch.randn_like(weight)
    made.optimizer.step()
    states = made.optimizer.state[next(lora.parameters())]
    assert (states["state1"].dtype, states["state2"].dtype) == (torch.uint8, torch.uint8)
    moves = [(new - old).abs().mean().item() for new, old in zip(lora.parameters(), before, strict=True)]
    assert moves == pytest.approx([1e-2] * len(moves), rel=0.1), "Adam's first step is the learning rate"


def test_a_part_that_is_not_trained_has_no_group():
    made = create_optimizer(config(text_encoder_lr=0.0), network("text_encoder"))
    assert made.groups == ("unet",)
    assert sum(weight.numel() for weight in made.optimizer.param_groups[0]["params"]) == 2 * 64 * 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer_type": "AdamX"},
            "optimizer_type: 'AdamX' will not do; AdamX is no torch optimizer; use one of ASGD, Ada",
        ),
        (
            {"optimizer_type": "no.such.Thing"},
            "optimizer_type: 'no.such.Thing' will not do; no.such cannot be imported",
        ),
        (
            {"optimizer_type": f"{NoOptimizer.__module__}.NoOptimizer"},
            "is no torch optimizer; use one of",
        ),
        (
            {"optimizer_args": {"momentum": 0.9}},
            "optimizer_args: {'momentum': 0.9} will not do; torch.optim.adamw.AdamW refuses them",
        ),
        ({"optimizer_args": {"eps": -1.0}}, "optimizer_args: {'eps': -1.0} will not do"),
        (
            {"optimizer_type": "Adafactor", "optimizer_args": {"relative_step": True}},
            "optimizer_args.relative_step: True will not do; Adafactor then chooses its own steps; set lr_scheduler = "
            "'adafactor', or relative_step = false",
        ),
    ],
)
def test_an_unusable_optimizer_is_one_error(settings, message: str):
    with pytest.raises(SettingsError) as caught:
        create_optimizer(config(**settings), network())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lr_scheduler": "polynomial", "lr_warmup_steps": 10},
            "lr_warmup_steps: 10 will not do; polynomial needs fewer",
        ),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-8}, "lr_scheduler: 'polynomial' will not do; lr_end"),
        ({"lr_scheduler": "adafactor"}, "lr_scheduler: 'adafactor' will not do; it shows the steps that Adafactor"),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 6, "lr_decay_steps": 0.5},
            "lr_decay_steps: 5 will not do; with 6 steps of warm-up it is more than all 10 optimizer steps",
        ),
        (
            {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": {"step_rules": "fast"}},
            "lr_scheduler_args: {'step_rules': 'fast'} will not do; piecewise_constant refuses them",
        ),
        (
            {"lr_scheduler": "linear", "lr_scheduler_args": {"speed": 1}},
            "lr_scheduler_args: {'speed': 1} will not do; linear refuses them",
        ),
        ({"lr_scheduler_type": "StepLR"}, "lr_scheduler_type: 'StepLR' will not do; StepLR.__init__() missing"),
        ({"lr_scheduler_type": "NoLR"}, "lr_scheduler_type: 'NoLR' will not do; torch.optim.lr_scheduler has no"),
        ({"lr_scheduler_type": "no.such.LR"}, "lr_scheduler_type: 'no.such.LR' will not do; no.such cannot be"),
        (
            {"lr_scheduler_type": "ReduceLROnPlateau"},
            "lr_scheduler_type: 'ReduceLROnPlateau' will not do; each of its steps wants metrics; use one that goes by",
        ),
    ],
)
def test_an_impossible_course_is_one_error(settings, message: str):
    made = create_optimizer(config(**settings), network())
    with pytest.raises(SettingsError) as caught:
        create_lr_scheduler(config(**settings), made.optimizer, 10)
    assert message in str(caught.value)

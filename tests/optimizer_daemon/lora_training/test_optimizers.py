"""Torch optimizers and learning-rate schedules by name."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.lora_training.lora import LoraNetwork
from optimizer_daemon.lora_training.optimizer_names import NAMED, OPTIONAL, has_one_rate, require_optimizer
from optimizer_daemon.lora_training.optimizers import create_optimizer
from optimizer_daemon.lora_training.schedulers import create_lr_scheduler
from shared.errors import SettingsError, Stopped, UserError
from tests.optimizer_daemon.lora_training.test_config import NEEDED
from tests.optimizer_daemon.lora_training.troublesome import NoOptimizer
from tests.optimizer_daemon.lora_training.workshop import StopAt, Workshop


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


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", [*NAMED, *OPTIONAL])
def test_every_named_optimizer_trains_and_goes_on_exactly(name: str):
    lora = network()
    rate = 1.0 if has_one_rate(name) else 1e-3
    settings = config(optimizer_type=name, learning_rate=rate)
    made = create_optimizer(settings, lora)
    before = [weight.detach().clone() for weight in lora.parameters()]
    take_steps(2, made.optimizer, lora)
    saved = io.BytesIO()
    torch.save({"network": lora.state_dict(), "optimizer": made.optimizer.state_dict()}, saved)
    take_steps(6, made.optimizer, lora)  # RAdam's schedule-free kin waits for five
    norms = [(new.norm(), old.norm()) for new, old in zip(lora.parameters(), before, strict=True) if old.any()]
    assert all(new < old for new, old in norms) and len(norms) == 2

    later = network()
    resumed = create_optimizer(settings, later)
    state = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    later.load_state_dict(state["network"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    take_steps(6, resumed.optimizer, later)
    assert all(torch.equal(new, old) for new, old in zip(later.parameters(), lora.parameters(), strict=True))


def take_steps(count: int, optimizer: torch.optim.Optimizer, lora: LoraNetwork) -> None:
    """Steps towards zero."""
    for _ in range(count):
        sum(weight.square().sum() for weight in lora.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIONAL)
def test_the_package_of_an_optional_optimizer_is_asked_for(name: str, monkeypatch):
    monkeypatch.setattr("sys.path", [])
    package = OPTIONAL[name].split(".")[0]
    with pytest.raises(UserError, match=rf"{name}' will not do; there is no module {package}\S*, so install"):
        require_optimizer(name)


def test_nesterov_has_sd_scripts_momentum_unless_told_otherwise():
    (group, _) = create_optimizer(config(optimizer_type="SGDNesterov"), network()).optimizer.param_groups
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    settings = {"optimizer_type": "SGDNesterov", "optimizer_args": {"momentum": 0.5}}
    (group, _) = create_optimizer(config(**settings), network()).optimizer.param_groups
    assert (group["momentum"], group["nesterov"]) == (0.5, True)


def test_a_rate_that_the_optimizer_finds_is_shown():
    made = create_optimizer(config(optimizer_type="Prodigy", learning_rate=1.0), network())
    assert made.tags == ("textencoder", "unet", "d*lr/textencoder", "d*lr/unet")
    assert made.rates([1.0, 0.5]) == [1.0, 0.5, 1e-6, 0.5e-6]
    plain = create_optimizer(config(), network())
    assert (plain.tags, plain.rates([0.1, 0.2])) == (("textencoder", "unet"), [0.1, 0.2])


class AveragingScheduleFree(torch.optim.SGD):
    """Ends with the mean of all weights it has had; goes there and back by lerp_, as schedule-free optimizers do."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.trains = False

    def step(self, closure=None) -> None:
        assert self.trains
        super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                count = state["count"] = state.get("count", 0) + 1
                mean = state.get("mean", weight.detach())
                state["mean"] = mean + (weight.detach() - mean) / count
                state["middle"] = (weight.detach() + state["mean"]) / 2

    def train(self) -> None:
        self._cross(trains=True)

    def eval(self) -> None:
        self._cross(trains=False)

    def _cross(self, trains: bool) -> None:
        if trains != self.trains:
            for weight, state in self.state.items():
                weight.data.lerp_(state["middle"], 2.0)
        self.trains = trains


def test_a_schedule_free_optimizer_is_saved_with_the_weights_it_ends_with(workshop: Workshop):
    kind = f"{__name__}.AveragingScheduleFree"
    settings = {"save_precision": "float", "optimizer_type": kind, "learning_rate": 0.5, "max_grad_norm": 0.0}
    workshop.train(max_train_epochs=2, save_every_n_epochs=1, **settings)
    ended = workshop.weights()
    plain = {**settings, "optimizer_type": "SGD"}
    weights = []
    for stop in (2, 3, 4):  # the plain weights after each of the first three steps
        with pytest.raises(Stopped):
            workshop.train(StopAt(stop), max_train_epochs=2, **plain)
        weights.append(torch.load(workshop.state_file, weights_only=True)["network"])
    workshop.train(max_train_epochs=2, **plain)
    weights.append(workshop.weights())
    for name, tensor in ended.items():
        mean = torch.stack([each[name] for each in weights]).mean(dim=0)
        torch.testing.assert_close(tensor, mean)


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
            "optimizer_type: 'AdamX' will not do; AdamX is no torch optimizer; use one of ASGD, AdEMAMix8bit, Ada",
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

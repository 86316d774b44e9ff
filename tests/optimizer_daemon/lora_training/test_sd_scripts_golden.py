"""Courses and objectives against what sd-scripts' own functions computed for the same settings."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from optimizer_daemon.lora_training.lora import LoraNetwork
from optimizer_daemon.lora_training.objective import Objective
from optimizer_daemon.lora_training.objective_settings import ObjectiveSettings
from optimizer_daemon.lora_training.optimizers import create_optimizer
from optimizer_daemon.lora_training.schedulers import create_lr_scheduler
from tests.data.sd_scripts.toy_networks import fill, outputs, toys
from tests.optimizer_daemon.lora_training.test_optimizers import config, network

FOLDER = Path(__file__).parents[2] / "data/sd_scripts"
GOLDEN = json.loads((FOLDER / "training_golden.json").read_text(encoding="utf-8"))
TOTAL_STEPS = 20


def named(cases: list[dict]) -> list:
    return [pytest.param(case, id=" ".join(f"{k}={v}" for k, v in case["settings"].items()) or "-") for case in cases]


@pytest.mark.parametrize("case", named(GOLDEN["courses"]))
def test_the_rates_are_those_of_sd_scripts(case):
    rates = {"learning_rate": 1e-3, "text_encoder_lr": 5e-4, "unet_lr": 1e-3}
    settings = config(**{**rates, "optimizer_type": "SGD", **case["settings"]})
    lora: LoraNetwork = network()
    optimizer = create_optimizer(settings, lora).optimizer
    scheduler = create_lr_scheduler(settings, optimizer, TOTAL_STEPS)
    found = []
    for _ in range(TOTAL_STEPS):
        found.append(list(map(float, scheduler.get_last_lr())))
        for weight in lora.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        scheduler.step()
    found.append(list(map(float, scheduler.get_last_lr())))
    assert found == [pytest.approx(rates, rel=1e-6, abs=1e-15) for rates in case["rates"]]


@pytest.mark.parametrize("case", named(GOLDEN["objectives"]))
def test_the_noise_and_the_loss_are_those_of_sd_scripts(case):
    """The "UNet" is the simple function of make_training_golden.py, and so are latents, seed and sample weights."""
    settings = ObjectiveSettings.model_validate(case["settings"])
    alphas = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    velocity = settings.predicts_velocity(False)
    objective = Objective(settings, alphas, predicts_velocity=velocity, device=torch.device("cpu"))
    ratios = random.Random(7)  # sd-scripts asks Python's generator for these
    objective.draw_ratio = lambda: ratios.random() * 2 + 2
    clean = torch.sin(torch.arange(3 * 4 * 64).reshape(3, 4, *case["size"]) * 0.37)
    torch.manual_seed(7)
    question = objective.ask(clean)
    predicted = 0.7 * question.noisy + 0.2 * torch.cos(torch.arange(clean.numel()).reshape(clean.shape) * 0.1)
    loss = objective.loss(predicted, question, torch.tensor([1.0, 0.5, 2.0]))
    assert question.times.tolist() == case["timesteps"]
    assert question.noisy.flatten()[::37].tolist() == pytest.approx(case["noisy"], rel=1e-4, abs=1e-5)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-4)


@pytest.mark.parametrize("case", named(GOLDEN["networks"]))
def test_the_network_is_that_of_sd_scripts(case):
    """Its layers in order, their initial weights, what they drop, the optimizer's groups, and the limited norms."""
    rates = {"learning_rate": 1e-3, "text_encoder_lr": 5e-4, "unet_lr": 1e-3}
    settings = config(**{**rates, **case["settings"]})
    encoder, unet = toys()
    torch.manual_seed(7)
    lora = LoraNetwork(
        unet,
        [encoder],
        rank=settings.network_dim,
        alpha=settings.network_alpha,
        dropout=settings.network_dropout,
        args=settings.network_args,
    )
    initial = {name: tensor.flatten()[0].item() for name, tensor in lora.state_dict().items()}
    by_name = dict(zip(case["names"], case["initial"], strict=True))
    assert initial == pytest.approx(by_name, rel=1e-6)
    fill(lora, 0.7, "lora_up.weight")
    assert outputs(encoder, unet) == pytest.approx(case["outputs"], rel=1e-4, abs=1e-5)
    made = create_optimizer(settings, lora)
    assert list(made.groups) == case["groups"]
    assert [group["lr"] for group in made.optimizer.param_groups] == pytest.approx(case["rates"])
    counts = [sum(weight.numel() for weight in group["params"]) for group in made.optimizer.param_groups]
    assert counts == case["weights_in_groups"]
    if settings.scale_weight_norms:
        lora.limit(settings.scale_weight_norms)
    norms = {name: tensor.norm().item() for name, tensor in lora.state_dict().items()}
    assert norms == pytest.approx(dict(zip(case["names"], case["norms"], strict=True)), rel=1e-4)


@pytest.mark.skipif(
    not {"SD_SCRIPTS_DIR", "SD_SCRIPTS_PYTHON"} <= os.environ.keys(),
    reason="SD_SCRIPTS_DIR and SD_SCRIPTS_PYTHON name no sd-scripts",
)
def test_sd_scripts_still_computes_the_golden_values():
    run = subprocess.run(
        [os.environ["SD_SCRIPTS_PYTHON"], FOLDER / "make_training_golden.py"],
        stdout=subprocess.PIPE,
        check=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    again = json.loads(run.stdout)
    assert again.keys() == GOLDEN.keys()
    for kind, cases in GOLDEN.items():
        for case, remade in zip(cases, again[kind], strict=True):
            for name, value in case.items():
                if isinstance(value, list) and isinstance(value[0], float):
                    torch.testing.assert_close(torch.tensor(remade[name]), torch.tensor(value), msg=f"{case}")
                else:
                    assert remade[name] == value

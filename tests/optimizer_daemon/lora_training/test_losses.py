"""What is trained: the product's losses, step by step, against an independent implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from optimizer_daemon.lora_training.losses import NoiseSchedule, add_offset, min_snr_weight
from optimizer_daemon.lora_training.objective import Objective, Question
from optimizer_daemon.lora_training.objective_settings import ObjectiveSettings
from shared.errors import SettingsError
from tests.optimizer_daemon.lora_training.reference import reference_losses
from tests.optimizer_daemon.lora_training.workshop import Workshop

CAPTIONS = {"a": "a red ball, soft light", "b": "a blue cube", "c": "a green cone", "d": "low", "e": "sks"}
# Adam's steps and clipped ones hardly show how large a gradient is.
PLAIN_SGD = {"optimizer_type": "SGD", "learning_rate": 4.0}


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        (
            {"gradient_accumulation_steps": 2, **PLAIN_SGD, "max_grad_norm": 0.0},
            {"accumulate": 2, "sgd": True, "lr": 4.0, "clip": 0.0},
        ),
        ({**PLAIN_SGD, "max_grad_norm": 0.01}, {"sgd": True, "lr": 4.0, "clip": 0.01}),
        ({"noise_offset": 0.1}, {"offset": 0.1}),
        ({"clip_skip": 2, "network_alpha": 8.0, "network_dim": 2}, {"clip_skip": 2, "alpha": 8.0, "rank": 2}),
        ({"gradient_checkpointing": True}, {}),
    ],
    ids=[
        "accumulated gradients as large as they are",
        "clipped gradients",
        "offset noise",
        "a skipped text layer, another rank and alpha",
        "gradient checkpointing changes nothing",
    ],
)
def test_every_step_has_the_reference_loss(workshop: Workshop, settings, reference):
    workshop.dataset(CAPTIONS)
    compare(workshop, settings, reference)


@pytest.mark.parametrize("velocity", [False, True], ids=["noise", "velocity"])
@pytest.mark.parametrize("gamma", [None, 1.0], ids=["", "min-SNR"])
@pytest.mark.parametrize("accumulate", [1, 2], ids=["", "accumulated, the last group short"])
@pytest.mark.parametrize("flip", [False, True], ids=["", "flipped"])
def test_every_combination_has_the_reference_loss(workshop: Workshop, velocity, gamma, accumulate, flip):
    workshop.dataset(CAPTIONS, subset="flip_aug = true" if flip else "")
    settings = {"v_parameterization": velocity, "min_snr_gamma": gamma, "gradient_accumulation_steps": accumulate}
    reference = {"velocity": velocity, "gamma": gamma, "accumulate": accumulate, "flip": flip}
    compare(workshop, settings, reference, epochs=1)


def compare(workshop: Workshop, settings: dict, reference: dict, epochs: int = 2) -> None:
    workshop.train(seed=11, max_train_epochs=epochs, **settings)
    found = workshop.scalars()["loss/current"]
    expected = reference_losses(
        workshop.base, CAPTIONS, workshop.root / "images", **{"epochs": epochs, "seed": 11, "lr": 1e-2, **reference}
    )
    assert list(found) == list(range(1, len(expected) + 1))
    assert list(found.values()) == pytest.approx(expected, rel=2e-4)


def test_the_base_model_says_what_is_predicted(workshop: Workshop, velocity_model: Path):
    workshop.base = velocity_model
    workshop.dataset(CAPTIONS)
    workshop.train(seed=3, max_train_epochs=1)
    expected = reference_losses(
        velocity_model, CAPTIONS, workshop.root / "images", epochs=1, seed=3, lr=1e-2, velocity=True
    )
    assert list(workshop.scalars()["loss/current"].values()) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(
    ("base_does", "settings", "message"),
    [
        (False, {"zero_terminal_snr": True}, "zero_terminal_snr: True will not do; it is for velocity prediction"),
        (
            True,
            {"v_parameterization": False, "scale_v_pred_loss_like_noise_pred": True},
            "scale_v_pred_loss_like_noise_pred: True will not do; it is for velocity prediction (v_parameterization)",
        ),
        (True, {"v_pred_like_loss": 0.1}, "v_pred_like_loss: 0.1 will not do; it is for noise prediction; take it out"),
    ],
)
def test_a_setting_of_the_other_prediction_is_refused(base_does: bool, settings, message: str):
    with pytest.raises(SettingsError) as caught:
        ObjectiveSettings.model_validate(settings).predicts_velocity(base_does)
    assert message in str(caught.value)


def test_the_forward_process_is_diffusers_own():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    schedule = NoiseSchedule.of(scheduler.alphas_cumprod, torch.device("cpu"))
    clean, noise = torch.randn(2, 5, 4, 8, 8)
    times = torch.tensor([0, 1, 500, 998, 999])
    torch.testing.assert_close(schedule.noisy(clean, noise, times), scheduler.add_noise(clean, noise, times))
    torch.testing.assert_close(schedule.velocity(clean, noise, times), scheduler.get_velocity(clean, noise, times))
    assert schedule.steps == 1000


@pytest.mark.parametrize(
    ("snr", "velocity", "weight"),
    [
        (10.0, False, 0.5),
        (5.0, False, 1.0),
        (0.1, False, 1.0),
        (0.0, False, 1.0),
        (9.0, True, 0.5),
        (1.0, True, 0.5),
        (0.0, True, 0.0),
    ],
)
def test_min_snr_weights(snr: float, velocity: bool, weight: float):
    found = min_snr_weight(torch.tensor([snr]), 5.0, predicts_velocity=velocity)
    assert found.item() == pytest.approx(weight)


def test_offset_noise_is_constant_over_a_channel():
    clean = torch.zeros(64, 4, 16, 16)
    extra = add_offset(clean, clean, 0.5)
    assert torch.allclose(extra.std(dim=(2, 3)), torch.zeros(64, 4), atol=1e-6)
    assert extra.std().item() == pytest.approx(0.5, rel=0.2)


def test_the_loss_is_the_mean_over_samples_of_weighted_means():
    alphas = DDPMScheduler().alphas_cumprod
    objective = Objective(ObjectiveSettings(), alphas, predicts_velocity=False, device=torch.device("cpu"))
    predicted = torch.stack([torch.full((4, 2, 2), 1.0), torch.full((4, 2, 2), 3.0)])
    question = Question(predicted, torch.tensor([1, 2]), torch.zeros_like(predicted))
    assert objective.loss(predicted, question).item() == 5.0
    assert objective.loss(predicted, question, torch.tensor([1.0, 0.5])).item() == 2.75

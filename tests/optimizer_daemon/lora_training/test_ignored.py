"""Settings that do nothing beside others are said, each once; no others are."""

from __future__ import annotations

import pytest

from optimizer_daemon.lora_training.base_model import inspect_base_model
from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.lora_training.ignored import ignored_settings
from tests.optimizer_daemon.lora_training.workshop import Workshop

NEEDED = {
    "pretrained_model_name_or_path": "base",
    "dataset_config": "d.toml",
    "output_dir": "out",
    "output_name": "lora",
    "network_dim": 4,
    "network_alpha": 1.0,
    "learning_rate": 1e-4,
    "max_train_epochs": 1,
}


def said(base_model, *, validates: bool = False, **settings) -> list[str]:
    config = TrainConfig.model_validate({**NEEDED, **settings})
    return ignored_settings(config, inspect_base_model(base_model), validates=validates)


@pytest.mark.parametrize(
    ("settings", "beside", "sentence"),
    [
        ({"lr_decay_steps": 5}, {"lr_scheduler": "warmup_stable_decay"}, "lr_scheduler 'warmup_stable_decay'"),
        ({"lr_scheduler_power": 2.0}, {"lr_scheduler": "polynomial"}, "it belongs to lr_scheduler 'polynomial'"),
        ({"lr_scheduler_timescale": 7}, {"lr_scheduler": "inverse_sqrt"}, "it belongs to lr_scheduler 'inverse_sqrt'"),
        ({"lr_scheduler_num_cycles": 3}, {"lr_scheduler": "cosine_with_restarts"}, "'cosine_with_restarts' or"),
        ({"lr_scheduler_min_lr_ratio": 0.1}, {"lr_scheduler": "cosine_with_min_lr"}, "'cosine_with_min_lr' or"),
        ({"noise_offset": 0.0, "adaptive_noise_scale": 0.1}, {"noise_offset": 0.1}, " is ignored without noise_offset"),
        ({"noise_offset_random_strength": True}, {"noise_offset": 0.1}, "is ignored without noise_offset"),
        ({"multires_noise_discount": 0.5}, {"multires_noise_iterations": 4}, "without multires_noise_iterations"),
        ({"ip_noise_gamma_random_strength": True}, {"ip_noise_gamma": 0.1}, "is ignored without ip_noise_gamma"),
        ({"huber_c": 0.3}, {"loss_type": "huber"}, "it belongs to loss_type 'huber' or 'smooth_l1'"),
        ({"huber_schedule": "constant"}, {"loss_type": "smooth_l1"}, "it belongs to loss_type 'huber' or 'smooth_l1'"),
        ({"validate_every_n_steps": 2}, {"validates": True}, "no image is held back for validation (validation_split)"),
        ({"max_validation_steps": 2}, {"validates": True}, "no image is held back for validation (validation_split)"),
        (
            {"network_args": {"conv_dim": 4}, "network_train_text_encoder_only": True},
            {"network_train_text_encoder_only": False},
            "network_args.conv_dim = 4 is ignored: only the UNet has such convolutions",
        ),
    ],
)
def test_a_setting_that_does_nothing_is_said(base_model, settings, beside, sentence: str):
    (found,) = said(base_model, **settings)
    assert sentence in found
    assert said(base_model, **{**settings, **beside}) == []


def test_a_training_says_it_once(workshop: Workshop, capsys):
    workshop.train(max_train_epochs=2, huber_c=0.3)
    line = "  note: huber_c = 0.3 is ignored: it belongs to loss_type 'huber' or 'smooth_l1'\n"
    assert capsys.readouterr().out.count(line) == 1

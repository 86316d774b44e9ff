"""train_config.toml."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer_daemon.lora_training.config import ARGUMENT_TABLES, TrainConfig, load_config, to_toml
from shared.errors import UserError

NEEDED = {
    "pretrained_model_name_or_path": "/models/base",
    "dataset_config": "/data/dataset.toml",
    "output_dir": "/out",
    "output_name": "lora",
    "learning_rate": 1e-4,
    "max_train_epochs": 4,
}


def config(**changes) -> TrainConfig:
    return TrainConfig.model_validate({**NEEDED, **changes})


def loaded(folder: Path, text: str) -> TrainConfig:
    path = folder / "train_config.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


toml_values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\x00\n\r"), min_size=1),
    rate=st.floats(min_value=1e-12, max_value=1e6, allow_subnormal=False),
    arguments=st.dictionaries(st.text(), toml_values, max_size=3),
)
def test_any_config_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, name, rate, arguments):
    free = ("optimizer_args", "lr_scheduler_args")
    tables = {**dict.fromkeys(free, arguments), "network_args": {"conv_dim": 4, "rank_dropout": 0.5}}
    assert tables.keys() == set(ARGUMENT_TABLES)
    written = config(output_name=name, learning_rate=rate, network_dropout=0.5, **tables)
    assert loaded(tmp_path_factory.mktemp("config"), to_toml(written)) == written


def test_settings_at_their_default_are_left_out():
    assert to_toml(config(network_dim=4, seed=42, resume=False)) == to_toml(config())


def test_relative_paths_start_from_the_file(tmp_path: Path):
    text = to_toml(
        config(pretrained_model_name_or_path="base", dataset_config="../d.toml", output_dir=".", logging_dir="l")
    )
    found = loaded(tmp_path, text)
    assert (found.pretrained_model_name_or_path, found.dataset_config) == (tmp_path / "base", tmp_path / "../d.toml")
    assert (found.output_dir, found.logging_dir, found.state_folder) == (tmp_path, tmp_path / "l", tmp_path / "state")


@pytest.mark.parametrize(
    ("rates", "effective"),
    [
        ({}, (1e-4, 1e-4)),
        ({"unet_lr": 2e-4}, (2e-4, 1e-4)),
        ({"text_encoder_lr": 5e-5}, (1e-4, 5e-5)),
        ({"text_encoder_lr": 0}, (1e-4, 0.0)),
        ({"unet_lr": 0.0}, (0.0, 1e-4)),
    ],
    ids=["one rate for both", "the UNet's own", "the text encoder's own", "UNet only", "text encoder only"],
)
def test_learning_rate_is_the_rate_of_whatever_has_none_of_its_own(rates, effective):
    found = config(**rates)
    assert (found.effective_unet_lr, *found.text_encoder_rates) == effective
    assert (found.trains_unet, found.trains_text_encoder) == tuple(rate > 0 for rate in effective)


def test_what_decides_the_weights_is_what_a_resumed_training_must_share():
    free = {
        "output_name": "b",
        "save_every_n_epochs": 3,
        "resume": True,
        "threads": 2,
        "device": "cpu",
        "state_dir": "/s",
        "pretrained_model_name_or_path": "/moved",
        "network_weights": "/moved.safetensors",
        "mixed_precision": "no",
    }
    assert config(**free).weight_deciding() == config().weight_deciding()
    for name, value in {"seed": 1, "network_dim": 8, "max_train_epochs": 5, "noise_offset": 0.1}.items():
        assert config(**{name: value}).weight_deciding() != config().weight_deciding(), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1e-4\nlearning_rate = 1", "not valid TOML"),
        ("optimizer_tipe = 'Lion'", " line 1: optimizer_tipe: there is no such key; did you mean 'optimizer_type'?"),
        ("[general]\nx = 1", " line 1: general: there is no such key; take it out"),
        ("output_name = 'a'", "is missing"),
    ],
    ids=["broken TOML", "a misspelt key", "a key of another file", "something missing"],
)
def test_a_broken_file_is_one_error_that_names_it(tmp_path: Path, text: str, message: str):
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "train_config.toml"))
    assert message in str(caught.value)


def inline(value: object) -> str:
    """Return a value as TOML has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value).replace("Infinity", "inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_dim": 0}, "network_dim: 0 will not do"),
        ({"network_dim": "8"}, "network_dim: '8' will not do"),
        ({"network_dim": True}, "network_dim: True will not do"),
        ({"learning_rate": 0}, "learning_rate: 0 will not do"),
        ({"learning_rate": math.inf}, "learning_rate: inf will not do"),
        ({"output_name": "a/b"}, "output_name: 'a/b' will not do"),
        ({"output_dir": ""}, "output_dir: '' will not do"),
        ({"device": "tpu"}, "device: 'tpu' will not do"),
        ({"lr_warmup_steps": 1.5}, "lr_warmup_steps: 1.5 will not do"),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps: -1 will not do"),
        ({"save_every_n_epochs": 0}, "save_every_n_epochs: 0 will not do"),
        ({"lr_warmup_steps": 3}, "lr_scheduler 'constant' has no warm-up but lr_warmup_steps is 3"),
        (
            {"lr_scheduler_type": "StepLR", "lr_warmup_steps": 3},
            "lr_scheduler_type 'StepLR' has no warm-up but lr_warmup_steps is 3; use lr_warmup_steps = 0",
        ),
        ({"lr_scheduler": "piecewise_constant"}, "needs its rules; set lr_scheduler_args.step_rules, such as '1:100,"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "needs one lowest rate; set either lr_scheduler_min_lr_ratio or"),
        (
            {"optimizer_type": "Prodigy", "unet_lr": 1.0, "text_encoder_lr": 0.5},
            "optimizer_type 'Prodigy' has one rate for all it trains, but the rates are 0.5, 1.0; make unet_lr and",
        ),
        (
            {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "cosine"},
            "optimizer_type 'AdamWScheduleFree' needs no course of the rates, but there is 'cosine'; use lr_scheduler",
        ),
        (
            {"optimizer_type": "Prodigy", "network_args": {"loraplus_lr_ratio": 4}},
            "optimizer_type 'Prodigy' has one rate for all it trains, but network_args ask for LoRA+; take the",
        ),
        (
            {"network_train_unet_only": True, "network_train_text_encoder_only": True},
            "network_train_unet_only and network_train_text_encoder_only exclude each other; keep one",
        ),
        (
            {"network_train_unet_only": True, "unet_lr": 0},
            "network_train_unet_only leaves only what has rate 0, so nothing would be trained; take it out",
        ),
        ({"network_args": {"conv_alpha": 4}}, "conv_alpha scales layers that conv_dim makes, which is not set; set it"),
        (
            {"network_args": {"conv_rank": 4}},
            "there is no 'conv_rank' here; the arguments are conv_dim, conv_alpha,",
        ),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing"),
        ({"adaptive_noise_scale": 0.1}, "adaptive_noise_scale needs noise_offset, which is not set; set it or take"),
        ({"min_timestep": 600, "max_timestep": 500}, "min_timestep 600 lies above max_timestep 500; lower it"),
        ({"loss_type": "l3"}, "loss_type: 'l3' will not do"),
        ({"lr_decay_steps": 1.5}, "lr_decay_steps: 1.5 will not do"),
        ({"unet_lr": 0, "text_encoder_lr": 0}, "nothing would be trained"),
        ({"mixed_precision": "fp8"}, "mixed_precision: 'fp8' will not do"),
    ],
)
def test_a_value_that_will_not_do_is_named_with_its_key(tmp_path: Path, changes, message: str):
    values = {**NEEDED, **changes}
    text = "\n".join(f"{key} = {inline(value)}" for key, value in values.items())
    with pytest.raises(
        UserError, match=r"will not do|has no|nothing|needs|above|has one|exclude|scales|there is no"
    ) as caught:
        loaded(tmp_path, text)
    assert message in str(caught.value)

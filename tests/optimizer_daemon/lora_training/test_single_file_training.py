"""A training on a single-file base model is the training on the same model as a diffusers folder."""

from __future__ import annotations

import hashlib

import pytest
import torch

from optimizer_daemon.lora_training.base_model import inspect_base_model
from optimizer_daemon.lora_training.models import (
    Hardware,
    load_noise_scheduler,
    load_text_encoders,
    load_tokenizers,
    load_unet,
    load_vae,
)
from shared.errors import UserError
from tests.optimizer_daemon.lora_training.workshop import Workshop, header_of
from tests.shared.single_files import original_tensors, parts_of, save_single_file, tiny_sd15, tiny_sdxl

SETTINGS = {"max_train_epochs": 1, "network_dim": 2, "clip_skip": 2}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    # in half precision, as models are published: float32 is mapped from the file, at addresses that decide the rounding
    return tiny_sd15(tmp_path_factory.mktemp("clip")).to(torch.float16)


def test_it_gives_the_same_weights_and_its_metadata_name_the_file(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "folder")
    file = save_single_file(pipeline, tmp_path / "v1-tiny.safetensors")
    trained = {}
    for base in (tmp_path / "folder", file):
        workshop = Workshop(tmp_path / f"in_{base.name}", base, tmp_path / f"latents_{base.name}")
        workshop.root.mkdir()
        workshop.train(**SETTINGS)
        trained[base] = workshop
    weights = [workshop.weights("lora.safetensors") for workshop in trained.values()]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert any(name.startswith("lora_te_text_model_encoder_layers_0_") for name in weights[1])
    metadata = header_of(trained[file].out / "lora.safetensors")[1]
    content = file.read_bytes()
    assert metadata["ss_sd_model_name"] == "v1-tiny.safetensors"
    assert metadata["ss_new_sd_model_hash"] == hashlib.sha256(content).hexdigest()
    assert metadata["ss_sd_model_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


def test_models_with_one_vae_share_their_latents(pipeline, tmp_path):
    first = save_single_file(pipeline, tmp_path / "first.safetensors")
    name = "model.diffusion_model.out.2.bias"
    second = save_single_file(pipeline, tmp_path / "second.safetensors", **{name: original_tensors(pipeline)[name] + 1})
    for base in (first, second):
        workshop = Workshop(tmp_path / base.stem, base, tmp_path / "latents")
        workshop.root.mkdir()
        workshop.train(**SETTINGS)
    (folder,) = (tmp_path / "latents").iterdir()
    assert len(list(folder.iterdir())) == 3, "one of each picture"


def test_an_inpainting_model_is_refused(pipeline, tmp_path):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    file = save_single_file(pipeline, tmp_path / "inpainting.safetensors", **{name: torch.zeros(32, 9, 3, 3)})
    with pytest.raises(UserError, match="takes 9 channels, its VAE makes 4; inpainting models will not do"):
        inspect_base_model(file)


def test_what_it_predicts_decides_the_objective(pipeline, tmp_path):
    assert not inspect_base_model(save_single_file(pipeline, tmp_path / "noise.safetensors")).predicts_velocity
    file = save_single_file(pipeline, tmp_path / "velocity.safetensors", {"modelspec.prediction_type": "v"})
    assert inspect_base_model(file).predicts_velocity


def test_both_text_encoders_of_an_sdxl_file_are_loaded_whole(tmp_path):
    pipeline = tiny_sdxl(tmp_path)
    base = inspect_base_model(save_single_file(pipeline, tmp_path / "xl.safetensors"))
    assert base.family == "sdxl"
    assert base.text_width == 32 + 64
    hardware = Hardware(torch.device("cpu"), torch.float32)
    loaded = [load_unet(base, hardware), load_vae(base, hardware), *load_text_encoders(base, hardware)]
    for model, expected in zip(loaded, parts_of(pipeline).values(), strict=True):
        assert type(model) is type(expected)
        state = model.state_dict()
        assert state.keys() == expected.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    assert [tokenizer.pad_token_id for tokenizer in load_tokenizers(base)] == [49407, 0]
    assert load_noise_scheduler(base).config.beta_start == 0.00085

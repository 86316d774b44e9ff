"""The files a training leaves: names, tensors, metadata, and what other programs make of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft.tuners.lora import LoraLayer as PeftLayer
from transformers import CLIPTextConfig, CLIPTextModel

from optimizer_daemon.lora_training.lora import text_layers, unet_layers
from optimizer_daemon.lora_training.saving import hashes
from shared.layout import checkpoint_epoch, expected_checkpoints
from shared.safetensors_file import Family, lora_modules, read_checkpoint
from tests.optimizer_daemon.lora_training.workshop import Workshop, header_of

UNET_BLOCKS = [
    "down_blocks_0_attentions_0",
    "mid_block_attentions_0",
    "up_blocks_1_attentions_0",
    "up_blocks_1_attentions_1",
]
INSIDE = [
    "proj_in",
    "proj_out",
    *(f"transformer_blocks_0_attn{n}_to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out_0")),
    "transformer_blocks_0_ff_net_0_proj",
    "transformer_blocks_0_ff_net_2",
]
UNET_NAMES = {f"lora_unet_{block}_{layer}" for block in UNET_BLOCKS for layer in INSIDE}
TEXT_INSIDE = [*(f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2"]
TEXT_NAMES = {f"lora_te_text_model_encoder_layers_{n}_{layer}" for n in range(3) for layer in TEXT_INSIDE}
PARTS = ("lora_down.weight", "lora_up.weight", "alpha")


@pytest.mark.parametrize(("epochs", "every"), [(1, 2), (4, 2), (5, 2), (3, 1), (3, 9), (3, None)])
def test_as_many_checkpoints_as_kohya_leaves_under_its_names(workshop: Workshop, epochs: int, every: int | None):
    workshop.train(max_train_epochs=epochs, save_every_n_epochs=every)
    numbered = [epoch for epoch in range(1, epochs) if every and epoch % every == 0]
    assert workshop.checkpoints == [*(f"lora-{epoch:06d}.safetensors" for epoch in numbered), "lora.safetensors"]
    assert len(workshop.checkpoints) == expected_checkpoints(epochs, every or epochs)
    for name in workshop.checkpoints:
        metadata = header_of(workshop.out / name)[1]
        assert int(metadata["ss_epoch"]) == checkpoint_epoch(name, None, epochs, "lora")
        assert int(metadata["ss_steps"]) == 2 * int(metadata["ss_epoch"])


@pytest.mark.parametrize(
    ("rates", "names"),
    [
        ({}, UNET_NAMES | TEXT_NAMES),
        ({"text_encoder_lr": 0.0}, UNET_NAMES),
        ({"unet_lr": 0.0}, TEXT_NAMES),
    ],
    ids=["UNet and text encoder", "UNet only", "text encoder only"],
)
def test_the_keys_are_kohyas(workshop: Workshop, rates, names: set[str]):
    workshop.train(max_train_epochs=1, network_dim=3, network_alpha=2.0, **rates)
    entries, metadata, _ = header_of(workshop.out / "lora.safetensors")
    assert entries.keys() == {f"{name}.{part}" for name in names for part in PARTS}
    assert {entry["dtype"] for entry in entries.values()} == {"F16"}
    assert all(entry["shape"] == [] for key, entry in entries.items() if key.endswith(".alpha"))
    layout = lora_modules(read_checkpoint(workshop.out / "lora.safetensors", workshop.out))
    assert (layout.family, layout.ranks, {module.alpha for module in layout.modules}) == (Family.KOHYA, {3}, {2.0})
    assert metadata["ss_network_dim"] == "3"


def test_a_full_size_model_has_kohyas_264_modules():
    """192 and 72, as sd-scripts 48d368f made of Stable Diffusion 1.5."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
        )
    in_unet, in_encoder = dict(unet_layers(unet)), dict(text_layers(encoder))
    assert (len(in_unet), len(in_encoder)) == (192, 72)
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in in_unet
    assert "lora_te_text_model_encoder_layers_11_mlp_fc2" in in_encoder


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::FutureWarning:transformers")
def test_diffusers_applies_every_module_exactly(workshop: Workshop):
    workshop.train(network_dim=2, network_alpha=6.0)
    entries, _, _ = header_of(workshop.out / "lora.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(workshop.base, local_files_only=True, safety_checker=None)
    noisy, states = torch.randn(1, 4, 8, 8), torch.randn(1, 24, 32)
    ids = torch.tensor([[512, 5, 9, *[513] * 21]])
    weights = {name: tensor.float() for name, tensor in workshop.weights().items()}

    # By hand first: fold the change into copies of the frozen weights.
    for root, layers in ((pipeline.unet, unet_layers), (pipeline.text_encoder, text_layers)):
        original = {name: layer.weight.detach().clone() for name, layer in layers(root)}
        for name, layer in layers(root):
            change = weights[f"{name}.lora_up.weight"].flatten(1) @ weights[f"{name}.lora_down.weight"].flatten(1)
            layer.weight.data += 6.0 / 2 * change.reshape(layer.weight.shape)
        with torch.no_grad():
            if root is pipeline.unet:
                by_hand = root(noisy, 500, states).sample
            else:
                text_by_hand = root(ids).last_hidden_state
        for name, layer in layers(root):
            layer.weight.data = original[name]

    with torch.no_grad():
        plain = pipeline.unet(noisy, 500, states).sample
    pipeline.load_lora_weights(workshop.out, weight_name="lora.safetensors", adapter_name="tested")
    applied = [m for root in (pipeline.unet, pipeline.text_encoder) for m in root.modules() if isinstance(m, PeftLayer)]
    assert len(applied) == len(entries) / 3 == 48 + 18
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(noisy, 500, states).sample, by_hand, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(pipeline.text_encoder(ids).last_hidden_state, text_by_hand, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(by_hand, plain, atol=1e-3)


def test_the_metadata_tells_how_it_was_trained(workshop: Workshop):
    workshop.dataset({"a": "red, soft", "b": "blue, soft"}, subset="num_repeats = 3\nflip_aug = true")
    workshop.train(
        network_dim=8,
        network_alpha=4.0,
        unet_lr=2e-4,
        text_encoder_lr=5e-5,
        optimizer_args={"weight_decay": 0.1},
        lr_scheduler="cosine",
        lr_warmup_steps=2,
        max_train_epochs=2,
        gradient_accumulation_steps=2,
        clip_skip=2,
        min_snr_gamma=5.0,
        seed=7,
    )
    _, metadata, _ = header_of(workshop.out / "lora.safetensors")
    assert all(isinstance(value, str) for value in metadata.values())
    expected = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_learning_rate": "0.01",
        "ss_unet_lr": "0.0002",
        "ss_text_encoder_lr": "5e-05",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "ss_lr_scheduler": "cosine",
        "ss_lr_warmup_steps": "2",
        "ss_epoch": "2",
        "ss_num_epochs": "2",
        "ss_steps": "4",
        "ss_max_train_steps": "4",
        "ss_num_batches_per_epoch": "3",
        "ss_gradient_accumulation_steps": "2",
        "ss_seed": "7",
        "ss_output_name": "lora",
        "ss_num_train_images": "6",
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "tiny_base",
        "ss_clip_skip": "2",
        "ss_min_snr_gamma": "5.0",
        "ss_noise_offset": "None",
        "ss_mixed_precision": "no",
        "ss_max_grad_norm": "1.0",
    }
    assert {key: metadata.get(key) for key in expected} == expected
    (dataset,) = json.loads(metadata["ss_datasets"])
    assert (dataset["resolution"], dataset["batch_size_per_device"], dataset["num_train_images"]) == ([64, 64], 2, 6)
    assert (dataset["subsets"][0]["image_dir"], dataset["subsets"][0]["img_count"]) == ("images", 2)
    assert json.loads(metadata["ss_dataset_dirs"]) == {"images": {"n_repeats": 3, "img_count": 2}}
    assert json.loads(metadata["ss_tag_frequency"]) == {"images": {"red": 1, "soft": 2, "blue": 1}}
    assert float(metadata["ss_training_finished_at"]) >= float(metadata["ss_training_started_at"])


def test_the_hashes_are_those_of_sd_scripts(workshop: Workshop):
    workshop.train(max_train_epochs=1)
    _, metadata, data = header_of(workshop.out / "lora.safetensors")
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8]  # the file is below 1 MiB


def test_the_legacy_hash_is_taken_at_one_mebibyte_of_the_file_with_training_metadata_alone(tmp_path: Path):
    from safetensors.torch import save_file

    tensors = {"weight": torch.arange(2**19, dtype=torch.float32)}
    found = hashes(tensors, {"ss_a": "1", "modelspec.title": "x" * 5000})
    save_file(tensors, tmp_path / "f.safetensors", {"ss_a": "1"})
    content = (tmp_path / "f.safetensors").read_bytes()
    assert found["sshs_legacy_hash"] == hashlib.sha256(content[2**20 : 2**20 + 2**16]).hexdigest()[:8]


def test_weights_begin_as_kohyas(workshop: Workshop):
    """down: uniform within 1 / sqrt(inputs); up: zero. Hardly anything is learned here."""
    workshop.train(max_train_epochs=1, learning_rate=1e-12, network_dim=16)
    for name, tensor in workshop.weights().items():
        if name.endswith("lora_up.weight"):
            assert tensor.abs().max() < 1e-6, name
        elif name.endswith("lora_down.weight"):
            bound = 1 / math.sqrt(tensor[0].numel())
            assert 0.9 * bound < tensor.abs().max() <= bound * 1.001, name
            assert abs(tensor.float().mean()) < bound / 4, name


def test_a_checkpoint_has_the_mode_of_any_new_file(workshop: Workshop):
    before = os.umask(0o027)
    try:
        workshop.train(max_train_epochs=1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((workshop.out / "lora.safetensors").stat().st_mode) == 0o640
    assert [path.name for path in workshop.out.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "BF16"), ("float", "F32")])
def test_other_number_formats_on_request(workshop: Workshop, precision: str, dtype: str):
    workshop.train(max_train_epochs=1, save_precision=precision)
    entries, _, _ = header_of(workshop.out / "lora.safetensors")
    assert {entry["dtype"] for entry in entries.values()} == {dtype}

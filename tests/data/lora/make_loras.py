"""Make the LoRA files of this folder, each by the code of those whose files the evaluator meets.

    python -m tests.data.lora.make_loras native        our trainer, two epochs of two steps: native-000001, native
    python -m tests.data.lora.make_loras diffusers     save_lora_weights of diffusers, after two steps
    python -m tests.data.lora.make_loras kohya         LoRANetwork.save_weights of kohya-ss/sd-scripts, after two steps

All are of the tiny world's base model. The last needs a checkout of sd-scripts with the packages it pins (above all
safetensors 0.4.5) before ours on PYTHONPATH; kohya.safetensors came from its commit 48d368fa5577. Nothing makes the
files anew by itself: tests count on their bytes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from examples.tiny_world.paths import BASE_MODEL, DATASET

HERE = Path(__file__).resolve().parent
RANK, ALPHA = 1, 0.5


def native() -> None:
    """Train with the trainer of this project."""
    from optimizer_daemon.lora_training.__main__ import main
    from optimizer_daemon.lora_training.config import TrainConfig, to_toml

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "dataset.toml").write_text(
            "[general]\ncaption_extension = '.txt'\nenable_bucket = false\n[[datasets]]\nresolution = 64\n"
            f"batch_size = 16\n[[datasets.subsets]]\nimage_dir = '{DATASET / 'pixar_style'}'\nnum_repeats = 1\n"
        )
        values = {
            "pretrained_model_name_or_path": str(BASE_MODEL),
            "dataset_config": str(folder / "dataset.toml"),
            "output_dir": str(HERE),
            "output_name": "native",
            "state_dir": str(folder / "state"),
            "latent_cache_dir": str(folder / "latents"),
            "learning_rate": 1e-3,
            "network_dim": RANK,
            "network_alpha": ALPHA,
            "max_train_epochs": 2,
            "save_every_n_epochs": 1,
            "threads": 1,
            "device": "cpu",
        }
        config = folder / "train_config.toml"
        config.write_text(to_toml(TrainConfig.model_validate(values)))
        assert main(["--config", str(config)]) == 0


def diffusers() -> None:
    """Train a peft adapter two steps and save it by diffusers."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    unet, text_encoder = _models()
    layers = {
        "unet": (unet, ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]),
        "text_encoder": (text_encoder, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    }
    for model, targets in layers.values():
        model.requires_grad_(False)
        settings = LoraConfig(r=RANK, lora_alpha=1, target_modules=targets, init_lora_weights="gaussian")
        inject_adapter_in_model(settings, model)
    _two_steps(unet, text_encoder, [p for model, _ in layers.values() for p in model.parameters() if p.requires_grad])
    weights = {
        name: {key: tensor.half() for key, tensor in get_peft_model_state_dict(model).items()}
        for name, (model, _) in layers.items()
    }
    StableDiffusionPipeline.save_lora_weights(
        HERE,
        unet_lora_layers=weights["unet"],
        text_encoder_lora_layers=weights["text_encoder"],
        weight_name="diffusers.safetensors",
    )


def kohya() -> None:
    """Train sd-scripts' network two steps and save it by its own method."""
    import torch
    from library import train_util
    from networks import lora

    unet, text_encoder = _models()
    network = lora.create_network(1.0, RANK, ALPHA, None, text_encoder, unet)
    network.apply_to(text_encoder, unet, True, True)
    _two_steps(unet, text_encoder, list(network.parameters()))
    metadata = train_util.build_minimum_network_metadata("False", "sd_v1", "networks.lora", str(RANK), str(ALPHA), None)
    metadata |= {"ss_epoch": "2", "ss_steps": "2", "ss_output_name": "kohya", "ss_tag_frequency": '{"1_a": {"ü": 2}}'}
    network.save_weights(str(HERE / "kohya.safetensors"), torch.float16, metadata)


def _models():
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    return UNet2DConditionModel.from_pretrained(BASE_MODEL / "unet"), CLIPTextModel.from_pretrained(
        BASE_MODEL / "text_encoder", torch_dtype=torch.float32
    )


def _two_steps(unet, text_encoder, parameters) -> None:
    """Two steps of AdamW on random latents: every weight that is trained is other than at its start."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    tokens, latents, steps = torch.arange(77)[None], torch.randn(2, 1, 4, 8, 8), torch.tensor([500])
    for noise in latents:
        optimizer.zero_grad()
        context = text_encoder(tokens).last_hidden_state
        (unet(noise.to(unet.dtype), steps, context).sample - noise).square().mean().backward()
        optimizer.step()


if __name__ == "__main__":
    {"native": native, "diffusers": diffusers, "kohya": kohya}[sys.argv[1]]()

"""A random Stable Diffusion 1.5 with every module of the real one, 192 in the UNet and 72 in the text encoder that a
LoRA trains, and a thousandth of its weights: a diffusers folder that sd-scripts and we can read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.clip_tokenizers import write_tokenizer

NARROW: dict[str, Any] = {
    # Multiples of 32, the groups of every normalisation.
    "unet_channels": [32, 64, 64, 64],
    "vae_channels": [32, 32, 32, 32],
    "text": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        "num_attention_heads": 4,
    },
}
"""What is narrower than in the real model; depths, kernels and names are not."""


def save_narrow_model(folder: Path) -> Path:
    """Write the model with random weights as a diffusers folder; return it."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    write_tokenizer("sd15/tokenizer", folder / "tokenizer")
    text = NARROW["text"]
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=tuple(NARROW["vae_channels"]),
            layers_per_block=2,
            latent_channels=4,
            sample_size=256,
        ),
        unet=UNet2DConditionModel(
            sample_size=8,  # pictures of 64 px, unless somebody asks for others
            block_out_channels=tuple(NARROW["unet_channels"]),
            cross_attention_dim=text["hidden_size"],
            attention_head_dim=8,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(num_hidden_layers=12, **text)),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    name_as_published(folder / "text_encoder/model.safetensors")
    return folder


def name_as_published(weights: Path) -> None:
    """Put the level back that transformers 5.6 took out of CLIPTextModel; every published folder has it."""
    from safetensors.torch import load_file, save_file

    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})

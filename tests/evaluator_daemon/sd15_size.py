"""A random model of Stable Diffusion 1.5's true size, and a LoRA of rank 4 that fits it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.evaluator_daemon.tiny_models import save_tokenizer

SIZE_PX = 64


def save_sd15_size(folder: Path) -> Path:
    """UNet of 859.5 M, text encoder of 123.1 M, VAE of 83.7 M parameters in bfloat16 (2.1 GB), for 64 x 64 px.

    The configurations are Stable Diffusion 1.5's but for the size and the tokenizer, which spells.
    """
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(15)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    unet = UNet2DConditionModel(sample_size=SIZE_PX // 8, cross_attention_dim=768)
    unet.to(torch.bfloat16).save_pretrained(folder / "unet")
    del unet
    CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)).to(
        torch.bfloat16
    ).save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "spelling")
    shutil.move(folder / "spelling", folder / "tokenizer")
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def sd15_modules() -> dict[str, tuple[int, ...]]:
    """The 192 + 72 modules of networks.lora in kohya's names -> shape of the weight, from the model's configuration."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from optimizer_daemon.lora_training.lora import text_layers, unet_layers

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    return {name: tuple(layer.weight.shape) for name, layer in (*unet_layers(unet), *text_layers(text))}

"""SDXL for the real sdxl_train_network.py: every module of it, 722 + 72 + 192 that a LoRA trains, and few weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from shared.clip_tokenizers import write_tokenizer
from tests.kohya.narrow_model import name_as_published

FIRST: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 12}
SECOND: dict[str, Any] = {**FIRST, "hidden_size": 48, "num_hidden_layers": 32, "hidden_act": "gelu"}
NARROW = {"channels": 32, "context": 32 + 48, "pooled": 40}
"""What sd-scripts has as constants: width of the UNet's first block, of its text, of the pooled text."""

_SCRIPT = "sdxl_train_network.py"


def make_sdxl_checkout(sd_scripts: Path, folder: Path) -> Path:
    """Make a checkout of links, but for a script that sets the widths first; see sdxl_entry.py."""
    folder.mkdir(parents=True)
    for path in sd_scripts.iterdir():
        (folder / (f"real_{_SCRIPT}" if path.name == _SCRIPT else path.name)).symlink_to(path)
    (folder / "narrow.json").write_text(json.dumps(NARROW), encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("sdxl_entry.py"), folder / _SCRIPT)
    return folder


def save_narrow_sdxl(folder: Path) -> Path:
    """Write the model with random weights as a diffusers folder; return it."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(f"sdxl/{name}", folder / name)
    width, tokens = NARROW["channels"], {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 32, 32),
            scaling_factor=0.13025,
            sample_size=64,
        ),
        unet=UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(width, 2 * width, 4 * width),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(1, 1, 2),
            cross_attention_dim=NARROW["context"],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=NARROW["pooled"] + 6 * 256,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**FIRST, **tokens)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**SECOND, **tokens, projection_dim=NARROW["pooled"])),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    name_as_published(folder / "text_encoder/model.safetensors")
    return folder

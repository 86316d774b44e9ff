"""Random models with the true shapes of Stable Diffusion and CLIP, small enough to render in a moment."""

from __future__ import annotations

import json
from pathlib import Path

WIDTH = 32
PROMPTS = ("a red ball", "a blue cube")


def save_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer that spells every word letter by letter."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)
    tokenizer.save_pretrained(folder)


def text_config(tokenizer_folder: Path) -> dict:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def save_base_model(folder: Path) -> Path:
    """A Stable Diffusion 1.x folder that renders 16 x 16 px noise."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    save_tokenizer(folder / "tokenizer")
    blocks = (16, 16)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=blocks,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=blocks,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config(folder / "tokenizer"))),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def save_sdxl_model(folder: Path) -> Path:
    """An SDXL folder that renders 16 x 16 px noise: two text encoders, linear projections, pooled text and sizes."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(2)
    for name in ("tokenizer", "tokenizer_2"):
        save_tokenizer(folder / name)
    blocks = (16, 16)
    size_width = 8
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=blocks,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.13025,
            force_upcast=True,
        ),
        unet=UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=blocks,
            layers_per_block=2,
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=2 * WIDTH,
            attention_head_dim=(1, 2),
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=size_width,
            projection_class_embeddings_input_dim=WIDTH + 6 * size_width,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config(folder / "tokenizer"))),
        text_encoder_2=CLIPTextModelWithProjection(
            CLIPTextConfig(**{**text_config(folder / "tokenizer_2"), "num_hidden_layers": 3, "hidden_act": "gelu"})
        ),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """A CLIP with image processor and tokenizer beside it."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

    torch.manual_seed(1)
    save_tokenizer(folder)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = CLIPConfig(text_config=text_config(folder), vision_config=vision.to_dict(), projection_dim=WIDTH)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    """A DINOv2 with its image processor."""
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(2)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=8
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


UNET_MODULES = {
    f"lora_unet_{block}_attentions_0_transformer_blocks_0_{layer}": shape
    for block in ("down_blocks_1", "up_blocks_0")
    for layer, shape in {
        "attn1_to_q": (16, 16),
        "attn2_to_k": (16, WIDTH),
        "attn2_to_out_0": (16, 16),
        "ff_net_0_proj": (128, 16),
    }.items()
}
TEXT_MODULES = {
    f"lora_te_text_model_encoder_layers_{layer}_{part}": shape
    for layer in range(2)
    for part, shape in {
        **{f"self_attn_{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")},
        "mlp_fc1": (2 * WIDTH, WIDTH),
    }.items()
}


def lora_bytes(
    seed: int = 0,
    *,
    modules: dict[str, tuple[int, int]] | None = None,
    rank: int = 2,
    epoch: int | None = None,
    strength: float = 0.5,
) -> bytes:
    """A LoRA file in kohya's form with random weights; `modules` maps names to (out, in)."""
    import torch
    from safetensors.torch import save

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, into) in (modules or {**UNET_MODULES, **TEXT_MODULES}).items():
        tensors[f"{name}.lora_down.weight"] = torch.randn((rank, into), generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn((out, rank), generator=generator) * strength
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    return save(tensors, {"ss_epoch": str(epoch)} if epoch is not None else {"ss_network_module": "networks.lora"})

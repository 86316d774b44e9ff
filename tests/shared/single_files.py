"""Random base models, and the single files they make by the published mapping of names.

The mapping is that of diffusers' scripts convert_diffusers_to_original_stable_diffusion.py and ..._sdxl.py, written
for any number of levels and layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from shared.clip_tokenizers import write_tokenizer

NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
WORDS = 49_408
_IN_RESNETS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def tiny_sd15(folder: Path, *, heads: int = 8, groups: int = 32, words: int = WORDS) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 with narrow layers: what else differs is in the arguments."""
    torch.manual_seed(0)
    write_tokenizer("sd15/tokenizer", folder / "clip")
    return StableDiffusionPipeline(
        vae=_vae(scaling_factor=0.18215),
        unet=UNet2DConditionModel(
            sample_size=64,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=2,
            cross_attention_dim=32,
            attention_head_dim=heads,
            norm_num_groups=groups,
        ),
        text_encoder=CLIPTextModel(_text(32, words=words)),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "clip"),
        scheduler=PNDMScheduler(**NOISE, set_alpha_to_one=False, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl(folder: Path, *, second_width: int = 64) -> StableDiffusionXLPipeline:
    """SDXL with narrow layers."""
    torch.manual_seed(1)
    tokenizers = {}
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(f"sdxl/{name}", folder / name)
        tokenizers[name] = CLIPTokenizer.from_pretrained(folder / name)
    return StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025, force_upcast=True),
        unet=UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64, 128),
            layers_per_block=2,
            transformer_layers_per_block=(1, 1, 2),
            cross_attention_dim=32 + second_width,
            attention_head_dim=(1, 1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=second_width + 6 * 8,
        ),
        text_encoder=CLIPTextModel(_text(32)),
        text_encoder_2=CLIPTextModelWithProjection(_text(second_width, act="gelu")),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
        add_watermarker=False,
        **tokenizers,
    )


def parts_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The models of a pipeline by name."""
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {name: part for name in names if (part := getattr(pipeline, name, None)) is not None}


def original_tensors(pipeline: Any) -> dict[str, Tensor]:
    """The tensors of a pipeline under the names of a single file."""
    parts = {name: part.state_dict() for name, part in parts_of(pipeline).items()}
    clip = "conditioner.embedders.0" if "text_encoder_2" in parts else "cond_stage_model"
    unet = {_in_resnet(name): tensor for name, tensor in parts["unet"].items()}
    tensors = _renamed(unet, _unet_names(pipeline.unet), "model.diffusion_model.")
    vae = _renamed(parts["vae"], _vae_names(len(pipeline.vae.config.block_out_channels)), "first_stage_model.")
    tensors |= {name: _as_convolution(name, tensor) for name, tensor in vae.items()}
    for name, tensor in parts["text_encoder"].items():
        tensors[f"{clip}.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    if "text_encoder_2" in parts:
        tensors |= _open_clip(parts["text_encoder_2"])
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def save_single_file(
    pipeline: Any, file: Path, metadata: dict[str, str] | None = None, **changed: Tensor | None
) -> Path:
    """Write the file, with `changed` tensors added, replaced or (None) left out."""
    tensors = original_tensors(pipeline) | changed
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, metadata)
    return file


def _vae(**settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        **settings,
    )


def _text(width: int, *, act: str = "quick_gelu", words: int = WORDS) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=max(1, width // 64),
        hidden_act=act,
        eos_token_id=2,
    )


def _renamed(state: dict[str, Tensor], names: list[tuple[str, str]], prefix: str) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for new, old in names:
            name = name.replace(old, new)
        renamed[prefix + name] = tensor
    return renamed


def _in_resnet(name: str) -> str:
    """These pieces also occur in transformer blocks, whose own names stay."""
    for old, new in _IN_RESNETS.items():
        name = name.replace(old, new) if "resnets" in name else name
    return name


def _unet_names(unet: UNet2DConditionModel) -> list[tuple[str, str]]:
    """(new, old) pieces of names, to be replaced in this order."""
    levels, layers = len(unet.config.block_out_channels), unet.config.layers_per_block
    names = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb.0.0", "add_embedding.linear_1"),
        ("label_emb.0.2", "add_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ]
    for level in range(levels):
        for layer in range(layers):
            names.append(
                (f"input_blocks.{(layers + 1) * level + layer + 1}.0.", f"down_blocks.{level}.resnets.{layer}.")
            )
            names.append(
                (f"input_blocks.{(layers + 1) * level + layer + 1}.1.", f"down_blocks.{level}.attentions.{layer}.")
            )
        for layer in range(layers + 1):
            names.append((f"output_blocks.{(layers + 1) * level + layer}.0.", f"up_blocks.{level}.resnets.{layer}."))
            names.append((f"output_blocks.{(layers + 1) * level + layer}.1.", f"up_blocks.{level}.attentions.{layer}."))
        names.append((f"input_blocks.{(layers + 1) * (level + 1)}.0.op.", f"down_blocks.{level}.downsamplers.0.conv."))
        behind = 2 if unet.config.up_block_types[level] == "CrossAttnUpBlock2D" else 1
        names.append((f"output_blocks.{(layers + 1) * level + layers}.{behind}.", f"up_blocks.{level}.upsamplers.0."))
    names += [
        ("middle_block.1.", "mid_block.attentions.0."),
        ("middle_block.0.", "mid_block.resnets.0."),
        ("middle_block.2.", "mid_block.resnets.1."),
    ]
    return names


def _vae_names(levels: int) -> list[tuple[str, str]]:
    names = [("nin_shortcut", "conv_shortcut"), ("norm_out", "conv_norm_out")]
    for level in range(levels):
        for layer in range(3):
            names.append((f"encoder.down.{level}.block.{layer}.", f"encoder.down_blocks.{level}.resnets.{layer}."))
            names.append(
                (f"decoder.up.{levels - 1 - level}.block.{layer}.", f"decoder.up_blocks.{level}.resnets.{layer}.")
            )
        names.append((f"down.{level}.downsample.", f"down_blocks.{level}.downsamplers.0."))
        names.append((f"up.{levels - 1 - level}.upsample.", f"up_blocks.{level}.upsamplers.0."))
    names += [("mid.block_1.", "mid_block.resnets.0."), ("mid.block_2.", "mid_block.resnets.1.")]
    names.append(("mid.attn_1.", "mid_block.attentions.0."))
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    return names + [(f"attn_1.{new}.", f"attn_1.{old}.") for new, old in attention.items()]


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    return tensor[..., None, None] if ".attn_1." in name and tensor.dim() == 2 else tensor


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [
        ("transformer.resblocks.", "text_model.encoder.layers."),
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        (".c_fc.", ".fc1."),
        (".c_proj.", ".fc2."),
        (".attn", ".self_attn"),
        ("ln_final.", "text_model.final_layer_norm."),
        ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ]
    renamed = _renamed(state, names, "conditioner.embedders.1.model.")
    tensors: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        if name.endswith("text_projection.weight"):
            tensors[name.removesuffix(".weight")] = tensor.T
        elif ".q_proj." in name:
            whole = torch.cat([renamed[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"])
            tensors[name.replace(".q_proj.", ".in_proj_")] = whole
        elif ".k_proj." not in name and ".v_proj." not in name:
            tensors[name] = tensor
    return tensors

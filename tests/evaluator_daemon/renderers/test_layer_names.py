"""The names of full-size models, on the meta device: no weights, so the true sizes cost nothing."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from evaluator_daemon.renderers.families import StableDiffusion, StableDiffusionXL
from evaluator_daemon.renderers.layer_names import LayerNames
from shared.safetensors_file import Family, LoraLayout, LoraModule
from tests.evaluator_daemon.lora_forms import diffusers_name

LAYERS = (
    *(f"attn{number}_to_{part}" for number in (1, 2) for part in ("q", "k", "v", "out_0")),
    "ff_net_0_proj",
    "ff_net_2",
)
SDXL_BLOCKS = {  # SGM's spatial transformers and their depths, as in sd_xl_base.yaml
    "input_blocks_4_1": 2,
    "input_blocks_5_1": 2,
    "input_blocks_7_1": 10,
    "input_blocks_8_1": 10,
    "middle_block_1": 10,
    "output_blocks_0_1": 10,
    "output_blocks_1_1": 10,
    "output_blocks_2_1": 10,
    "output_blocks_3_1": 2,
    "output_blocks_4_1": 2,
    "output_blocks_5_1": 2,
}


def text_modules(prefix: str, layers: int) -> list[str]:
    parts = (*(f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2")
    return [f"{prefix}_text_model_encoder_layers_{layer}_{part}" for layer in range(layers) for part in parts]


def unet_modules(blocks: dict[str, int]) -> list[str]:
    return [
        f"lora_unet_{block}_{inner}"
        for block, depth in blocks.items()
        for inner in (
            "proj_in",
            "proj_out",
            *(f"transformer_blocks_{index}_{layer}" for index in range(depth) for layer in LAYERS),
        )
    ]


def clip(layers: int, width: int, heads: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        projection_dim=projection,
    )


@pytest.fixture(scope="module")
def sdxl():
    """The public configuration of SDXL base 1.0."""
    with torch.device("meta"):
        return SimpleNamespace(
            unet=UNet2DConditionModel(
                sample_size=128,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(320, 640, 1280),
                transformer_layers_per_block=(1, 2, 10),
                cross_attention_dim=2048,
                attention_head_dim=(5, 10, 20),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            text_encoder=CLIPTextModel(clip(12, 768, 12, 768)),
            text_encoder_2=CLIPTextModelWithProjection(clip(32, 1280, 20, 1280)),
        )


@pytest.fixture(scope="module")
def sd15():
    """The public configuration of Stable Diffusion 1.5."""
    with torch.device("meta"):
        return SimpleNamespace(
            unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            text_encoder=CLIPTextModel(clip(12, 768, 12, 768)),
        )


def resolved(family, pipeline, modules: list[str]):
    names = LayerNames(family(pipeline).adaptable, family.kohya_prefixes)
    layout = LoraLayout(Family.KOHYA, tuple(LoraModule(name, 4, 2.0) for name in modules))
    return names, names.resolve(layout)


def test_the_722_and_72_and_192_modules_of_an_sdxl_lora_are_layers_of_the_model(sdxl):
    modules = [*unet_modules(SDXL_BLOCKS), *text_modules("lora_te1", 12), *text_modules("lora_te2", 32)]
    names, layers = resolved(StableDiffusionXL, sdxl, modules)
    assert None not in layers.values()
    assert len(set(layers.values())) == len(modules), "each its own"
    assert Counter(str(layer).partition(".")[0] for layer in layers.values()) == {
        "unet": 722,
        "text_encoder": 72,
        "text_encoder_2": 192,
    }
    assert names.left_out(set(map(str, layers.values()))) == set(), "and they are all that a usual LoRA has"


def test_sdxls_names_mean_what_diffusers_takes_them_for(sdxl):
    modules = unet_modules(SDXL_BLOCKS)
    _, layers = resolved(StableDiffusionXL, sdxl, modules)
    for module in modules:
        assert f"lora_{layers[module]}".replace(".", "_") == diffusers_name(module, sdxl.unet.config)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("lora_unet_input_blocks_0_0", "unet.conv_in"),
        ("lora_unet_input_blocks_1_0_in_layers_2", "unet.down_blocks.0.resnets.0.conv1"),
        ("lora_unet_input_blocks_3_0_op", "unet.down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_input_blocks_4_0_skip_connection", "unet.down_blocks.1.resnets.0.conv_shortcut"),
        ("lora_unet_middle_block_0_emb_layers_1", "unet.mid_block.resnets.0.time_emb_proj"),
        ("lora_unet_middle_block_2_out_layers_3", "unet.mid_block.resnets.1.conv2"),
        ("lora_unet_output_blocks_2_2_conv", "unet.up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_8_0_in_layers_2", "unet.up_blocks.2.resnets.2.conv1"),
        ("lora_unet_time_embed_2", "unet.time_embedding.linear_2"),
        ("lora_unet_label_emb_0_0", "unet.add_embedding.linear_1"),
        ("lora_unet_out_2", "unet.conv_out"),
        ("lora_unet_down_blocks_1_resnets_0_conv1", "unet.down_blocks.1.resnets.0.conv1"),
        ("lora_unet_output_blocks_9_0_in_layers_2", None),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", None),
    ],
)
def test_what_convolutional_loras_of_sdxl_adapt_beside(sdxl, module, layer):
    assert resolved(StableDiffusionXL, sdxl, [module])[1] == {module: layer}


def test_the_192_and_72_modules_of_a_stable_diffusion_lora_are_layers_of_the_model(sd15):
    blocks = {f"{side}_blocks_{block}_attentions_{index}": 1 for side, block, count in (
        ("down", 0, 2), ("down", 1, 2), ("down", 2, 2), ("up", 1, 3), ("up", 2, 3), ("up", 3, 3),
    ) for index in range(count)} | {"mid_block_attentions_0": 1}  # fmt: skip
    modules = [*unet_modules(blocks), *text_modules("lora_te", 12)]
    names, layers = resolved(StableDiffusion, sd15, modules)
    assert None not in layers.values()
    assert Counter(str(layer).partition(".")[0] for layer in layers.values()) == {"unet": 192, "text_encoder": 72}
    assert names.left_out(set(map(str, layers.values()))) == set()

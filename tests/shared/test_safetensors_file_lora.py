"""Which files are a LoRA that a loader applies as a whole."""

import struct

import pytest

from shared.errors import RefusedCheckpointError
from shared.safetensors_file import Family, LoraModule, lora_modules, read_checkpoint
from tests.shared.weight_files import RANK, Parts, file_with, kohya_modules, real_lora, saved


def weight(*shape: int, dtype: str = "F16") -> tuple[str, list[int], bytes]:
    count = 1
    for size in shape:
        count *= size
    return (
        dtype,
        list(shape),
        {"F16": b"\x00\x3c", "F32": b"\0\0\x80\x3f", "I16": b"\1\0", "C64": b"\0\0\x80\x3f" * 2}[dtype] * count,
    )


def alpha(value: float) -> tuple[str, list[int], bytes]:
    return "F16", [], struct.pack("<e", value)


def pair(module: str, down=(4, 8), up=(8, 4)) -> Parts:
    return {f"{module}.lora_down.weight": weight(*down), f"{module}.lora_up.weight": weight(*up)}


def peft_pair(module: str, down=(4, 8), up=(8, 4)) -> Parts:
    return {f"{module}.lora_A.weight": weight(*down), f"{module}.lora_B.weight": weight(*up)}


def layout_of(tensors: Parts, folder):
    return lora_modules(read_checkpoint(saved(folder / "a.safetensors", file_with(tensors)), folder))


def test_a_real_lora_gives_every_module_with_rank_and_alpha(tmp_path):
    layout = lora_modules(read_checkpoint(saved(tmp_path / "a.safetensors", real_lora()), tmp_path))
    assert layout.family is Family.KOHYA
    assert layout.modules == tuple(
        LoraModule(name, rank=RANK, alpha=2.0) for name in sorted(name for name, *_ in kohya_modules())
    )
    assert layout.ranks == {RANK}


@pytest.mark.parametrize(
    ("tensors", "family", "modules"),
    [
        pytest.param(
            pair("lora_unet_a") | pair("lora_te1_b") | pair("lora_te2_c", (2, 8), (8, 2))
            | {"lora_te1_b.alpha": alpha(1), "lora_te2_c.alpha": alpha(2), "lora_unet_a.alpha": alpha(4)},
            Family.KOHYA,
            [("lora_te1_b", 4, 1.0), ("lora_te2_c", 2, 2.0), ("lora_unet_a", 4, 4.0)],
            id="SDXL's two text encoders, mixed ranks",
        ),
        pytest.param(
            pair("lora_unet_conv", (4, 8, 3, 3), (8, 4, 1, 1)),
            Family.KOHYA,
            [("lora_unet_conv", 4, None)],
            id="a 3x3 convolution",
        ),
        pytest.param(
            peft_pair("unet.down_blocks.0.attentions.0.to_q") | peft_pair("text_encoder.text_model.k_proj"),
            Family.DIFFUSERS,
            [("text_encoder.text_model.k_proj", 4, None), ("unet.down_blocks.0.attentions.0.to_q", 4, None)],
            id="diffusers' names",
        ),
        pytest.param(
            {"unet.a.lora.down.weight": weight(4, 8), "unet.a.lora.up.weight": weight(8, 4)}
            | {"text_encoder.b.lora_linear_layer.down.weight": weight(2, 8)}
            | {"text_encoder.b.lora_linear_layer.up.weight": weight(8, 2)}
            | {"unet.c.processor.to_q_lora.down.weight": weight(1, 8)}
            | {"unet.c.processor.to_q_lora.up.weight": weight(8, 1)},
            Family.DIFFUSERS,
            [("text_encoder.b", 2, None), ("unet.a", 4, None), ("unet.c.processor.to_q_lora", 1, None)],
            id="diffusers' names before peft",
        ),
        pytest.param(
            peft_pair("base_model.model.model.layers.0.self_attn.q_proj"),
            Family.DIFFUSERS,
            [("base_model.model.model.layers.0.self_attn.q_proj", 4, None)],
            id="peft's names of a language model",
        ),
        pytest.param(
            pair("lora_unet_a") | {"lora_unet_a.alpha": ("BF16", [1], b"\x80\x42")},
            Family.KOHYA,
            [("lora_unet_a", 4, 64.0)],
            id="an alpha of shape [1] in bfloat16",
        ),
    ],
)  # fmt: skip
def test_known_families_are_read(tmp_path, tensors, family, modules):
    layout = layout_of(tensors, tmp_path)
    assert layout.family is family
    assert [(module.name, module.rank, module.alpha) for module in layout.modules] == modules


UNET = pair("lora_unet_a")
REFUSED = {
    "a full model": ("not_a_lora", {"model.diffusion_model.out.weight": weight(4, 4)}),
    "a LoHa": ("not_a_lora", {"lora_unet_a.hada_w1_a": weight(4, 4), "lora_unet_a.hada_w1_b": weight(4, 4)}),
    "a prefix no loader knows": ("not_a_lora", pair("lora_vae_a")),
    "a prefix without module": ("not_a_lora", pair("lora_unet_")),
    "a dot in kohya's module name": ("not_a_lora", pair("lora_unet_a.b")),
    "diffusers' names without a model": ("not_a_lora", peft_pair("down_blocks.0.to_q")),
    "one key more than a LoRA has": ("unknown_key", UNET | {"lora_unet_a.dora_scale": weight(8, 1)}),
    "a LoRA's key with a tail": ("unknown_key", UNET | {"lora_unet_a.alpha.old": alpha(1)}),
    "a text inversion beside it": ("unknown_key", UNET | {"emb_params": weight(2, 8)}),
    "kohya's and diffusers' names": ("mixed_families", UNET | peft_pair("unet.a")),
    "diffusers' plain down and up": (
        "not_a_lora",
        {"unet.a.down.weight": weight(4, 8), "unet.a.up.weight": weight(8, 4)},
    ),
    "a down without its up": ("half_pair", UNET | {"lora_unet_b.lora_down.weight": weight(4, 8)}),
    "an up without its down": ("half_pair", UNET | {"lora_unet_b.lora_up.weight": weight(8, 4)}),
    "an alpha for one module of two": ("half_pair", UNET | pair("lora_unet_b") | {"lora_unet_b.alpha": alpha(1)}),
    "an alpha without both": ("half_pair", UNET | {"lora_unet_b.alpha": alpha(1)}),
    "integers as weights": ("lora_dtype", UNET | {"lora_unet_a.lora_down.weight": weight(4, 8, dtype="I16")}),
    "complex weights": ("lora_dtype", UNET | {"lora_unet_a.lora_up.weight": weight(8, 4, dtype="C64")}),
    "vectors": ("lora_shape", pair("lora_unet_a", (4,), (4,))),
    "a matrix and a kernel": ("lora_shape", pair("lora_unet_a", (4, 8), (8, 4, 1, 1))),
    "a 3x3 kernel going up": ("lora_shape", pair("lora_unet_a", (4, 8, 3, 3), (8, 4, 3, 3))),
    "five dimensions": ("lora_shape", pair("lora_unet_a", (4, 8, 1, 1, 1), (8, 4, 1, 1, 1))),
    "rank zero": ("lora_shape", UNET | pair("lora_unet_b", (0, 8), (8, 0))),
    "another rank going up": ("rank_mismatch", pair("lora_unet_a", (4, 8), (8, 2))),
    "an alpha of zero": ("lora_alpha", UNET | {"lora_unet_a.alpha": alpha(0)}),
    "a negative alpha": ("lora_alpha", UNET | {"lora_unet_a.alpha": alpha(-1)}),
    "a matrix as alpha": ("lora_alpha", UNET | {"lora_unet_a.alpha": weight(2, 2)}),
    "an alpha of a dtype nobody uses": ("lora_alpha", UNET | {"lora_unet_a.alpha": ("U8", [], b"\4")}),
}


@pytest.mark.parametrize(("code", "tensors"), REFUSED.values(), ids=REFUSED.keys())
def test_anything_a_loader_would_drop_or_misread_is_refused(tmp_path, code, tensors):
    with pytest.raises(RefusedCheckpointError) as caught:
        layout_of(tensors, tmp_path)
    assert caught.value.code == code


def test_half_pairs_are_counted_and_the_first_are_named(tmp_path):
    halves = {f"lora_unet_{i}.lora_down.weight": weight(4, 8) for i in range(9)}
    with pytest.raises(RefusedCheckpointError, match=r"9 of 10 modules lack a part: 'lora_unet_0' has no up;"):
        layout_of(UNET | halves, tmp_path)


def refused_with(metadata: dict[str, str], tensors: Parts, folder) -> str | None:
    try:
        path = saved(folder / "a.safetensors", file_with(tensors, metadata))
        lora_modules(read_checkpoint(path, folder))
    except RefusedCheckpointError as error:
        return error.code
    return None


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        pytest.param({}, None, id="a trainer that leaves alpha out everywhere: alpha is the rank"),
        pytest.param({"ss_network_alpha": "2.0"}, "half_pair", id="sd-scripts', which writes one for every module"),
    ],
)
def test_a_file_without_any_alpha(tmp_path, metadata, code):
    assert refused_with(metadata, UNET, tmp_path) == code


@pytest.mark.parametrize(
    ("text", "alpha_or_code"),
    [
        pytest.param('{"unet.r": 4, "unet.lora_alpha": 8}', 8.0, id="one alpha"),
        pytest.param('{"text_encoder.lora_alpha": 8}', None, id="only the other model's"),
        pytest.param(
            '{"unet.lora_alpha": 4, "unet.alpha_pattern": {}, "unet.use_dora": false}', 4.0, id="patterns empty"
        ),
        pytest.param('{"unet.lora_alpha": 4, "unet.alpha_pattern": {"b": 2, "a": 3}}', 3.0, id="layers apart"),
        pytest.param('{"unet.lora_alpha": 4, "unet.alpha_pattern": {"xa": 2}}', 4.0, id="another layer's end"),
        pytest.param('{"unet.lora_alpha": 4, "unet.alpha_pattern": {"a.*": 2}}', "lora_alpha", id="an expression"),
        pytest.param('{"unet.lora_alpha": 4, "unet.alpha_pattern": {"a": 0}}', "lora_alpha", id="an alpha of zero"),
        pytest.param(
            '{"unet.lora_alpha": 4, "unet.use_rslora": true}', "lora_alpha", id="another scale than alpha/rank"
        ),
        pytest.param('{"unet.lora_alpha": "4"}', "lora_alpha", id="no number"),
        pytest.param("[4]", "lora_alpha", id="no object"),
        pytest.param("{", "lora_alpha", id="no JSON"),
    ],
)
def test_the_alpha_that_diffusers_keeps_in_the_metadata(tmp_path, text, alpha_or_code):
    metadata, tensors = {"lora_adapter_metadata": text}, peft_pair("unet.a")
    if isinstance(alpha_or_code, str):
        assert refused_with(metadata, tensors, tmp_path) == alpha_or_code
    else:
        layout = lora_modules(
            read_checkpoint(saved(tmp_path / "a.safetensors", file_with(tensors, metadata)), tmp_path)
        )
        assert layout.modules[0].alpha == alpha_or_code

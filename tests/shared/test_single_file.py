"""Base models in one file: what is read out of them, and what is refused, by their headers alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from shared.errors import SettingsError
from shared.model_folders import default_size, digest_model, digest_part, require_base_model, vae_factor
from shared.single_file import names, read_single_file
from shared.single_file.sizes import derive_configs, shipped_config
from tests.shared.single_files import original_tensors, parts_of, save_single_file, tiny_sd15, tiny_sdxl

UNET = "model.diffusion_model."
FIRST = f"{UNET}input_blocks.0.0.weight"
SECOND_PROJECTION = "conditioner.embedders.1.model.text_projection"
MAKERS = {"sd15": tiny_sd15, "sdxl": tiny_sdxl}
# The names and shapes that sd-scripts' own converters make of the published sizes; see original_layout.py.
PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "single_file_layouts.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> (the pipeline, its single file)."""
    made = {}
    for family, make in MAKERS.items():
        folder = tmp_path_factory.mktemp(family)
        pipeline = make(folder)
        made[family] = pipeline, save_single_file(pipeline, folder / "model.safetensors")
    return made


@pytest.fixture
def changed(models, tmp_path):
    """Write a family's file with other tensors; None leaves one out."""

    def change(family: str, metadata: dict[str, str] | None = None, **tensors: torch.Tensor | None) -> Path:
        return save_single_file(models[family][0], tmp_path / "changed.safetensors", metadata, **tensors)

    return change


@pytest.mark.parametrize("family", MAKERS)
def test_diffusers_loads_every_tensor_of_the_file_with_the_configuration_told_by_its_shapes(models, tmp_path, family):
    pipeline, file = models[family]
    single = read_single_file(file)
    assert single.family == family
    single.write_configs(tmp_path)
    kind = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[family]
    loaded = kind.from_single_file(str(file), config=str(tmp_path), local_files_only=True)
    used = 0
    for name, model in parts_of(pipeline).items():
        expected, found = model.state_dict(), getattr(loaded, name).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        used += sum(tensor.numel() for tensor in expected.values())
        settings = {"attention_head_dim", "num_attention_heads", "hidden_act", "scaling_factor", "sample_size"}
        for setting in settings - ({"sample_size"} if name == "vae" else set()):  # which nothing reads of a VAE
            assert listed(getattr(loaded, name), setting) == listed(model, setting)
    assert used == sum(tensor.numel() for tensor in load_file(file).values())
    for setting in ("beta_start", "beta_end", "beta_schedule", "steps_offset"):
        assert loaded.scheduler.config[setting] == pipeline.scheduler.config[setting]
    assert loaded.tokenizer("a photo of a cat").input_ids == pipeline.tokenizer("a photo of a cat").input_ids


def listed(model: torch.nn.Module, setting: str) -> object:
    """A setting of a model; JSON makes lists of tuples."""
    value = getattr(model.config, setting, None)
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("family", MAKERS)
def test_the_published_sizes_make_the_layout_that_sd_scripts_writes(family):
    shapes = names.unet_tensors(shipped_config(family, "unet/config.json"))
    shapes |= names.vae_tensors(shipped_config(family, "vae/config.json"))
    shapes |= names.clip_tensors(shipped_config(family, "text_encoder/config.json"), names.TEXT_ENCODER[family])
    if family == "sdxl":
        shapes |= names.open_clip_tensors(shipped_config(family, "text_encoder_2/config.json"), names.TEXT_ENCODER_2)
    lines = sorted(f"{name} {list(shape)}\n" for name, shape in shapes.items())
    found = {"tensors": len(lines), "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}
    assert found == PUBLISHED[family]


@pytest.mark.skipif(
    not {"SD_SCRIPTS_DIR", "SD_SCRIPTS_PYTHON"} <= os.environ.keys(), reason="SD_SCRIPTS_DIR, SD_SCRIPTS_PYTHON not set"
)
def test_the_recorded_layout_is_what_sd_scripts_makes_now():
    script = Path(__file__).with_name("original_layout.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [os.environ["SD_SCRIPTS_PYTHON"], script, os.environ["SD_SCRIPTS_DIR"]]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(run.stdout) == PUBLISHED


@pytest.mark.parametrize("family", MAKERS)
def test_shapes_of_the_published_sizes_tell_the_published_configuration(family):
    class Shaped:
        dtype = "F16"

        def __init__(self, shape: tuple[int, ...]) -> None:
            self.shape = shape

    parts = ["unet", "vae", "text_encoder"] + (["text_encoder_2"] if family == "sdxl" else [])
    published = {part: shipped_config(family, f"{part}/config.json") for part in parts}
    shapes = names.unet_tensors(published["unet"]) | names.vae_tensors(published["vae"])
    shapes |= names.clip_tensors(published["text_encoder"], names.TEXT_ENCODER[family])
    if family == "sdxl":
        shapes |= names.open_clip_tensors(published["text_encoder_2"], names.TEXT_ENCODER_2)
    derived = derive_configs(family, {name: Shaped(shape) for name, shape in shapes.items()})
    for part, config in published.items():
        assert {name: derived[part][name] for name in config} == config


def test_size_reduction_and_identity(models, tmp_path):
    pipeline, file = models["sd15"]
    require_base_model(file)
    assert default_size(file) == (64 * 4, 64 * 4)
    assert vae_factor(file) == 4
    assert digest_model(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    moved = shutil.copy(file, tmp_path / "renamed.safetensors")
    assert digest_model(moved) == digest_model(file), "the name is no part of it"
    same_vae = save_single_file(pipeline, tmp_path / "tuned.safetensors", **{FIRST: torch.zeros(32, 4, 3, 3)})
    assert digest_model(same_vae) != digest_model(file)
    assert digest_part(same_vae, "vae") == digest_part(file, "vae"), "cached latents serve both"
    quant = "first_stage_model.quant_conv.bias"
    other_vae = save_single_file(pipeline, tmp_path / "other.safetensors", **{quant: torch.ones(8)})
    assert digest_part(other_vae, "vae") != digest_part(file, "vae")


def test_a_link_to_the_file_will_do(models, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(models["sd15"][1])
    require_base_model(tmp_path / "link.safetensors")


@pytest.mark.parametrize(
    ("metadata", "tensors", "prediction"),
    [
        pytest.param({}, {}, None, id="nothing said"),
        pytest.param({"modelspec.prediction_type": "epsilon"}, {}, None, id="epsilon, as sd-scripts says it"),
        pytest.param({"modelspec.prediction_type": "v"}, {}, "v_prediction", id="v, as sd-scripts says it"),
        pytest.param({}, {"v_pred": torch.zeros(0)}, "v_prediction", id="the v_pred mark"),
    ],
)
def test_what_a_model_predicts_is_read_from_the_marks_of_its_trainer(changed, metadata, tensors, prediction):
    scheduler = read_single_file(changed("sd15", metadata or None, **tensors)).scheduler
    assert scheduler.get("prediction_type") == prediction


def test_the_mark_of_a_schedule_down_to_zero_signal_is_sdxls(changed):
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    scheduler = read_single_file(changed("sdxl", **marks)).scheduler
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True
    with pytest.raises(
        SettingsError, match="its mark ztsnr, a schedule down to zero signal, is SDXL's; put its config"
    ):
        require_base_model(changed("sd15", **marks))


def test_schedules_counters_and_averaged_weights_are_no_hindrance(changed):
    extra = {
        "alphas_cumprod": torch.zeros(1000),
        "sqrt_recipm1_alphas_cumprod": torch.zeros(1000),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "posterior_mean_coef1": torch.zeros(1000),
    }
    require_base_model(changed("sd15", **extra))
    require_base_model(changed("sdxl", **{"conditioner.embedders.1.model.logit_scale": torch.tensor(1.0)}))


def test_attention_of_the_vae_may_be_saved_as_linear_layers(changed, models, tmp_path):
    name = "first_stage_model.decoder.mid.attn_1.q.weight"
    tensor = original_tensors(models["sd15"][0])[name]
    file = changed("sd15", **{name: tensor[:, :, 0, 0].contiguous()})
    read_single_file(file).write_configs(tmp_path, ("vae",))
    vae = AutoencoderKL.from_single_file(str(file), config=str(tmp_path), subfolder="vae", local_files_only=True)
    loaded = vae.decoder.mid_block.attentions[0].to_q.weight
    assert torch.equal(loaded, models["sd15"][0].vae.decoder.mid_block.attentions[0].to_q.weight)


@pytest.mark.parametrize(
    ("family", "tensors", "message"),
    [
        pytest.param("sd15", {FIRST: None}, f"it lacks {FIRST}; name a whole model", id="a size cannot be told"),
        pytest.param(
            "sd15",
            {f"{UNET}middle_block.0.in_layers.0.bias": None, f"{UNET}out.0.bias": None},
            f"it lacks {UNET}middle_block.0.in_layers.0.bias and 1 more of ",
            id="two tensors missing",
        ),
        pytest.param(
            "sdxl",
            {"first_stage_model.quant_conv.weight": None},
            "it lacks first_stage_model.quant_conv.weight of",
            id="VAE",
        ),
        pytest.param(
            "sd15",
            {"control_model.zero.weight": torch.zeros(1)},
            "it holds control_model.zero.weight that its",
            id="ControlNet",
        ),
        pytest.param(
            "sd15", {f"{UNET}out.0.bias": torch.zeros(7)}, f"its {UNET}out.0.bias has shape [7], not [32]", id="shape"
        ),
        pytest.param(
            "sd15",
            {f"{UNET}out.0.bias": torch.zeros(32, dtype=torch.float64)},
            "is of F64; save it in one of",
            id="dtype",
        ),
        pytest.param(
            "sd15",
            {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(190, 32)},
            "its text_encoder reads 190 words and 77 tokens, not CLIP's 49408 and 77; put its configuration into",
            id="another vocabulary",
        ),
        pytest.param(
            "sdxl",
            {f"{UNET}label_emb.0.0.weight": torch.zeros(128, 999)},
            "its UNet takes 999 numbers of pooled text and 6 sizes, its text_encoder_2 makes 64",
            id="a width of the conditions that does not divide",
        ),
    ],
)
def test_a_file_that_is_not_exactly_a_model_of_its_family_is_refused(changed, family, tensors, message):
    file = changed(family, **tensors)
    with pytest.raises(SettingsError) as refusal:
        require_base_model(file)
    assert str(refusal.value).startswith(f"--base-model: {str(file)!r} will not do; ")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        pytest.param(
            {"cond_stage_model.model.ln_final.bias": 1}, "it is a Stable Diffusion 2 model; convert it", id="SD 2"
        ),
        pytest.param({"conditioner.embedders.0.model.ln_final.bias": 1}, "it is an SDXL refiner", id="refiner"),
        pytest.param({f"{UNET}double_blocks.0.img_attn.qkv.weight": 1}, "it is a FLUX model", id="FLUX"),
        pytest.param({f"{UNET}joint_blocks.0.x.weight": 1}, "it is a Stable Diffusion 3 model", id="SD 3"),
        pytest.param(
            {"cond_stage_model.transformer.embeddings.position_embedding.weight": 1, FIRST: 1},
            "it is an old merge, whose text encoder's names lack text_model.; save it again",
            id="an old merge",
        ),
        pytest.param({"lora_unet_mid_block.alpha": 1}, "it is a LoRA; name the base model", id="LoRA"),
        pytest.param({FIRST: 1}, "it is a UNet without its text encoder; name a whole model", id="UNet alone"),
        pytest.param({"down_blocks.0.weight": 1}, "its first tensor is 'down_blocks.0.weight'", id="diffusers names"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, tensors, message):
    save_file({name: torch.zeros(size) for name, size in tensors.items()}, tmp_path / "m.safetensors")
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        require_base_model(tmp_path / "m.safetensors")


def test_text_encoders_that_do_not_fit_are_refused(models, tmp_path):
    alike = save_single_file(tiny_sdxl(tmp_path, second_width=32), tmp_path / "alike.safetensors")
    with pytest.raises(SettingsError, match="both text encoders have width 32, which no SDXL model has"):
        require_base_model(alike)
    keys = [name for name in load_file(models["sd15"][1]) if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    wide = {name: torch.zeros(load_file(models["sd15"][1])[name].shape[0], 48) for name in keys}
    file = save_single_file(models["sd15"][0], tmp_path / "wide.safetensors", **wide)
    with pytest.raises(SettingsError, match="its UNet expects text of width 48, its text encoders make 32"):
        require_base_model(file)


def test_a_pickle_and_a_shortened_file_are_refused_with_the_remedy(models, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02")
    with pytest.raises(SettingsError, match=r"model\.ckpt' will not do; it is no \.safetensors file, and a pickle"):
        require_base_model(tmp_path / "model.ckpt")
    content = models["sd15"][1].read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[:-9])
    with pytest.raises(SettingsError, match=f"has {len(content) - 9} of {len(content)} bytes; copy that file again"):
        require_base_model(tmp_path / "short.safetensors")


def test_a_model_that_shapes_do_not_tell_brings_its_configuration_in_a_folder_beside_it(tmp_path):
    pipeline = tiny_sd15(tmp_path, heads=4, groups=16, words=49_500)
    file = save_single_file(pipeline, tmp_path / "odd.safetensors")
    with pytest.raises(
        SettingsError, match=r"reads 49500 words .*; put its configuration into .*odd\.config'?, a diffusers"
    ):
        require_base_model(file)
    alone = digest_model(file)
    own = tmp_path / "odd.config"
    pipeline.save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", own, ignore=shutil.ignore_patterns("*.safetensors"))
    single = read_single_file(file)
    assert single.configs["unet"]["attention_head_dim"] == 4
    assert single.configs["unet"]["norm_num_groups"] == 16
    (written := tmp_path / "written").mkdir()
    single.write_configs(written)
    loaded = StableDiffusionPipeline.from_single_file(str(file), config=str(written), local_files_only=True)
    assert loaded.unet.config.attention_head_dim == 4
    assert digest_model(file) != alone, "it decides the pictures, so it is part of the identity"
    (own / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(SettingsError, match=r"scheduler/scheduler_config\.json of its configuration cannot be read"):
        require_base_model(file)


def test_nothing_heavy_is_imported_to_look_at_a_file(models):
    code = "import sys; from pathlib import Path; from shared.model_folders import require_base_model as r; "
    code += "r(Path(sys.argv[1])); sys.exit(bool({'torch', 'numpy', 'diffusers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code, models["sdxl"][1]], check=True)

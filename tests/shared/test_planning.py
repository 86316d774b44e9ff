"""Plans: what goes into them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.devices import default_dtype, resolve_device
from shared.errors import SettingsError
from shared.model_folders import default_size, digest_model
from shared.planning import make_plan
from shared.prompts import draw_prompts


@pytest.fixture
def base_model(tmp_path: Path) -> Path:
    """The files of a diffusers folder that a plan looks at; the weights are any bytes."""
    folder = tmp_path / "base"
    write(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "X"]} | VAE)
    write(folder / "unet/config.json", {"sample_size": 16})
    write(folder / "vae/config.json", {"block_out_channels": [16, 32, 32]})
    for part in ("unet", "vae"):
        (folder / part / "diffusion_pytorch_model.safetensors").write_bytes(part.encode())
    return folder


VAE = {"vae": ["diffusers", "X"], "safety_checker": ["stable_diffusion", "X"]}


def write(path: Path, document: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def test_the_size_is_latents_times_the_vae_factor(base_model):
    assert default_size(base_model) == (64, 64)
    write(base_model / "unet/config.json", {"sample_size": [8, 24]})
    assert default_size(base_model) == (96, 32), "configurations say height first"


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        pytest.param(lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x"), True, id="weights"),
        pytest.param(lambda f: write(f / "vae/config.json", {"block_out_channels": [1]}), True, id="configuration"),
        pytest.param(lambda f: (f / "vae/tokenizer.txt").write_text("a"), True, id="a new file of a component"),
        pytest.param(lambda f: (f / "README.md").write_text("hello"), False, id="a read-me"),
        pytest.param(lambda f: (f / "unet/.lock").write_text(""), False, id="a hidden file"),
        pytest.param(lambda f: write(f / "safety_checker/config.json", {}), False, id="the safety checker"),
        pytest.param(lambda f: (f / "unet/model.bin").write_text(""), False, id="weights in a form not loaded"),
        pytest.param(lambda f: f.rename(f.with_name("moved")), False, id="the folder's name"),
    ],
)
def test_a_models_identity_is_what_a_loader_reads(base_model, change, differs):
    before = digest_model(base_model)
    change(base_model)
    folder = base_model if base_model.exists() else base_model.with_name("moved")
    assert (digest_model(folder) != before) is differs


def test_a_clip_folder_is_one_component(tmp_path):
    write(tmp_path / "config.json", {})
    (tmp_path / "model.safetensors").write_bytes(b"clip")
    assert len(digest_model(tmp_path, setting="--clip-model")) == 64


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"])
def test_a_folder_without_its_files_is_refused_by_the_flags_name(base_model, file):
    (base_model / file).unlink()
    with pytest.raises(SettingsError, match="--base-model"):
        make_plan(base_model=base_model, prompts=["a ball"], device="cpu")


def test_a_model_without_weights_is_refused(base_model):
    for weights in base_model.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(SettingsError, match="no weights"):
        digest_model(base_model)


def test_prompts_drawn_from_captions_depend_on_the_seed_only():
    captions = [f"a ball {i}" for i in range(20)]
    drawn = draw_prompts(captions, 8, seed=42)
    assert drawn == draw_prompts(reversed([*captions, *captions, " ", "a  ball 3 "]), 8, seed=42)
    assert len(set(drawn)) == 8
    assert drawn != draw_prompts(captions, 8, seed=43)
    assert sorted(draw_prompts(captions, 30, seed=42)) == sorted(captions)
    with pytest.raises(SettingsError, match="no captions"):
        draw_prompts(["", " "], 8, seed=42)


def test_the_plan_has_the_documented_defaults(base_model, tmp_path):
    plan = make_plan(base_model=base_model, prompts=["a", "b"], device="cpu", num_samples=4)
    assert (plan.steps, plan.sampler, plan.cfg_scale, plan.clip_skip) == (20, "dpmpp_2m_karras", 7.5, 1)
    assert (plan.width, plan.height, plan.batch_size, plan.base_seed, plan.dtype) == (64, 64, 4, 42, "float32")
    assert plan.base_digest == digest_model(base_model)
    assert "clip_digest" not in plan.scoring.values

    write(tmp_path / "clip/config.json", {})
    (tmp_path / "clip/model.safetensors").write_bytes(b"clip")
    with_clip = make_plan(base_model=base_model, prompts=["a"], device="cuda:1", clip_model=tmp_path / "clip")
    assert with_clip.dtype == "float16"
    assert with_clip.scoring.values["clip_digest"] == digest_model(tmp_path / "clip")


def test_a_named_device_is_taken_as_it_is():
    assert [resolve_device(name) for name in ("cpu", "cuda:1")] == ["cpu", "cuda:1"]
    assert default_dtype("auto") == default_dtype(resolve_device("auto"))

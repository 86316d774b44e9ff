"""The same base model and pictures, trained by sd-scripts' real train_network.py and by the native trainer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from optimizer_daemon.lora_training.metadata import SETTINGS, model_hashes
from tests.kohya.narrow_world import NarrowWorld
from tests.kohya.native_twin import OF_ITS_RUN, train_native
from tests.optimizer_daemon.lora_training.pictures import write_images
from tests.optimizer_daemon.lora_training.workshop import header_of

pytestmark = pytest.mark.slow

NAMES = ("lora_trial_1-000002.safetensors", "lora_trial_1.safetensors")


@pytest.fixture(scope="module")
def both(world: NarrowWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of checkpoints: sd-scripts' and ours."""
    theirs, ours = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("ours")
    world.train(theirs)
    train_native(world.settings(ours), ours)
    return theirs, ours


def test_the_same_files(both: tuple[Path, Path]):
    theirs, ours = both
    assert [path.name for path in sorted(theirs.glob("*.safetensors"))] == sorted(NAMES)
    assert [path.name for path in sorted(ours.glob("*.safetensors"))] == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tensors_by_name_shape_and_number_format(both: tuple[Path, Path], name: str):
    theirs, ours = (header_of(folder / name)[0] for folder in both)
    facts = [{key: (entry["dtype"], entry["shape"]) for key, entry in entries.items()} for entries in (theirs, ours)]
    assert facts[0] == facts[1]
    assert len(facts[0]) == 3 * (192 + 72)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_alpha(both: tuple[Path, Path], name: str):
    theirs, ours = (load_file(folder / name) for folder in both)
    alphas = {key: float(value) for key, value in theirs.items() if key.endswith(".alpha")}
    assert len(alphas) == 192 + 72
    assert alphas == {key: float(value) for key, value in ours.items() if key.endswith(".alpha")}
    assert set(alphas.values()) == {2.0}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_metadata_key_by_key(both: tuple[Path, Path], name: str):
    theirs, ours = (header_of(folder / name)[1] for folder in both)
    assert theirs.keys() - ours.keys() == {"ss_sd_scripts_commit_hash"}  # no commit of theirs trained ours
    assert ours.keys() - theirs.keys() == set()
    assert {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key] and key not in OF_ITS_RUN} == {}
    assert json.loads(theirs["ss_datasets"])[0]["resolution"] == [64, 64]
    assert {f"ss_{setting}" for setting in SETTINGS} <= theirs.keys()


@pytest.mark.parametrize("name", NAMES)
def test_both_hashes_are_of_the_data(both: tuple[Path, Path], name: str):
    for folder in both:
        _, metadata, data = header_of(folder / name)
        assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
        assert metadata["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8]  # the files are below 1 MiB


def test_a_single_file_is_known_by_the_same_hashes(world: NarrowWorld, tmp_path: Path):
    file = world.single_file(tmp_path / "narrow_base.safetensors")
    world.train(tmp_path / "out", pretrained_model_name_or_path=str(file), max_train_epochs=1)
    entries, metadata, _ = header_of(tmp_path / "out" / NAMES[1])
    assert len(entries) == 3 * (192 + 72)
    assert model_hashes(file) == {key: metadata[key] for key in ("ss_sd_model_hash", "ss_new_sd_model_hash")}


def test_the_same_metadata_of_buckets_repeats_and_caption_rules(world: NarrowWorld, tmp_path: Path):
    images = write_images(tmp_path / "images", {"a": "red, soft", "b": "blue, soft"}, size=(200, 120))
    write_images(images, {"c": "green", "d": "grey"}, size=(140, 230), seed=1)
    write_images(tmp_path / "more", {"e": "white"}, size=(128, 128), seed=2)
    dataset = tmp_path / "dataset.toml"
    dataset.write_text(
        "[general]\ncaption_extension = '.txt'\nenable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 256\n"
        "bucket_reso_steps = 64\n[[datasets]]\nresolution = [128, 128]\nbatch_size = 2\n"
        f"[[datasets.subsets]]\nimage_dir = '{images}'\nnum_repeats = 2\nshuffle_caption = true\nkeep_tokens = 1\n"
        "flip_aug = true\ncaption_prefix = 'a toy,'\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'more'}'\nclass_tokens = 'toy'\n"
    )
    changes = {
        "dataset_config": str(dataset),
        "max_train_epochs": 1,
        "min_timestep": 100,
        "max_timestep": 900,
        "debiased_estimation_loss": True,
        "loss_type": "huber",
        "gradient_accumulation_steps": 2,
        "network_dropout": 0.1,
    }
    world.train(tmp_path / "theirs", **changes)
    train_native(world.settings(tmp_path / "ours") | changes, tmp_path / "ours")
    theirs, ours = (header_of(tmp_path / folder / NAMES[1])[1] for folder in ("theirs", "ours"))
    assert json.loads(theirs["ss_datasets"])[0]["bucket_info"]["mean_img_ar_error"] > 0.01
    assert theirs.keys() - ours.keys() == {"ss_sd_scripts_commit_hash"}
    assert {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key] and key not in OF_ITS_RUN} == {}


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::FutureWarning:transformers")
def test_diffusers_renders_with_every_module_of_both(world: NarrowWorld, both: tuple[Path, Path]):
    import torch
    from diffusers import StableDiffusionPipeline
    from peft.tuners.lora import LoraLayer

    def render(pipeline: StableDiffusionPipeline):
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
        return pipeline("a red ball", generator=generator, **call).images

    pipeline = StableDiffusionPipeline.from_pretrained(world.base, local_files_only=True, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    plain = render(pipeline)
    for folder in both:
        pipeline.load_lora_weights(folder, weight_name=NAMES[1], adapter_name=folder.name)
        parts = (pipeline.unet, pipeline.text_encoder)
        applied = [sum(isinstance(module, LoraLayer) for module in part.modules()) for part in parts]
        assert applied == [192, 72]
        assert (render(pipeline) - plain).abs().max() > 1e-4
        pipeline.unload_lora_weights()

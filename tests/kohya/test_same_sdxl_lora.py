"""The same SDXL and pictures, trained by sd-scripts' real sdxl_train_network.py and by the native trainer."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from shared.clip_tokenizers import kohya_tokenizer_folder
from tests.kohya.narrow_sdxl import make_sdxl_checkout, save_narrow_sdxl
from tests.kohya.narrow_world import training_settings, write_pictures
from tests.kohya.native_twin import OF_ITS_RUN, train_native
from tests.optimizer_daemon.lora_training.workshop import header_of

pytestmark = pytest.mark.slow

NAME = "lora_trial_1.safetensors"


@pytest.fixture(scope="module")
def both(sd_scripts: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders with one checkpoint of two steps: sd-scripts' and ours."""
    directory, python = sd_scripts
    root = tmp_path_factory.mktemp("sdxl")
    checkout = make_sdxl_checkout(directory, root / "sd-scripts")
    base, dataset = save_narrow_sdxl(root / "narrow_sdxl"), write_pictures(root)
    (root / "theirs").mkdir()
    changes = {"max_train_epochs": 1, "tokenizer_cache_dir": str(kohya_tokenizer_folder(root / "tokenizers"))}
    config = root / "theirs/train_config.toml"
    values = training_settings(base, dataset, root / "theirs") | changes
    config.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items()), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, "sdxl_train_network.py", "--config_file", str(config)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    train_native(training_settings(base, dataset, root / "ours") | changes, root / "ours")
    return root / "theirs", root / "ours"


def test_the_same_tensors_by_name_shape_and_number_format(both: tuple[Path, Path]):
    theirs, ours = (header_of(folder / NAME)[0] for folder in both)
    facts = [{key: (entry["dtype"], entry["shape"]) for key, entry in entries.items()} for entries in (theirs, ours)]
    assert facts[0] == facts[1]
    assert len(facts[0]) == 3 * (722 + 72 + 192)


def test_the_same_alphas_and_the_same_modules_that_nothing_reaches(both: tuple[Path, Path]):
    """Of the first text encoder the last layer's output is not used, so that its modules stay as they were drawn."""
    weights = [load_file(folder / NAME) for folder in both]
    alphas = [{key: float(value) for key, value in found.items() if key.endswith(".alpha")} for found in weights]
    assert alphas[0] == alphas[1]
    idle = [{key for key, value in found.items() if "lora_up" in key and not value.any()} for found in weights]
    assert idle[0] == idle[1]
    assert {key.rpartition("layers_")[2].partition("_")[0] for key in idle[0]} == {"11"}


def test_the_same_metadata_key_by_key(both: tuple[Path, Path]):
    theirs, ours = (header_of(folder / NAME)[1] for folder in both)
    assert theirs.keys() - ours.keys() == {"ss_sd_scripts_commit_hash"}
    assert ours.keys() - theirs.keys() == set()
    different = {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}
    assert different.keys() - OF_ITS_RUN == {"sshs_legacy_hash"}, "of weights, in files above 1 MiB"
    assert theirs["ss_base_model_version"] == "sdxl_base_v1-0"


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers", "ignore::FutureWarning:transformers")
def test_diffusers_applies_every_module_of_both(both: tuple[Path, Path]):
    from diffusers import StableDiffusionXLPipeline
    from peft.tuners.lora import LoraLayer

    base = both[0].parent / "narrow_sdxl"
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, local_files_only=True, add_watermarker=False)
    for folder in both:
        pipeline.load_lora_weights(folder, weight_name=NAME, adapter_name=folder.name)
        parts = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
        assert [sum(isinstance(module, LoraLayer) for module in part.modules()) for part in parts] == [722, 72, 192]
        pipeline.unload_lora_weights()

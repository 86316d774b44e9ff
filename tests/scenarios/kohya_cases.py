"""What a start of the kohya trainer says to bad input.

sd-scripts themselves are not needed for it: their place takes a folder with a train_network.py that knows some options.
tests/kohya runs such refusals against the real ones.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import venv
from collections.abc import Callable
from pathlib import Path

from examples.tiny_world.paths import BASE_MODEL
from optimizer_daemon.search.load import load_space
from optimizer_daemon.settings import OptimizerSettings, load_optimizer_settings
from optimizer_daemon.stages import load_stages
from optimizer_daemon.start_checks import check_inputs
from optimizer_daemon.trainers import TRAINERS
from shared.errors import UserError
from shared.layout import StudyLayout
from shared.settings import add_settings_flags
from tests.scenarios.bad_input import Case, World

Change = Callable[[World], object]

# The options that a training of the space in lab.py is written with.
_TEXTS = "pretrained_model_name_or_path dataset_config output_dir output_name logging_dir network_module save_precision"
_NAMES = f"{_TEXTS} save_model_as mixed_precision tokenizer_cache_dir optimizer_type"
_SWITCHES = "save_state sdpa gradient_checkpointing cache_latents cache_latents_to_disk"
_NUMBERS = "save_every_n_epochs save_last_n_epochs_state max_data_loader_n_workers validation_seed clip_skip seed"
SCRIPT = f"""
import argparse

def setup_parser():
    parser = argparse.ArgumentParser()
    for name in "{_NAMES}".split():
        parser.add_argument(f"--{{name}}")
    for name in "{_SWITCHES}".split():
        parser.add_argument(f"--{{name}}", action="store_true")
    for name in "{_NUMBERS} network_dim max_train_epochs".split():
        parser.add_argument(f"--{{name}}", type=int)
    for name in "learning_rate network_alpha".split():
        parser.add_argument(f"--{{name}}", type=float)
    parser.add_argument("--text_encoder_lr", type=float, nargs="*")
    parser.add_argument("--loss_type", choices=["l2", "huber"])
    return parser
"""


def kohya(
    table: str = "", change: Change = lambda world: None, python: str = "venv/bin/python", script: str = SCRIPT
) -> Callable[[World], list[str]]:
    """A study that kohya is to train, with this [trainer.kohya] table, after `change`."""

    def spoil(world: World) -> list[str]:
        checkout = world.folder / "sd-scripts"
        (checkout / "library").mkdir(parents=True)
        (checkout / "train_network.py").write_text(script)
        for name in ("__init__", "train_util", "config_util"):
            (checkout / "library" / f"{name}.py").write_text("")
        base = saved_by_transformers_4(world)
        with world.study_file.open("a") as file:
            file.write(f"[trainer.kohya]\n{table}\n")
        change(world)
        if python == "venv/bin/python":
            venv.create(world.folder / "venv", symlinks=True, with_pip=False)
        named = world.folder / python  # an absolute one replaces the folder
        return world.optimizer("--sd-scripts-dir", checkout, "--trainer-python", named, "--base-model", base)

    return spoil


def saved_by_transformers_4(world: World) -> Path:
    """The tiny base model with the level in its text encoder's names that kohya's transformers expects."""
    base = world.model(BASE_MODEL)
    (file,) = (base / "text_encoder").glob("*.safetensors")
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    named = {name if name == "__metadata__" else f"text_model.{name}": entry for name, entry in header.items()}
    text = json.dumps(named).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return base


def refusal(words: list[str]) -> str:
    """Return what the check before a study says to this command; nothing when it finds no fault."""
    parser = argparse.ArgumentParser()
    add_settings_flags(parser, OptimizerSettings)
    settings = load_optimizer_settings(parser.parse_args(words[words.index("run") + 1 :]))
    assert settings.output_dir is not None
    trainer, space = TRAINERS.load(settings.trainer_name), load_space(settings.search_space)
    try:
        check_inputs(settings, StudyLayout(settings.output_dir), load_stages(space, None, None), trainer)
    except UserError as error:
        return f"error: {' '.join(str(error).split())}"
    return ""


def in_dataset(table: str, line: str) -> Change:
    return lambda world: world.replace(world.dataset, table, f"{table}\n{line}")


def wrapper(text: str) -> Change:
    """A program bin/python that is a script."""

    def change(world: World) -> None:
        program = world.folder / "bin/python"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)

    return change


def without_captions(world: World) -> None:
    (world.pictures / "01_red_cube.txt").unlink()


def with_velocity(world: World) -> None:
    file = world.folder / "model/scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))


def with_the_model_of_transformers_5(world: World) -> None:
    for file in (BASE_MODEL / "text_encoder").glob("*.safetensors"):
        (world.folder / "model/text_encoder" / file.name).write_bytes(file.read_bytes())


KOHYA = [
    Case(
        "kohya: no checkout",
        ("--sd-scripts-dir: None will not do; name the checkout of kohya-ss/sd-scripts, or set SD_SCRIPTS_DIR",),
        lambda world: world.optimizer("--trainer", "kohya"),
    ),
    Case(
        "kohya: a folder that is no checkout",
        ("--sd-scripts-dir: ", "it holds no train_network.py"),
        lambda world: world.optimizer("--sd-scripts-dir", world.pictures),
    ),
    Case(
        "kohya: another family than the base model's",
        ("--model-family: 'sdxl' will not do; the base model ", " is sd15"),
        lambda world: [*kohya()(world), "--model-family", "sdxl"],
    ),
    Case(
        "kohya: no environment of its own",
        ("--trainer-python: ", "there is no such program", "transformers 4.54.1"),
        kohya(python="nowhere/python"),
    ),
    Case(
        "kohya: a Python with transformers 5",
        ("--trainer-python: ", "it has transformers 5.", "text-encoder keys that nothing else reads", "4.54.1"),
        kohya(python=sys.executable),
    ),
    Case(
        "kohya: a Python without sd-scripts' packages",
        ("--trainer-python: ", "it cannot import train_network.py (ModuleNotFoundError: No module named 'diffusers')"),
        kohya(script="import diffusers\n"),
    ),
    Case(
        "kohya: a program that is no Python",
        ("--trainer-python: ", "it cannot run train_network.py, it said: hello; name kohya's Python"),
        kohya(change=wrapper("echo hello"), python="bin/python"),
    ),
    Case(
        "kohya: a script around accelerate launch as Python",
        ("--trainer-python: ", "through a launcher, and a stop would reach that and leave the training alive"),
        kohya(change=wrapper('exec accelerate launch "$@"'), python="bin/python"),
    ),
    Case(
        "kohya: a script that stays in front of the Python",
        ("--trainer-python: ", "through a launcher, and a stop would reach that and leave the training alive"),
        kohya(change=wrapper(f'"{sys.base_prefix}/bin/python3" "$@"; exit $?'), python="bin/python"),
    ),
    Case(
        "kohya: accelerate launch in the table",
        ("[trainer.kohya] num_processes: it belongs to accelerate launch, which leaves the training alive when",),
        kohya("num_processes = 1"),
    ),
    Case(
        "kohya: an unknown key",
        ("[trainer.kohya] network_dimm: sd-scripts unknown have no such option; did you mean 'network_dim'?; take it",),
        kohya("network_dimm = 8"),
    ),
    Case(
        "kohya: a value of another type",
        ("[trainer.kohya] max_data_loader_n_workers: '2' will not do; a whole number is expected",),
        kohya('max_data_loader_n_workers = "2"'),
    ),
    Case(
        "kohya: none of the choices",
        ("[trainer.kohya] loss_type: 'l1' will not do; one of l2, huber is expected",),
        kohya('loss_type = "l1"'),
    ),
    Case(
        "kohya: a checkout without an option that is always written",
        ("--sd-scripts-dir: ", "its version unknown has no option sdpa; use a newer checkout"),
        kohya(script=SCRIPT.replace(" sdpa", "")),
    ),
    Case(
        "kohya: settings that its own functions refuse",
        ("sd-scripts refuse the settings: AttributeError: ", "correct the search space or [trainer.kohya]"),
        kohya(),
    ),
    Case(
        "kohya: checkpoints of no epoch",
        (
            "[trainer.kohya] save_every_n_epochs: 0 will not do, for sd-scripts divide by it",
            "pass --save-every-n-epochs",
        ),
        kohya("save_every_n_epochs = 0"),
    ),
    Case(
        "kohya: a key of the study",
        ("[trainer.kohya] output_dir: the study itself decides it; take it out",),
        kohya('output_dir = "/tmp"'),
    ),
    Case(
        "kohya: a validation split in a subset",
        ("dataset.toml line 7: datasets[0].subsets[0].validation_split: ", "move it up into [[datasets]]"),
        kohya(change=in_dataset("[[datasets.subsets]]", "validation_split = 0.5")),
    ),
    Case(
        "kohya: a metadata file",
        ("datasets[0].subsets[0].metadata_file: only pictures with caption files can be trained on here",),
        kohya(change=in_dataset("[[datasets.subsets]]", "metadata_file = 'meta.json'")),
    ),
    Case(
        "kohya: a folder twice",
        ("datasets[0].subsets[1].image_dir: 'pictures' occurs twice", "use num_repeats"),
        kohya(change=in_dataset('image_dir = "pictures"', '[[datasets.subsets]]\nimage_dir = "pictures"')),
    ),
    Case(
        "kohya: pictures that change in every epoch, and cached latents",
        ("dataset.toml line 2: random_crop: it changes each picture anew", "cache_latents = false in [trainer.kohya]"),
        kohya(change=in_dataset("[general]", "random_crop = true")),
    ),
    Case(
        "kohya: an option that changes pictures in every epoch, and cached latents",
        ("[trainer.kohya] random_crop: it changes each picture anew", "cache_latents = false in [trainer.kohya]"),
        kohya("random_crop = true"),
    ),
    Case(
        "kohya: a drawn setting that changes pictures in every epoch, and cached latents",
        ("--search-space: color_aug: it changes each picture anew", "cache_latents = false in [trainer.kohya]"),
        kohya(
            change=lambda world: world.space.write_text(
                world.space.read_text() + '[parameters.color_aug]\ntype = "categorical"\nchoices = [false, true]\n'
            )
        ),
    ),
    Case(
        "kohya: the other spelling of an option",
        ("[trainer.kohya] caption_extention: its other spelling, caption_extension, is the one that counts",),
        kohya("caption_extention = 'txt'"),
    ),
    Case(
        "kohya: steps of buckets that it refuses only when it trains",
        ("dataset.toml line 3: datasets[0].bucket_reso_steps: 32 will not do", "kohya trains sd15 at multiples of 64"),
        kohya(change=in_dataset("[general]", "enable_bucket = true\nbucket_reso_steps = 32")),
    ),
    Case(
        "kohya: a picture without a caption",
        ("01_red_cube.png: it has no caption file (.txt)", "write one, or set caption_extension"),
        kohya(change=without_captions),
    ),
    Case(
        "kohya: an empty caption file",
        ("01_red_cube.txt: the caption file is empty, at which kohya stops; write a caption",),
        kohya(change=lambda world: (world.pictures / "01_red_cube.txt").write_text("")),
    ),
    Case(
        "kohya: a base model saved by transformers 5",
        ("--base-model: ", "no text_model.", "draw its weights at random; name a single-file checkpoint"),
        kohya(change=with_the_model_of_transformers_5),
    ),
    Case(
        "kohya: a base model that predicts the velocity",
        ("--base-model: ", "it predicts the velocity, which kohya must be told: set v_parameterization = true"),
        kohya(change=with_velocity),
    ),
    Case(
        "kohya: an optimizer argument without quotes",
        ("[trainer.kohya] optimizer_args: mode=min will not do", "a text needs quotes"),
        kohya('optimizer_args = ["mode=min"]'),
    ),
]

BY_COMMAND = [
    case
    for case in KOHYA
    if case.sentence.removeprefix("kohya: ")
    in (
        "an unknown key",
        "a Python with transformers 5",
        "checkpoints of no epoch",
        "a validation split in a subset",
        "a script around accelerate launch as Python",
    )
]
"""Those that the real command is run on, a few seconds each; the others are tried on the check alone."""

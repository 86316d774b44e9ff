"""Every kind of bad input, and what the command has to say to it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from examples.tiny_world.paths import BASE_MODEL, CLIP_MODEL, DATASET_TOML
from shared.layout import StudyLayout
from tests.scenarios.bad_input import Case, World
from tests.scenarios.command_cases import BY_PROGRAM
from tests.scenarios.kohya_cases import BY_COMMAND

Spoil = Callable[[World], list[str]]
TOKEN_EMBEDDING = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


def flags(*words: object) -> Spoil:
    """The optimizer with these flags."""
    return lambda world: world.optimizer(*words)


def native(table: str) -> Spoil:
    """The optimizer with this [trainer.native] table."""

    def spoil(world: World) -> list[str]:
        with world.study_file.open("a") as file:
            file.write(f"[trainer.native]\n{table}\n")
        return world.optimizer()

    return spoil


def watch(*words: object) -> Spoil:
    """The view of the study, with these flags."""
    return lambda world: world.evaluator(*words, verb="watch")


def edited(name: str, old: str, new: str, command: Callable[[World], list[str]] = World.optimizer) -> Spoil:
    """A TOML file of the world with another text in place of `old`."""

    def spoil(world: World) -> list[str]:
        world.replace(getattr(world, name), old, new)
        return command(world)

    return spoil


def trained_with(table: str) -> Spoil:
    """The study file with these lines in its [trainer.native] table."""

    def spoil(world: World) -> list[str]:
        world.study_file.write_text(f"{world.study_file.read_text()}[trainer.native]\n{table}\n")
        return world.optimizer()

    return spoil


def picture(change: Callable[[Path, Path], object]) -> Spoil:
    """The data set after `change(picture, its caption file)`."""

    def spoil(world: World) -> list[str]:
        file = world.pictures / "01_red_cube.png"
        change(file, file.with_suffix(".txt"))
        return world.optimizer()

    return spoil


def model(flag: str, source: Path, change: Callable[[Path], object], name: str = "optimizer") -> Spoil:
    """A copy of a model folder after `change(folder)`."""

    def spoil(world: World) -> list[str]:
        folder = world.model(source)
        change(folder)
        return list(getattr(world, name)(flag, folder))

    return spoil


def base_model_of(pipeline: str) -> Spoil:
    """The evaluator alone, on a base model whose index names this pipeline."""

    def spoil(world: World) -> list[str]:
        world.study.mkdir()
        (world.folder / "p.txt").write_text("a ball")
        in_json("model_index.json", _class_name=pipeline)(folder := world.model(BASE_MODEL))
        return world.evaluator("--base-model", folder, "--prompts", world.folder / "p.txt")

    return spoil


def in_json(file: str, **changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(document | changes))

    return change


def cut(file: str) -> Callable[[Path], object]:
    """Half of the file is lost."""
    return lambda folder: (folder / file).write_bytes(
        (folder / file).read_bytes()[: (folder / file).stat().st_size // 2]
    )


def written(name: str, text: str | bytes, *words: object) -> Spoil:
    """A file of this content; `{}` in a flag stands for its path."""

    def spoil(world: World) -> list[str]:
        file = world.folder / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return world.optimizer(*[str(word).replace("{}", str(file)) for word in words])

    return spoil


def one_tensor(name: str) -> bytes:
    """A whole safetensors file that holds one number under this name."""
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


def variable(name: str, value: str) -> Spoil:
    def spoil(world: World) -> list[str]:
        world.variables[name] = value
        return world.optimizer()

    return spoil


def read_only(world: World) -> list[str]:
    """The study folder on a file system that is mounted read-only."""
    world.study.mkdir()
    script = f'mount -t tmpfs -o ro tmpfs {world.study} && exec "$@"'
    return [*world.unshare, "sh", "-c", script, "sh", *world.optimizer()]


def held(lock: str, command: Callable[[World], list[str]]) -> Spoil:
    def spoil(world: World) -> list[str]:
        world.hold(world.study / lock)
        return command(world)

    return spoil


def run_json(change: Callable[[str], str], command: Callable[[World], list[str]] = World.optimizer) -> Spoil:
    """run.json after `change(its text)`, its checksum left as it was."""

    def spoil(world: World) -> list[str]:
        file = world.study / "run.json"
        file.write_text(change(file.read_text()))
        return command(world)

    return spoil


def with_newer_schema(world: World) -> None:
    """run.json as a later program would write it: whole, checksum and all."""
    file = world.study / "run.json"
    body = file.read_text().replace('"schema_version": 1', '"schema_version": 2').rpartition('  "checksum"')[0]
    file.write_text(f'{body}  "checksum": "sha256:{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n')


def after(change: Callable[[World], object], command: Callable[[World], list[str]] = World.optimizer) -> Spoil:
    def spoil(world: World) -> list[str]:
        change(world)
        return command(world)

    return spoil


def database(world: World) -> Path:
    return StudyLayout(world.study).database


def trial(world: World) -> None:
    (world.study / "trial_0001").mkdir()
    (world.study / "trial_0001" / "params.json").write_text("{}")


UNREADABLE = "could not be read (No such file or directory); correct the path"
OPTIMIZER = 'choices = ["AdamW"]'

DATA = [
    Case("data set: no such TOML", ("nowhere.toml", UNREADABLE), flags("--dataset-config", "nowhere.toml")),
    Case(
        "data set: none named",
        ("--dataset-config: None", "set dataset_config in [optimizer]"),
        edited("study_file", 'dataset_config = "dataset.toml"\n', ""),
    ),
    Case(
        "data set: no such image folder",
        ("subsets[0].image_dir", "photos is no folder"),
        edited("dataset", '"pictures"', '"photos"'),
    ),
    Case(
        "data set: an empty image folder",
        ("image_dir", "pictures holds no image (.bmp"),
        after(lambda world: (shutil.rmtree(world.pictures), world.pictures.mkdir())),
    ),
    Case(
        "data set: an image without caption",
        ("01_red_cube.png has no caption: 01_red_cube.txt is missing", "write it"),
        picture(lambda image, caption: caption.unlink()),
    ),
    Case(
        "data set: an empty caption",
        ("01_red_cube.txt is empty", "into its first line"),
        picture(lambda image, caption: caption.write_text("")),
    ),
    Case(
        "data set: a caption that is no UTF-8",
        ("01_red_cube.txt: byte 0 is not UTF-8", "save the caption"),
        picture(lambda image, caption: caption.write_bytes(b"\xff\xfe")),
    ),
    Case(
        "data set: half a PNG",
        ("01_red_cube.png is no readable image", "mend or remove it"),
        picture(lambda image, caption: image.write_bytes(image.read_bytes()[:-600])),
    ),
    Case(
        "data set: a text named .png",
        ("01_red_cube.png is no readable image", "mend or remove it"),
        picture(lambda image, caption: image.write_text("hello")),
    ),
    Case(
        "data set: a misspelt key",
        ("dataset.toml line 5: datasets[0].batchsize", "did you mean 'batch_size'?"),
        edited("dataset", "batch_size = 2", "batchsize = 2"),
    ),
    Case(
        "data set: a wrong value",
        ("datasets[0].batch_size: 0 will not do",),
        edited("dataset", "batch_size = 2", "batch_size = 0"),
    ),
    Case(
        "data set: no TOML",
        ("dataset.toml: not valid TOML", "at line 4"),
        edited("dataset", "resolution = 64", "resolution = "),
    ),
    Case(
        "data set: no table",
        ("there is no [[datasets]] table; add one",),
        after(lambda world: world.dataset.write_text("[general]\n")),
    ),
    Case(
        "data set: a size the model cannot take",
        ("datasets[0].resolution: (62, 62) will not do", "multiples of"),
        edited("dataset", "resolution = 64", "resolution = 62"),
    ),
    Case(
        "data set: a feature that is not there",
        ("subsets[0].random_crop: True will not do", "take the key out"),
        edited("dataset", 'image_dir = "pictures"', 'image_dir = "pictures"\nrandom_crop = true'),
    ),
    Case(
        "data set: a validation split of a folder",
        ("subsets[0].validation_split: this key does not belong there", "move it to [[datasets]]"),
        edited("dataset", 'image_dir = "pictures"', 'image_dir = "pictures"\nvalidation_split = 0.1'),
    ),
    Case(
        "data set: regularisation pictures alone",
        ("every picture is for regularisation", "add a subset without is_reg"),
        edited("dataset", 'image_dir = "pictures"', 'image_dir = "pictures"\nis_reg = true'),
    ),
    Case(
        "data set: a validation split of nothing",
        ("datasets[0].validation_split: 0.001 will not do", "rounds to no picture"),
        edited("dataset", "batch_size = 2", "batch_size = 2\nvalidation_split = 0.001"),
    ),
]

SETTINGS = [
    Case(
        "study file: none there",
        ("--config: 'nowhere.toml'", "name a readable TOML file"),
        lambda world: [*world.optimizer(), "--config", "nowhere.toml"],
    ),
    Case(
        "study file: a misspelt key",
        ("study.toml line 5: searchspace: 'space.toml'", "did you mean search_space?"),
        edited("study_file", "search_space", "searchspace"),
    ),
    Case(
        "study file: a wrong type",
        ("study.toml [optimizer] num_samples: 'two'", "valid integer", "pictures per"),
        edited("study_file", "num_samples = 2", 'num_samples = "two"'),
    ),
    Case(
        "study file: true for a number",
        ("study.toml [optimizer] num_samples: True", "not true or false"),
        edited("study_file", "num_samples = 2", "num_samples = true"),
    ),
    Case(
        "study file: no TOML",
        ("--config", "mend the TOML", "line 7"),
        edited("study_file", 'device = "cpu"', "device = cpu"),
    ),
    Case(
        "study file: a table nobody reads",
        ("study.toml line 9: evaluater", "[optimizer], [evaluator]"),
        edited("study_file", "[evaluator]", "[evaluater]"),
    ),
    Case(
        "environment: a misspelt name",
        ("OPTIMIZER_DAEMON_N_TRAIL: '3'", "did you mean n_trials?"),
        variable("OPTIMIZER_DAEMON_N_TRAIL", "3"),
    ),
    Case(
        "environment: a wrong value",
        ("OPTIMIZER_DAEMON_N_TRIALS: 'many'", "valid integer"),
        variable("OPTIMIZER_DAEMON_N_TRIALS", "many"),
    ),
    Case("flag: unknown", ("unrecognized arguments: --n-trails 3", "did you mean --n-trials?"), flags("--n-trails", 3)),
    Case(
        "verb: unknown",
        ("argument VERB: invalid choice: 'rum'", "optimizer-daemon --help"),
        lambda world: [*world.optimizer()[:3], "rum"],
    ),
    Case(
        "flag: a word for a number of trials to show",
        ("argument --top: invalid int value: 'many'", "status --help"),
        lambda world: world.status("--top", "many"),
    ),
    Case(
        "flag: one that is needed",
        ("the following arguments are required: A B", "compare --help"),
        lambda world: world.evaluator(verb="compare"),
    ),
    Case("flag: no value", ("argument --n-trials: expected one argument", "run --help"), flags("--n-trials")),
    Case("flag: no trial", ("--n-trials: '0'", "greater than or equal to 1"), flags("--n-trials", 0)),
    Case(
        "flag: fewer pictures than none",
        ("--num-samples: '-1'", "greater than or equal to 1"),
        flags("--num-samples=-1"),
    ),
    Case("flag: no time", ("--timeout: '0'", "greater than 0"), flags("--timeout", 0)),
    Case("flag: not a number", ("--cfg-scale: 'nan'", "finite number"), flags("--cfg-scale", "nan")),
    Case("flag: no such device name", ("--device: 'gpu'", "auto, cpu, cuda or cuda:N"), flags("--device", "gpu")),
    Case("flag: a GPU that is not there", ("--device cuda:99", "--device cpu"), flags("--device", "cuda:99"), code=4),
    Case(
        "flag: GPUs on a machine without",
        ("--gpus: '0,1'", "use --device cpu and --jobs"),
        flags("--gpus", "0,1", "--device", "auto"),
    ),
    Case("flag: no GPUs at all", ("--gpus: ''", "such as 0,1"), flags("--gpus=")),
    Case("flag: a GPU named twice", ("--gpus: '1,1'", "GPU 1 is named twice"), flags("--gpus", "1,1")),
    Case("flag: both GPUs and jobs", ("--jobs: 2", "leave it out", "--gpus 0,1"), flags("--gpus", "0,1", "--jobs", 2)),
    Case("flag: no jobs", ("--jobs: '0'", "greater than or equal to 1"), flags("--jobs", 0)),
    Case("status: no study", ("study holds no study (no run.json)", "--output-dir"), World.status),
    Case("status: fewer trials than one", ("--top: 0", "one trial or more"), lambda world: world.status("--top", 0)),
]

PLUGINS = [
    Case(
        "sampler: unknown",
        ("no sampler named 'tpee'; choose one of auto, cmaes, gp, nsga2",),
        flags("--sampler", "tpee"),
    ),
    Case(
        "sampler: several objectives are too many for it",
        ("--sampler: 'cmaes'", "--objectives names 2; take one of auto, gp, nsga2, random, tpe"),
        flags("--sampler", "cmaes", "--objectives", "brightness,contrast"),
    ),
    Case(
        "objective: unknown",
        ("--objectives: 'brightness,contrst'", "there is no 'contrst'", "name two or more of combined_score"),
        flags("--objectives", "brightness, contrst"),
    ),
    Case(
        "objective: one alone",
        ("--objectives: 'brightness'", "is what --scoring is for", "or leave the flag out"),
        flags("--objectives", "brightness"),
    ),
    Case(
        "objective: twice",
        ("--objectives: 'contrast,contrast'", "contrast is named twice"),
        flags("--objectives", "contrast,contrast"),
    ),
    Case(
        "objective: finalists of a front",
        ("--finalists: 2", "leave one of the two out"),
        flags("--objectives", "brightness,contrast", "--finalists", 2),
    ),
    Case(
        "metric: unknown",
        ("no metric named 'fid'; choose one of clip_consistency, clip_image, dino_likeness",),
        flags("--metrics", "pixels,fid"),
    ),
    Case(
        "metric: the score's own left out",
        ("--metrics: 'clip_consistency'", "add it"),
        flags("--metrics", "clip_consistency"),
    ),
    Case("metric: a CLIP for nothing", ("--metrics: 'pixels'", "clip_consistency"), flags("--metrics", "pixels")),
    Case(
        "metric: likeness without a DINOv2 there",
        ("--dino-model", "it holds config.json"),
        flags("--metrics", "pixels,clip_consistency,dino_likeness", "--dino-model", "nowhere"),
    ),
    Case(
        "metric: a CLIP for a DINOv2",
        ("--dino-model", "model_type 'clip'"),
        flags("--metrics", "pixels,clip_consistency,dino_likeness", "--dino-model", CLIP_MODEL),
    ),
    Case(
        "metric: LPIPS without its file",
        ("--lpips-weights", "name a readable file"),
        flags("--lpips-weights", "nowhere.pth"),
    ),
    Case(
        "scoring: unknown",
        ("--scoring: 'best'", "combined, lpips_clip, recommended"),
        flags("--scoring", "best"),
    ),
    Case(
        "scoring: too few pictures to hold any out",
        ("2 different pictures", "only taken out of 20 or more"),
        flags("--scoring", "recommended"),
    ),
    Case(
        "scoring: an unknown kind of term",
        ("own.toml", "kind"),
        written(
            "own.toml",
            'name = "own"\nobjective = "own_score"\n[terms.a]\nmetric = "contrast"\nkind = "mean"\nweight = 1\n',
            "--scoring",
            "{}",
        ),
    ),
    Case("trainer: unknown", ("no trainer named 'kohia'; choose one of command, ",), flags("--trainer", "kohia")),
    Case(
        "trainer: no such module",
        ("trainer: 'no_such:TRAINER'", "there is no module 'no_such'"),
        flags("--trainer", "no_such:TRAINER"),
    ),
    Case(
        "trainer: likeness to pictures that it may have trained on",
        ("--trainer: 'tests.scenarios.faulty_plugin:FaultyTrainer'", "4 pictures", "holds_out = True"),
        flags(
            *("--trainer", "tests.scenarios.faulty_plugin:FaultyTrainer"),
            *("--scoring", "recommended", "--dataset-config", DATASET_TOML),
        ),
    ),
]

SPACES = [
    Case(
        "space: no such file", ("no search space", "v3", "one of the presets v1, v2.1"), flags("--search-space", "v3")
    ),
    Case("space: no TOML", ("space.toml: line 2", "mend the TOML there"), edited("space", '"quick"', "quick")),
    Case(
        "space: an unknown key",
        ("space.toml: parameters -> learning_rate -> hihg", "the keys here are"),
        edited("space", "high = 4e-3", "hihg = 4e-3"),
    ),
    Case(
        "space: a bad rule",
        ("space.toml: constraints #1 -> when", "there is no 'lr' here"),
        edited(
            "space",
            "[parameters.learning_rate]",
            'constraints = [{when = "lr > 1", reason = "too high"}]\n[parameters.learning_rate]',
        ),
    ),
    Case(
        "space: nothing is feasible",
        ("search space 'quick'", "too high", "loosen that rule"),
        edited(
            "space",
            "[parameters.learning_rate]",
            'constraints = [{when = "learning_rate > 0", reason = "too high"}]\n[parameters.learning_rate]',
        ),
    ),
    Case(
        "space: a parameter the trainer does not know",
        ("--search-space", "space.toml", "network_dimm: the native trainer has no such setting", "did you mean"),
        edited("space", "parameters.network_dim]", "parameters.network_dimm]"),
    ),
    Case(
        "space: an unknown optimizer among the choices",
        ("space.toml", "optimizer_type: 'AdamX' will not do", "did you mean 'Adam"),
        edited("space", OPTIMIZER, 'choices = ["AdamW", "Lion", "AdamX"]'),
    ),
    Case(
        "space: a module without that optimizer among the choices",
        (
            "optimizer_type: 'torch.optim.Nope' will not do; torch.optim.Nope is no torch optimizer",
            "correct the search",
        ),
        edited("space", OPTIMIZER, 'choices = ["AdamW", "torch.optim.Nope"]'),
    ),
    Case(
        "space: half precision on a CPU",
        ("trial parameters: mixed_precision: 'fp16' needs a GPU; use 'auto' or 'no' on a CPU", "[trainer.native]"),
        native('mixed_precision = "fp16"'),
    ),
    Case(
        "space: velocity's noise schedule for a base model of the other kind",
        ("zero_terminal_snr: True will not do; it is for velocity prediction (v_parameterization); take it out",),
        native("zero_terminal_snr = true"),
    ),
    Case(
        "space: a LoRA to begin with that is not there",
        ("network_weights: '/nowhere/a.safetensors' will not do; it could not be read", "correct the path"),
        native('network_weights = "/nowhere/a.safetensors"'),
    ),
    Case(
        "space: an optimizer whose package is missing",
        ("'no_package.Adam' will not do", "install its package"),
        edited("space", OPTIMIZER, 'choices = ["AdamW", "no_package.Adam"]'),
    ),
    Case(
        "options: a contradiction",
        ("lr_scheduler 'cosine_with_min_lr' needs one lowest rate; set either lr_scheduler_min_lr_ratio or",),
        trained_with("lr_scheduler = 'cosine_with_min_lr'"),
    ),
    Case(
        "options: an unknown argument of the network",
        ("there is no 'conv_dimm' here; the arguments are conv_dim, conv_alpha, rank_dropout",),
        trained_with("network_args = { conv_dimm = 4 }"),
    ),
    Case(
        "options: one that does not exist",
        ("[trainer.native] network_dimm: the native trainer has no such setting; did you mean 'network_dim'?",),
        trained_with("network_dimm = 4"),
    ),
    Case(
        "space: a value out of the trainer's range",
        ("space.toml", "network_dim: 0 will not do"),
        edited("space", "choices = [4, 8]", "choices = [4, 8, 0]"),
    ),
]

MODELS = [
    Case(
        "base model: none there",
        ("--base-model", "name a diffusers folder, which holds model_index.json, or one .safetensors file"),
        flags("--base-model", "nowhere"),
    ),
    Case(
        "base model: a pickle",
        ("--base-model", "model.ckpt", "a pickle (.ckpt, .pt, .bin) may run code; convert it first"),
        written("model.ckpt", b"\x80\x02}q\x00.", "--base-model", "{}"),
    ),
    Case(
        "base model: a file that is no safetensors file",
        ("--base-model", "model.safetensors", "copy that file again"),
        written("model.safetensors", "no header of a safetensors file", "--base-model", "{}"),
    ),
    Case(
        "base model: a LoRA",
        ("--base-model", "model.safetensors", "it is a LoRA; name the base model it was trained on"),
        written("model.safetensors", one_tensor("lora_unet_mid_block.alpha"), "--base-model", "{}"),
    ),
    Case(
        "base model: a file without its UNet",
        ("--base-model", "it lacks model.diffusion_model.input_blocks.0.0.weight; name a whole model"),
        written("model.safetensors", one_tensor(TOKEN_EMBEDDING), "--base-model", "{}"),
    ),
    Case(
        "base model: a family that is not trained",
        ("--base-model", "FluxPipeline", "name a StableDiffusionPipeline", "StableDiffusionXLPipeline (SDXL)"),
        model("--base-model", BASE_MODEL, in_json("model_index.json", _class_name="FluxPipeline")),
    ),
    Case(
        "base model: SDXL without its second text encoder",
        ("--base-model", "lacks text_encoder_2/config.json, tokenizer_2/tokenizer_config.json; copy the whole model"),
        model("--base-model", BASE_MODEL, in_json("model_index.json", _class_name="StableDiffusionXLPipeline")),
    ),
    Case(
        "base model: another family than --model-family says",
        ("--model-family: 'sdxl' will not do", "is sd15, by its own files; say so, or leave it out"),
        flags("--model-family", "sdxl"),
    ),
    Case(
        "base model: more rates than text encoders",
        ("[trainer.native] text_encoder_lr: [0.0001, 1e-05]", "family sd15 has 1 text encoder; give one rate"),
        native("text_encoder_lr = [1e-4, 1e-5]"),
    ),
    Case(
        "base model: a part is missing",
        ("lacks vae/config.json; copy the whole model",),
        model("--base-model", BASE_MODEL, lambda folder: shutil.rmtree(folder / "vae")),
    ),
    Case(
        "base model: no weights",
        ("unet", "it holds no weights"),
        model("--base-model", BASE_MODEL, lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink()),
    ),
    Case(
        "base model: truncated weights",
        ("unet/diffusion_pytorch_model.safetensors", "copy that file again"),
        model("--base-model", BASE_MODEL, cut("unet/diffusion_pytorch_model.safetensors")),
    ),
    Case(
        "base model: for inpainting",
        ("its UNet takes 9 channels", "inpainting models are not trained"),
        model("--base-model", BASE_MODEL, in_json("unet/config.json", in_channels=9)),
    ),
    Case("CLIP: none there", ("--clip-model", "it holds config.json"), flags("--clip-model", "nowhere")),
    Case(
        "CLIP: another model",
        ("--clip-model", "model_type 't5'"),
        model("--clip-model", CLIP_MODEL, in_json("config.json", model_type="t5")),
    ),
    Case(
        "CLIP: a part is missing",
        ("lacks preprocessor_config.json",),
        model("--clip-model", CLIP_MODEL, lambda folder: (folder / "preprocessor_config.json").unlink()),
    ),
    Case(
        "CLIP: truncated weights",
        ("model.safetensors", "copy that file again"),
        model("--clip-model", CLIP_MODEL, cut("model.safetensors")),
    ),
    Case("prompts: no such file", ("--prompts", "name a readable UTF-8 text file"), flags("--prompts", "nowhere.txt")),
    Case(
        "prompts: none in it",
        ("--prompts", "it holds no prompt; write one a line"),
        written("prompts.txt", "# only this\n", "--prompts", "{}"),
    ),
    Case(
        "prompts: an option that is not there",
        ("prompts.txt line 2: '--g'", "there is no such option; choose among --n, --w"),
        written("prompts.txt", "a ball\na cube --g 3.5\n", "--prompts", "{}"),
    ),
    Case(
        "prompts: an option twice",
        ("prompts.txt line 1 --w: '72'", "the option is there twice"),
        written("prompts.txt", "a ball --w 64 --w 72\n", "--prompts", "{}"),
    ),
    Case(
        "prompts: an option's value is no number",
        ("prompts.txt line 1 --l: '7,5'", "write a number"),
        written("prompts.txt", "a ball --l 7,5\n", "--prompts", "{}"),
    ),
    Case(
        "prompts: an option's value is no whole number",
        ("prompts.txt line 3 --s: '20.5'", "write a whole number"),
        written("prompts.txt", "# one\n\na ball --s 20.5\n", "--prompts", "{}"),
    ),
    Case(
        "prompts: an option out of range",
        ("prompts.txt line 1 --s: '0'", "write a value from 1 to 1000"),
        written("prompts.txt", "a ball --s 0\n", "--prompts", "{}"),
    ),
    Case(
        "prompts: a size between two multiples",
        ("prompts.txt line 1 --w: '100'", "write a multiple of 8, such as 96 or 104"),
        written("prompts.txt", "a ball --w 100\n", "--prompts", "{}"),
    ),
    Case(
        "prompts: a sampler that is not there",
        ("prompts.txt line 1 --ss: 'unipc'", "choose among dpmpp_2m_karras, ddim, euler"),
        written("prompts.txt", "a ball --ss unipc\n", "--prompts", "{}"),
    ),
    Case(
        "prompts: a negative prompt without words",
        ("prompts.txt line 1 --n: ''", "write a text behind it"),
        written("prompts.txt", "a ball --n --w 64\n", "--prompts", "{}"),
    ),
    Case(
        "prompts: options alone",
        ("prompts.txt line 1: ''", "write a prompt"),
        written("prompts.txt", "--w 64\n", "--prompts", "{}"),
    ),
    Case(
        "prompts: no TOML",
        ("--prompts", "mend the TOML", "line 1"),
        written("prompts.toml", "[prompt\n", "--prompts", "{}"),
    ),
    Case(
        "prompts: a TOML of something else",
        ("--prompts", "write one [[prompt.subset]] table for each prompt"),
        written("prompts.toml", "[prompt]\nwidth = 64\n", "--prompts", "{}"),
    ),
    Case(
        "prompts: a TOML key that is not there",
        ("prompts.toml line 3: 'heigth'", "there is no such option; choose among prompt, negative_prompt"),
        written("prompts.toml", '[[prompt.subset]]\nprompt = "a ball"\nheigth = 64\n', "--prompts", "{}"),
    ),
    Case(
        "prompts: another table in the TOML",
        ("prompts.toml line 3: 'network'", "only [prompt] is read"),
        written("prompts.toml", '[prompt]\nsubset = [{ prompt = "a ball" }]\n[network]\ndim = 4\n', "--prompts", "{}"),
    ),
    Case(
        "prompts: a TOML prompt that is no text",
        ("prompts.toml line 2: prompt: 7", "write the prompt as text"),
        written("prompts.toml", "[[prompt.subset]]\nprompt = 7\n", "--prompts", "{}"),
    ),
    Case(
        "prompts: no JSON",
        ("--prompts", "mend the JSON", "line 1"),
        written("prompts.json", "[", "--prompts", "{}"),
    ),
    Case(
        "prompts: a JSON without an end of brackets",
        ("--prompts", "mend the JSON (it is nested too deeply)"),
        written("prompts.json", "[" * 100_000, "--prompts", "{}"),
    ),
    Case(
        "prompts: half a character in the JSON",
        ("prompts.json prompt 1: '\\ud800'", "half a character"),
        written("prompts.json", r'["a \ud800"]', "--prompts", "{}"),
    ),
    Case(
        "prompts: a TOML number of 5,000 digits",
        ("--prompts", "mend the TOML (Exceeds the limit (4300 digits)"),
        written("prompts.toml", f"[[prompt.subset]]\nprompt = 'a'\nseed = {'9' * 5000}\n", "--prompts", "{}"),
    ),
    Case(
        "prompts: a JSON of something else",
        ("--prompts", "write a JSON list"),
        written("prompts.json", '{"prompt": "a ball"}', "--prompts", "{}"),
    ),
    Case(
        "prompts: a JSON item that is no prompt",
        ("prompts.json prompt 2: 7", "write a string or an object"),
        written("prompts.json", '["a ball", 7]', "--prompts", "{}"),
    ),
    Case(
        "prompts: no UTF-8",
        ("--prompts", "name a readable UTF-8 text file"),
        written("prompts.txt", b"\xff\xfe", "--prompts", "{}"),
    ),
]

PLACES = [
    Case(
        "folder: none named",
        ("--output-dir: None", "name the study folder"),
        edited("study_file", 'output_dir = "study"\n', ""),
    ),
    Case(
        "folder: a file stands there",
        ("--output-dir", "name a folder that can be made (File exists)"),
        written("place", "x", "--output-dir", "{}"),
    ),
    Case(
        "folder: below a file",
        ("--output-dir", "name a folder that can be made (Not a directory)"),
        written("place", "x", "--output-dir", "{}/study"),
    ),
    Case(
        "folder: not to be written",
        ("--output-dir", "cannot be written; name another"),
        read_only,
        impossible=World.no_mounts,
    ),
    Case("storage: no URL", ("--storage: 'study.db'", "such as sqlite:///"), flags("--storage", "study.db")),
    Case(
        "storage: no such folder",
        ("--storage", "unable to open database file"),
        flags("--storage", "sqlite:////nowhere/study.db"),
    ),
    Case(
        "storage: no such driver",
        ("--storage", "name a database that opens"),
        flags("--storage", "mysql+nodriver://localhost/study"),
    ),
    Case(
        "storage: not a database",
        ("--storage", "that file is damaged or no SQLite database"),
        written("notes.db", "hello " * 500, "--storage", "sqlite:///{}"),
    ),
]

STUDIES = [
    Case(
        "study: another optimizer is alive",
        ("optimizer.lock is held by pid", "stop it first"),
        held("optimizer.lock", World.optimizer),
    ),
    Case(
        "study: another manager is alive",
        ("evaluator_manager.lock is held by pid", "stop it first"),
        held("evaluator_manager.lock", World.evaluator),
    ),
    Case(
        "study: another name", ("--study-name: lora_study -> other", "use those again"), flags("--study-name", "other")
    ),
    Case(
        "flags: a policy that is none",
        ("--gpu-policy: 'never'", "input should be 'share' or 'defer'"),
        flags("--gpu-policy", "never"),
    ),
    Case(
        "baseline: no LoRA",
        ("--baseline: ", "not a LoRA", "name a LoRA that is whole"),
        flags("--baseline", f"v6={BASE_MODEL / 'unet' / 'diffusion_pytorch_model.safetensors'}"),
    ),
    Case("baseline: no such file", ("--baseline: ", "file that is there"), flags("--baseline", "v6=/gone.safetensors")),
    Case(
        "baseline: a name that leaves the folder",
        ("--baseline: ", "give it a name of small letters"),
        flags("--baseline", "../v6=/gone.safetensors"),
    ),
    Case(
        "flags: finalists alone",
        ("--finalists: 30", "leave one or more to the search"),
        flags("--finalists", 30),
    ),
    Case("study: another plan", ("--num-samples: 2 -> 4",), flags("--num-samples", 4)),
    Case("study: another space", ("--search-space:", "space.toml -> v1"), flags("--search-space", "v1")),
    Case(
        "study: the space was changed",
        ("learning_rate: 0.0001..0.004 log -> 0.0001..0.002 log", "use that one"),
        edited("space", "high = 4e-3", "high = 2e-3"),
    ),
    Case(
        "study: a parameter was added",
        ("max_grad_norm: absent -> 0.5..1.0",),
        edited(
            "space",
            "[parameters.network_dim]",
            '[parameters.max_grad_norm]\ntype = "float"\nlow = 0.5\nhigh = 1.0\n[parameters.network_dim]',
        ),
    ),
    Case(
        "study: another data set",
        ("--dataset-config:", "other.toml"),
        after(
            lambda w: shutil.copy(w.dataset, w.folder / "other.toml"),
            lambda w: w.optimizer("--dataset-config", w.folder / "other.toml"),
        ),
    ),
    Case(
        "study: a caption was changed",
        ("01_red_cube.txt has changed", "put it back as it was"),
        picture(lambda image, caption: caption.write_text("another")),
    ),
    Case(
        "study: another base model",
        ("--base-model:", "-> ", "use those again"),
        model("--base-model", BASE_MODEL, lambda folder: None),
    ),
    Case(
        "study: a database of another Optuna",
        ("was made by another version of Optuna", "optuna storage upgrade"),
        after(lambda w: w.query("UPDATE alembic_version SET version_num = 'v3.0.0.d'")),
    ),
    Case(
        "study: run.json of a newer program",
        ("schema_version 2, this one reads 1; upgrade it",),
        after(with_newer_schema),
        code=3,
    ),
    Case(
        "study: run.json edited by hand",
        ("run.json", "python -m shared.seal"),
        run_json(lambda text: text.replace('"lora_study"', '"lora_studio"', 1)),
        code=3,
    ),
    Case("study: half a run.json", ("run.json",), run_json(lambda text: text[: len(text) // 2]), code=3),
    Case("study: no run.json", ("no run.json; put run.json back",), after(lambda w: (w.study / "run.json").unlink())),
    Case(
        "study: no database",
        ("no optuna_study.db; put its database back",),
        after(lambda w: (trial(w), database(w).unlink())),
    ),
    Case(
        "study: an earlier copy of the database",
        ("trial_0001, but the study knows only 0 trials", "put its"),
        after(trial),
    ),
    Case(
        "study: a database of noise",
        ("--storage", "that file is damaged", "put a copy of it back"),
        after(lambda w: database(w).write_bytes(b"noise " * 2000)),
    ),
    Case(
        "study: a database damaged inside",
        ("--storage", "that file is damaged", "put a copy of it back"),
        after(
            lambda w: database(w).write_bytes((raw := database(w).read_bytes())[:4096] + b"\xff" * (len(raw) - 4096))
        ),
    ),
]

EVALUATOR = [
    Case(
        "evaluator: no folder named",
        ("--optimization-dir: None", "name the study folder"),
        edited("study_file", 'optimization_dir = "study"\n', "", World.evaluator),
    ),
    Case("evaluator: no such folder", ("--optimization-dir", "make that folder or name another"), World.evaluator),
    Case(
        "watch: no folder named",
        ("--optimization-dir: None", "name the study folder"),
        edited("study_file", 'optimization_dir = "study"\n', "", watch()),
    ),
    Case("watch: no such folder", ("--optimization-dir", "there is no such folder"), watch()),
    Case(
        "watch: never a pause",
        ("--interval: 0.0", "write seconds, more than 0"),
        after(lambda w: w.study.mkdir(), watch("--interval", "0")),
    ),
    Case(
        "evaluator: nothing to go by",
        ("--base-model: None", "pass --base-model and --prompts"),
        after(lambda w: w.study.mkdir(), World.evaluator),
    ),
    Case(
        "evaluator: a family that is not rendered",
        ("--base-model", "FluxPipeline", "name a StableDiffusionPipeline", "StableDiffusionXLPipeline (SDXL)"),
        base_model_of("FluxPipeline"),
    ),
    Case(
        "evaluator: SDXL without its second text encoder",
        ("--base-model", "lacks text_encoder_2/config.json, tokenizer_2/tokenizer_config.json; copy the whole model"),
        base_model_of("StableDiffusionXLPipeline"),
    ),
    Case(
        "evaluator: a strength that is no number",
        ("--lora-scale: 'nan'", "finite number"),
        lambda world: world.evaluator("--lora-scale", "nan"),
    ),
    Case(
        "evaluator: a trial that is none",
        ("--trial: ", "name a trial's folder"),
        lambda world: world.evaluator("--trial", "nowhere", verb="evaluate"),
    ),
    Case(
        "evaluate: nothing named",
        ("FILE: ", "--trial DIR"),
        lambda world: world.evaluator(verb="evaluate"),
    ),
    Case(
        "evaluate: a file that is not there",
        ("FILE: ", "that is there"),
        lambda world: world.evaluator("gone.safetensors", verb="evaluate"),
    ),
    Case(
        "evaluate: a label that leaves the folder",
        ("--label: '../x'", "small letters"),
        lambda world: world.evaluator("--base", "--label", "../x", verb="evaluate"),
    ),
    Case(
        "evaluate: a file and a trial",
        ("--trial: ", "leave --base out"),
        lambda world: world.evaluator("--base", "--trial", world.pictures, verb="evaluate"),
    ),
    Case(
        "evaluator: a folder outside any study",
        ("run.json; pass --base-model and --prompts",),
        lambda world: world.evaluator("--trial", world.pictures, verb="evaluate"),
    ),
]
EVALUATOR_OF_STUDY = [
    Case(
        "evaluator: another strength",
        ("--lora-scale is 0.5, but the study's run.json has 1.0", "leave the flag out"),
        lambda world: world.evaluator("--lora-scale", 0.5),
    ),
    Case(
        "evaluator: other pictures",
        ("--num-samples is 3, but the study's run.json has 2", "leave the flag out"),
        lambda world: world.evaluator("--num-samples", 3),
    ),
    Case(
        "evaluator: another GPU policy",
        ("--gpu-policy is 'defer', but the study's run.json has 'share'", "leave the flag out"),
        lambda world: world.evaluator("--gpu-policy", "defer"),
    ),
    Case(
        "evaluator: prompts with other options",
        ("--prompts (the options) is [{}, {'width': 72}]", "but the study's run.json has []"),
        after(
            lambda w: (w.folder / "p.txt").write_text(
                "\n".join(f"{text} {'--w 72' if i == 1 else ''}" for i, text in enumerate(w.run_json.plan.prompts))
            ),
            lambda w: w.evaluator("--prompts", w.folder / "p.txt"),
        ),
    ),
    Case(
        "evaluator: another scoring",
        ("--scoring is 'lpips_clip', but the study's run.json has 'combined'", "leave the flag out"),
        lambda world: world.evaluator("--scoring", "lpips_clip"),
    ),
    Case(
        "evaluator: pictures of its own for a study",
        ("--reference-pictures", "leave the flag out"),
        lambda world: world.evaluator("--reference-pictures", world.pictures),
    ),
    Case(
        "evaluate: other pictures, without leave",
        ("--num-samples is 3, but the study's run.json has 2", "--override-plan"),
        lambda world: world.evaluator("--base", "--num-samples", 3, verb="evaluate"),
    ),
    Case(
        "compare: one side",
        ("A B: ", "at least two"),
        lambda world: world.evaluator("base", verb="compare"),
    ),
    Case(
        "compare: nothing of that name",
        ("names no trial, label or file",),
        lambda world: world.evaluator("base", "99", verb="compare"),
    ),
    Case(
        "compare: a label without fresh pictures",
        ("--label: ", "only --fresh"),
        lambda world: world.evaluator("base", "99", "--label", "x", verb="compare"),
    ),
    Case(
        "evaluator: another base model",
        ("its content is not that of the base model",),
        model("--base-model", BASE_MODEL, in_json("unet/config.json", sample_size=4), "evaluator"),
    ),
    Case(
        "evaluator: another CLIP",
        ("the study was started with another CLIP",),
        model("--clip-model", CLIP_MODEL, in_json("preprocessor_config.json", crop_size=1), "evaluator"),
    ),
    Case(
        "evaluator: a GPU that is not there",
        ("--device cuda:99", "--device cpu"),
        lambda world: world.evaluator("--device", "cuda:99"),
        code=4,
    ),
    Case(
        "evaluator: run.json edited by hand",
        ("run.json", "python -m shared.seal"),
        run_json(lambda text: text.replace('"lora_study"', '"lora_studio"', 1), World.evaluator),
        code=3,
    ),
]

CASES = [
    *(DATA + SETTINGS + PLUGINS + SPACES + MODELS + PLACES + EVALUATOR + BY_COMMAND + BY_PROGRAM),
    *(replace(case, study=True) for case in STUDIES + EVALUATOR_OF_STUDY),
]

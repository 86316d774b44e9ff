"""What the kohya trainer makes and finds on disk: the linked data set, states, optimizers, the causes of a failure."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from optimizer_daemon.study_file import captions
from optimizer_daemon.trainers import TRAINERS
from optimizer_daemon.trainers.base import ResumePoint
from optimizer_daemon.trainers.kohya import publish_optimizers
from optimizer_daemon.trainers.kohya_checks import require_dataset
from optimizer_daemon.trainers.kohya_data import make_dataset, remove_broken_latents
from shared.errors import UserError
from shared.layout import StudyLayout, TrialLayout
from shared.schemas import Run, TrainerExit
from shared.schemas.pictures import Picture, StudyPictures
from tests.optimizer_daemon.trainers.test_kohya import params, study

KOHYA = TRAINERS.load("kohya")

# ----------------------------------------------------------------------------------------------- the linked data set


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three pictures: one with a caption, one cut out of a larger one by kohya's tools, one without a caption."""
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for name in ("ball.png", "cat_10_20_30_40.JPG", "cone.png"):
        (folder / name).write_bytes(f"picture {name}".encode())
    (folder / "ball.txt").write_text("a ball")
    (folder / "cat.txt").write_text("a cat")
    (folder / "ball_0064x0064_sd.npz").write_bytes(b"latents of another study")
    return folder


@pytest.fixture
def layout(tmp_path: Path) -> StudyLayout:
    (tmp_path / "study/trainer_cache").mkdir(parents=True)
    return StudyLayout(tmp_path / "study")


def run_on(
    images: Path,
    subset: str = "",
    *,
    held_out: tuple[str, ...] = (),
    general: str = "caption_extension = '.txt'",
    **options: object,
) -> Run:
    """A study on `images`, the named pictures held out, with `options` in its [trainer.kohya] table."""
    path = images.parent / "dataset.toml"
    path.write_text(
        f"[general]\n{general}\n[[datasets]]\nresolution = 64\n"
        f"[[datasets.subsets]]\nimage_dir = '{images.name}'\nclass_tokens = 'thing'\n{subset}\n"
    )
    pictures = tuple(
        Picture(path=str(images / name), sha256=hashlib.sha256((images / name).read_bytes()).hexdigest())
        for name in held_out
    )
    run = study()
    settings = {**run.settings, "dataset-config": str(path)}
    return run.model_copy(
        update={
            "settings": settings,
            "pictures": StudyPictures(held_out=pictures),
            "trainer": run.trainer.model_copy(update={"options": options}),
        }
    )


def linked(made: Path) -> Path:
    """The folder that kohya is told to train on."""
    (dataset,) = json.loads(made.read_text())["datasets"]
    return Path(dataset["subsets"][0]["image_dir"])


def test_kohya_gets_links_to_pictures_and_captions_and_nobody_elses_latents(images: Path, layout: StudyLayout):
    made = make_dataset(run_on(images), layout)
    folder = linked(made)
    assert folder.name == "my pictures"  # the LoRA's metadata shows it
    assert folder.is_relative_to(layout.trainer_cache)
    assert {link.name: link.readlink().name for link in folder.iterdir()} == {
        "ball.png": "ball.png",
        "ball.txt": "ball.txt",
        "cat_10_20_30_40.jpg": "cat_10_20_30_40.JPG",
        "cat_10_20_30_40.txt": "cat.txt",
        "cone.png": "cone.png",
    }
    tables = json.loads(made.read_text())
    assert tables["general"] == {"caption_extension": ".txt"}
    assert tables["datasets"][0]["resolution"] == 64


@pytest.mark.parametrize(
    ("general", "options"),
    [
        pytest.param("caption_extension = 'txt'", {}, id="without its dot"),
        pytest.param("", {"caption_extension": ".txt"}, id="as an option"),
        pytest.param("", {"caption_extension": "txt"}, id="both"),
        pytest.param("caption_extension = '.txt'", {"caption_extension": ".caption"}, id="the table wins"),
    ],
)
def test_captions_are_found_as_sd_scripts_find_them(images: Path, layout: StudyLayout, general: str, options):
    run = run_on(images, general=general, **options)
    captions = {file.name: file.read_text() for file in linked(make_dataset(run, layout)).glob("*.txt")}
    assert captions == {"ball.txt": "a ball", "cat_10_20_30_40.txt": "a cat"}


@pytest.mark.parametrize("extension", [".txt", "txt"])
def test_a_caption_by_the_scripts_option_satisfies_the_start(tmp_path: Path, extension: str):
    Image.new("RGB", (8, 8)).save(tmp_path / "ball.png")
    (tmp_path / "ball.txt").write_text("a ball")
    toml = tmp_path / "dataset.toml"
    toml.write_text("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '.'\n")
    require_dataset(toml, {"caption_extension": extension})
    assert captions(toml, {"caption_extension": extension}) == ["a ball"]
    with pytest.raises(UserError, match=r"it has no caption file \(\.caption\)"):
        require_dataset(toml, {})


def test_held_out_pictures_are_no_links(images: Path, layout: StudyLayout):
    folder = linked(make_dataset(run_on(images, held_out=("ball.png",)), layout))
    assert sorted(link.name for link in folder.glob("*.[pj]*g")) == ["cat_10_20_30_40.jpg", "cone.png"]


def test_two_pictures_of_one_stem_do_not_share_latents(images: Path, layout: StudyLayout):
    (images / "ball.webp").write_bytes(b"another picture")
    folder = linked(make_dataset(run_on(images), layout))
    assert {link.name: link.readlink().name for link in folder.glob("ball*")} == {
        "ball.png": "ball.png",
        "ball.txt": "ball.txt",
        "ball-webp.webp": "ball.webp",
        "ball-webp.txt": "ball.txt",
    }


def test_the_same_pictures_are_linked_once_and_keep_their_latents(images: Path, layout: StudyLayout):
    made = make_dataset(run_on(images), layout)
    latents = linked(made) / "ball_0064x0064_sd.npz"
    latents.write_bytes(b"latents")
    assert make_dataset(run_on(images), layout) == made
    assert linked(made) == latents.parent
    assert latents.read_bytes() == b"latents"


@pytest.mark.parametrize("change", ["a picture", "a caption", "the resolution", "the VAE"])
def test_latents_of_something_else_are_never_met(images: Path, layout: StudyLayout, change: str):
    vae = images.parent / "vae.safetensors"
    vae.write_bytes(b"weights")
    run = run_on(images, vae=str(vae))
    before = linked(make_dataset(run, layout))
    if change == "the VAE":
        vae.write_bytes(b"other weights")
    elif change == "a caption":
        (images / "ball.txt").write_text("another")  # kohya keeps what its text encoders make of it, too
    elif change == "a picture":
        (images / "ball.png").write_bytes(b"another picture under that name")
    else:
        toml = images.parent / "dataset.toml"
        toml.write_text(toml.read_text().replace("resolution = 64", "resolution = 128"))
    made = make_dataset(run, layout)
    assert linked(made) != before
    assert str(made) in KOHYA.plan(params(), layout.trial(1), run).files["train_config.toml"]  # under the same name


def test_half_written_latents_are_removed_before_a_training(images: Path, layout: StudyLayout):
    run = run_on(images)
    folder = linked(make_dataset(run, layout))
    with zipfile.ZipFile(folder / "cone_0064x0064_sd.npz", "w") as archive:
        archive.writestr("latents.npy", bytes(5000))
    whole = (folder / "cone_0064x0064_sd.npz").read_bytes()
    (folder / "ball_0064x0064_sd.npz").write_bytes(whole[:-700])
    KOHYA.tidy(layout.trial(1), run)
    assert sorted(path.name for path in folder.glob("*.npz")) == ["cone_0064x0064_sd.npz"]
    assert remove_broken_latents(layout) == []


def test_latents_that_were_whole_are_not_read_again(images: Path, layout: StudyLayout):
    folder = linked(make_dataset(run_on(images), layout))
    old, new = folder / "ball_0064x0064_sd.npz", folder / "cone_0064x0064_sd.npz"
    with zipfile.ZipFile(old, "w") as archive:
        archive.writestr("latents.npy", bytes(5000))
    time_of_old = old.stat()
    assert remove_broken_latents(layout) == []
    old.write_bytes(b"only a look could tell")
    os.utime(old, ns=(time_of_old.st_atime_ns, time_of_old.st_mtime_ns - 1_000_000_000))
    new.write_bytes(b"half")
    assert remove_broken_latents(layout) == [new]


# -------------------------------------------------------------------------------------------------------- states

FILES = ("train_state.json", "model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl")


def save_state(trial: TrialLayout, epoch: int) -> Path:
    folder = trial.kohya_training_state(epoch)
    folder.mkdir(parents=True)
    (folder / "train_state.json").write_text(json.dumps({"current_epoch": epoch, "current_step": 4}))
    save_file({"weight": torch.zeros(100)}, folder / "model.safetensors")
    for name in FILES[2:]:
        torch.save({"state": torch.zeros(100)}, folder / name)
    return folder


@pytest.mark.parametrize("file", FILES)
def test_a_state_with_a_torn_file_gives_way_to_the_one_before(tmp_path: Path, file: str):
    trial = StudyLayout(tmp_path).trial(1)
    older, newer = save_state(trial, 2), save_state(trial, 4)
    assert KOHYA.resume_point(trial) == ResumePoint(newer, 4)
    os.truncate(newer / file, (newer / file).stat().st_size // 2)
    assert KOHYA.resume_point(trial) == ResumePoint(older, 2)


def test_a_state_of_another_epoch_than_its_name_says_is_none(tmp_path: Path):
    trial = StudyLayout(tmp_path).trial(1)
    folder = save_state(trial, 2)
    (folder / "train_state.json").write_text(json.dumps({"current_epoch": 3, "current_step": 4}))
    assert KOHYA.resume_point(trial) is None


# ----------------------------------------------------------------------------------------------- optimizers


def test_another_python_imports_our_optimizers_by_class_path_and_nothing_else_of_ours(tmp_path: Path):
    source = tmp_path / "torch_optim"
    source.mkdir()
    (source / "__init__.py").write_text("")
    (source / "some.py").write_text("class Some: ...\n")
    publish_optimizers(source, tmp_path / "python")
    program = "from optimizer_daemon.torch_optim.some import Some; import optimizer_daemon.trainers"
    done = subprocess.run(
        (sys.executable, "-S", "-c", program),
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "python")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'optimizer_daemon.trainers'"


# ----------------------------------------------------------------------------------------------- causes of a failure


def ended(tmp_path: Path, batch_size: str = "") -> TrainerExit:
    """A training that ended with status 1 under the settings of a file."""
    dataset = tmp_path / "dataset.json"
    dataset.write_text(json.dumps({"datasets": [{"resolution": 512, **({"batch_size": 4} if batch_size else {})}]}))
    config = tmp_path / "train_config.toml"
    config.write_text(
        f'dataset_config = "{dataset}"\ngradient_checkpointing = true\nnetwork_dim = 128\n'
        "max_data_loader_n_workers = 8\n"
    )
    now = datetime(2025, 11, 15, tzinfo=UTC)
    return TrainerExit.model_validate(
        {"command": ("python", "train_network.py", "--config_file", str(config)), "pid": 7, "exit_status": 1,
         "signal": None, "started": now, "ended": now, "seconds": 1.0}
    )  # fmt: skip


CAUSES = [
    (
        "GPU memory",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "batch_size",
        "out of memory on the GPU: lower batch_size in the data-set TOML, use a smaller network_dim than 128, or pass "
        "--gpu-policy defer",
    ),
    (
        "GPU memory, the batch size kohya's default",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "",
        "out of memory on the GPU: lower train_batch_size in [trainer.kohya], use a smaller network_dim than 128, or "
        "pass --gpu-policy defer",
    ),
    (
        "a killed data loader",
        "RuntimeError: DataLoader worker (pid 25019) is killed by signal: Killed.",
        "batch_size",
        "out of memory on the host: set max_data_loader_n_workers = 4 instead of 8, lower batch_size in the data-set "
        "TOML, use a smaller network_dim than 128, or close other programs (a process that loads pictures was killed)",
    ),
    (
        "a VAE that overflows",
        "RuntimeError: NaN detected in latents: /data/a.png",
        "",
        "the VAE gave no numbers for /data/a.png, for 16 bits are too few for it; set no_half_vae = true in "
        "[trainer.kohya]",
    ),
    (
        "anything else",
        "ValueError: odd",
        "",
        "the training crashed with ValueError: odd (exit status 1); mend what the traceback in its log names",
    ),
]


@pytest.mark.parametrize(
    ("line", "batch_size", "said"), [case[1:] for case in CAUSES], ids=[case[0] for case in CAUSES]
)
def test_a_failure_is_told_with_its_remedy(tmp_path: Path, line: str, batch_size: str, said: str):
    assert KOHYA.diagnose(ended(tmp_path, batch_size), ["Traceback", line]) == said


def test_a_failure_is_told_without_the_file_of_its_settings():
    assert KOHYA.diagnose(None, ["torch.OutOfMemoryError: CUDA out of memory."]).startswith("out of memory on the GPU")

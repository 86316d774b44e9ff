"""Stopping and going on: the weights must be those of a training that never stopped, bit for bit."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimizer_daemon.lora_training.base_model import inspect_base_model
from optimizer_daemon.lora_training.config import load_config
from optimizer_daemon.lora_training.dataset import load_data
from optimizer_daemon.lora_training.identity import identity_of
from optimizer_daemon.lora_training.models import Hardware
from optimizer_daemon.lora_training.stopping import StopWish
from shared.errors import Stopped, StudyMismatchError, UnreadableFileError
from tests.optimizer_daemon.lora_training.workshop import StopAt, Workshop

ROOT = Path(__file__).parents[3]
# Everything random at once: noises, times, dropouts, shuffled and dropped tags, flips.
LIVELY = "shuffle_caption = true\ncaption_tag_dropout_rate = 0.3\nflip_aug = true\nnum_repeats = 3"
SETTINGS = {
    "save_every_n_epochs": 1,
    "max_train_epochs": 3,
    "gradient_accumulation_steps": 2,
    "network_dropout": 0.2,
    "network_args": {"rank_dropout": 0.2, "module_dropout": 0.1},
    "noise_offset": 0.1,
    "noise_offset_random_strength": True,
    "multires_noise_iterations": 3,
    "ip_noise_gamma": 0.1,
}
FORMATS = (torch.float32, torch.bfloat16)
BATCHES = 15  # 3 images x 3 repeats in twos, 3 epochs


def lively(root: Path, like: Workshop) -> Workshop:
    root.mkdir()
    workshop = Workshop(root, like.base, like.cache)
    workshop.dataset(subset=LIVELY)
    return workshop


def assert_same_checkpoints(found: Workshop, expected: Workshop) -> None:
    assert found.checkpoints == expected.checkpoints
    for name in expected.checkpoints:
        tensors, wanted = found.weights(name), expected.weights(name)
        assert tensors.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(tensors[key], wanted[key])] == [], name


def test_wherever_it_stops_it_ends_with_the_same_weights(workshop: Workshop, tmp_path: Path):
    whole = lively(tmp_path / "whole", workshop)
    whole.train(save_precision="float", **SETTINGS)
    rng = random.Random(5)
    for stop in (1, *rng.sample(range(2, BATCHES), 2), BATCHES):
        stopped = lively(tmp_path / f"stopped_at_{stop}", workshop)
        with pytest.raises(Stopped):
            # The first checks are those of the latents, all in the cache by now.
            stopped.train(StopAt(stop), save_precision="float", **SETTINGS)
        assert stopped.state_file.is_file()
        stopped.train(resume=True, save_precision="float", **SETTINGS)
        assert_same_checkpoints(stopped, whole)
        assert not stopped.state_file.parent.exists()
        assert {tag: list(steps) for tag, steps in stopped.scalars().items()} == {
            tag: list(steps) for tag, steps in whole.scalars().items()
        }


@pytest.mark.parametrize(
    "optimizer",
    [
        {"optimizer_type": "AdamW8bit", "optimizer_args": {"min_8bit_size": 16}},
        pytest.param({"optimizer_type": "Lion", "learning_rate": 1e-3}, marks=pytest.mark.slow),
        {"optimizer_type": "Adafactor"},
        {"optimizer_type": "Prodigy", "learning_rate": 1.0},
        pytest.param(
            {"optimizer_type": "torch.optim.SGD", "optimizer_args": {"momentum": 0.9}}, marks=pytest.mark.slow
        ),
    ],
    ids=["AdamW8bit", "Lion", "Adafactor", "Prodigy", "any class"],
)
def test_every_optimizer_goes_on_exactly(workshop: Workshop, tmp_path: Path, optimizer):
    settings = {**SETTINGS, "lr_scheduler": "cosine_with_restarts", "lr_warmup_steps": 3, **optimizer}
    whole = lively(tmp_path / "whole", workshop)
    whole.train(**settings)
    stopped = lively(tmp_path / "stopped", workshop)
    for batch in (4, 5):  # two stops in a row
        with pytest.raises(Stopped):
            stopped.train(StopAt(batch), resume=True, **settings)
    stopped.train(resume=True, **settings)
    assert_same_checkpoints(stopped, whole)
    assert stopped.scalars()["lr/unet"] == whole.scalars()["lr/unet"]


def test_a_training_killed_without_a_word_goes_on_from_its_last_save(workshop: Workshop, tmp_path: Path):
    whole = lively(tmp_path / "whole", workshop)
    whole.train(**SETTINGS)
    killed = lively(tmp_path / "killed", workshop)
    with pytest.raises(Stopped):
        killed.train(StopAt(8), **SETTINGS)
    saved_by_stop = killed.state_file.read_bytes()
    # What a kill leaves is the state of the first epoch's save, so take it from a run that is stopped right after it.
    shutil.rmtree(killed.out)
    with pytest.raises(Stopped):
        killed.train(StopAt(6), **SETTINGS)
    assert killed.checkpoints == ["lora-000001.safetensors"]
    assert killed.state_file.read_bytes() != saved_by_stop
    killed.train(resume=True, **SETTINGS)
    assert_same_checkpoints(killed, whole)


def test_without_resume_an_old_state_is_of_no_account(workshop: Workshop):
    workshop.train(max_train_epochs=2)
    expected = workshop.weights()
    with pytest.raises(Stopped):
        workshop.train(StopAt(2), max_train_epochs=2)
    workshop.train(max_train_epochs=2)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in workshop.weights().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_dim": 8}, r"network_dim was 4 and is 8; restore it, or remove the file to train from the start"),
        ({"seed": 1}, r"seed was 42 and is 1"),
        ({"max_train_epochs": 9}, r"max_train_epochs was 4 and is 9"),
    ],
)
def test_a_state_of_another_training_is_refused(workshop: Workshop, changes, message: str):
    with pytest.raises(Stopped):
        workshop.train(StopAt(2))
    with pytest.raises(StudyMismatchError, match=message):
        workshop.train(resume=True, **changes)


def test_a_state_of_other_images_is_refused(workshop: Workshop):
    workshop.configure()
    with pytest.raises(Stopped):
        workshop.train(StopAt(2))
    (workshop.root / "images/a.txt").write_text("something else")
    with pytest.raises(StudyMismatchError, match="training data was"):
        workshop.train(resume=True)


def test_files_may_be_moved_meanwhile_but_not_changed(workshop: Workshop, tmp_path: Path):
    """The base model and the LoRA to begin with are known by their contents."""
    workshop.train(max_train_epochs=1, save_precision="float")
    start = (tmp_path / "start.safetensors", tmp_path / "moved.safetensors")
    workshop.out.joinpath("lora.safetensors").rename(start[0])
    with pytest.raises(Stopped):
        workshop.train(StopAt(2), network_weights=str(start[0]))
    saved = workshop.state_file.read_bytes()
    shutil.copytree(workshop.base, tmp_path / "moved")
    workshop.base, before = tmp_path / "moved", workshop.base
    start[0].rename(start[1])
    with pytest.raises(Stopped):
        workshop.train(StopAt(2), network_weights=str(start[1]), resume=True)
    workshop.state_file.write_bytes(saved)
    weights = load_file(start[1])
    save_file({name: tensor * 2 if "up.weight" in name else tensor for name, tensor in weights.items()}, start[1])
    with pytest.raises(StudyMismatchError, match="network_weights was"):
        workshop.train(network_weights=str(start[1]), resume=True)
    save_file(weights, start[1])
    unet = tmp_path / "moved/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(before / "unet/diffusion_pytorch_model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, unet)
    with pytest.raises(StudyMismatchError, match="base model was"):
        workshop.train(network_weights=str(start[1]), resume=True)


def test_another_number_format_is_another_training(workshop: Workshop):
    config = load_config(workshop.configure())
    base = inspect_base_model(config.pretrained_model_name_or_path)
    data = load_data(config.dataset_config, batch_size=1, multiple_of=base.vae_factor)
    auto, half = (identity_of(config, data, base, Hardware(torch.device("cpu"), kind)) for kind in FORMATS)
    explicit = config.model_copy(update={"mixed_precision": "no"})
    assert identity_of(explicit, data, base, Hardware(torch.device("cpu"), FORMATS[0])) == auto != half


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-100], lambda b: b"PK" + b[2:500], lambda b: b"", lambda b: b"not an archive"],
    ids=["cut", "torn", "empty", "something else"],
)
def test_a_damaged_state_is_no_start_from_zero_in_disguise(workshop: Workshop, damage):
    with pytest.raises(Stopped):
        workshop.train(StopAt(2))
    workshop.state_file.write_bytes(damage(workshop.state_file.read_bytes()))
    with pytest.raises(
        UnreadableFileError, match=r"no training state \(cut short or overwritten\); remove it to"
    ) as raised:
        workshop.train(resume=True)
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_at_any_moment_leaves_a_state_to_go_on_from(workshop: Workshop, number: signal.Signals):
    workshop.dataset(subset="num_repeats = 1")
    workshop.train(max_train_epochs=1)  # fills the cache: a stop among the latents would leave no state
    workshop.dataset(subset="num_repeats = 4000")  # so long that the signal comes first on any machine
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    wish = StopWish()
    wish.listen()
    timer = threading.Timer(0.6 + random.Random(number).random(), os.kill, (os.getpid(), number))
    try:
        timer.start()
        with pytest.raises(Stopped) as caught:
            workshop.train(wish)
    finally:
        timer.join()
        for kind, handler in before.items():
            signal.signal(kind, handler)
    assert caught.value.exit_code == 128 + number
    state = torch.load(workshop.state_file, weights_only=True)
    position = state["position"]
    assert position["step"] == (position["epoch"] - 1) * 6000 + position["step_in_epoch"] < 24000
    assert len(state["network"]) == 3 * 66


@pytest.mark.slow
def test_sigterm_saves_the_state_and_exits_143(workshop: Workshop, tmp_path: Path):
    """The real process and the real signal, at a step nobody chose."""
    long = "num_repeats = 20\nshuffle_caption = true"
    settings = {"max_train_epochs": 4, "network_dropout": 0.1, "save_every_n_epochs": 2}
    killed = Workshop(tmp_path / "killed", workshop.base, workshop.cache)
    killed.root.mkdir()
    killed.dataset(subset=long)
    command = [sys.executable, "-m", "optimizer_daemon.lora_training", "--config", str(killed.configure(**settings))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = ""
    while not re.search(r"[1-9]\d*/120 \[", output):
        read = process.stdout.read(1)
        assert read, output
        output += read
    time.sleep(random.random())
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=200)
    output += rest
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    assert output.rstrip().endswith("stopped by signal 15")
    saved = re.search(r"^state saved after step (\d+): ", output, re.M)
    assert saved and 1 <= int(saved[1]) < 120
    killed.train(resume=True, **settings)
    whole = Workshop(tmp_path / "whole", workshop.base, workshop.cache)
    whole.root.mkdir()
    whole.dataset(subset=long)
    whole.train(**settings)
    assert_same_checkpoints(killed, whole)

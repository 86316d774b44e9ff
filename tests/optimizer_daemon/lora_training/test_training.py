"""A training as people see it: its log, its TensorBoard, its failures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimizer_daemon.lora_training import text as text_module
from optimizer_daemon.lora_training.reporting import MeanLoss
from optimizer_daemon.lora_training.text import TextConditioning
from optimizer_daemon.trainers.native import TRAINER
from shared.errors import ResourceError, UserError
from shared.progress_bar import Progress
from tests.optimizer_daemon.lora_training.workshop import Workshop

ROOT = Path(__file__).parents[3]
TROUBLE = "tests.optimizer_daemon.lora_training.troublesome"


def test_the_command_trains_and_says_so(workshop: Workshop):
    """The real process, in kohya's words."""
    config = workshop.configure(save_every_n_epochs=2, lr_scheduler="cosine", lr_warmup_steps=2)
    done = subprocess.run(
        [sys.executable, "-m", "optimizer_daemon.lora_training", "--config", str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "240"},
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(epoch .*|saving checkpoint: .*)$", done.stdout, re.M) == [
        "epoch 1/4",
        "epoch 2/4",
        f"saving checkpoint: {workshop.out}/lora-000002.safetensors",
        "epoch 3/4",
        "epoch 4/4",
        f"saving checkpoint: {workshop.out}/lora.safetensors",
    ]
    assert re.search(r"^  total optimization steps: 8$", done.stdout, re.M)
    assert re.search(r"^  optimizer: torch\.optim\.adamw\.AdamW$", done.stdout, re.M)
    assert re.search(r"^  LoRA modules: 18 text encoder, 48 UNet, rank 4, alpha 1$", done.stdout, re.M)
    bars = [bar for bar in re.split(r"[\r\n]+", done.stderr) if bar]
    assert [bar for bar in bars if not bar.startswith("steps: ")] == [], "nothing but the bar on stderr"
    seen = [TRAINER.parse_progress(bar) for bar in bars]
    assert seen[-1] is not None and (seen[-1].epoch, seen[-1].step, seen[-1].steps) == (4, 8, 8)
    assert seen[-1].loss is not None and 0 < seen[-1].loss < 5
    assert {progress.epoch for progress in seen if isinstance(progress, Progress)} == {None, 1, 2, 3, 4}
    assert workshop.checkpoints == ["lora-000002.safetensors", "lora.safetensors"]
    assert workshop.scalars().keys() == {
        "loss/current",
        "loss/average",
        "loss/epoch_average",
        "lr/textencoder",
        "lr/unet",
    }


def test_tensorboard_shows_every_step_under_kohyas_tags(workshop: Workshop):
    workshop.train(lr_scheduler="linear", text_encoder_lr=1e-3, gradient_accumulation_steps=2)
    scalars = workshop.scalars()
    assert {tag: list(steps) for tag, steps in scalars.items()} == {
        "loss/current": [1, 2, 3, 4],
        "loss/average": [1, 2, 3, 4],
        "loss/epoch_average": [1, 2, 3, 4],
        "lr/textencoder": [1, 2, 3, 4],
        "lr/unet": [1, 2, 3, 4],
    }
    assert list(scalars["lr/unet"].values()) == pytest.approx([7.5e-3, 5e-3, 2.5e-3, 0])
    assert list(scalars["lr/textencoder"].values()) == pytest.approx([7.5e-4, 5e-4, 2.5e-4, 0])


def test_a_part_that_is_left_alone_has_no_rate(workshop: Workshop):
    workshop.train(text_encoder_lr=0.0, max_train_epochs=1)
    assert "lr/unet" in workshop.scalars() and "lr/textencoder" not in workshop.scalars()


def test_the_mean_is_that_of_the_last_epochs_batches():
    mean = MeanLoss()
    for place, loss in [(0, 1.0), (1, 3.0), (0, 5.0)]:
        mean.add(place, loss)
    assert mean.value == 4.0
    mean.add(1, 1.0)
    assert mean.value == 3.0


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(workshop: Workshop):
    workshop.train(seed=1)
    first = workshop.weights()
    workshop.train(seed=1)
    assert all(torch.equal(tensor, first[name]) for name, tensor in workshop.weights().items())
    workshop.train(seed=2)
    assert not any(
        torch.equal(tensor, first[name]) for name, tensor in workshop.weights().items() if name.endswith("up.weight")
    )


def test_training_learns(workshop: Workshop):
    workshop.dataset(subset="num_repeats = 10")
    workshop.train(learning_rate=3e-3, network_dim=8, network_alpha=8.0)
    averages = list(workshop.scalars()["loss/epoch_average"].values())
    assert averages[-1] < 0.8 * averages[0], averages


def test_a_frozen_text_encoder_sees_each_caption_once(workshop: Workshop, monkeypatch):
    seen: list[list[str]] = []
    encode = TextConditioning._encode
    monkeypatch.setattr(TextConditioning, "_encode", lambda self, texts: seen.append(texts) or encode(self, texts))
    workshop.train(text_encoder_lr=0.0)
    assert sorted(seen) == [["a blue cube, soft light"], ["a green cone, soft light"], ["a red ball, soft light"]]


def test_captions_that_hardly_come_again_are_not_kept_and_the_others_within_bounds(workshop: Workshop, monkeypatch):
    made: list[TextConditioning] = []
    build = TextConditioning.__init__
    monkeypatch.setattr(TextConditioning, "__init__", lambda self, *a, **k: made.append(self) or build(self, *a, **k))
    workshop.train(text_encoder_lr=0.0, max_train_epochs=1, shuffle_caption=True)
    assert made[-1]._kept == {}
    workshop.train(text_encoder_lr=0.0, max_train_epochs=1)
    one, *others = made[-1]._kept.values()
    assert len(others) == 2
    monkeypatch.setattr(text_module, "_MOST_KEPT_BYTES", 2 * one.size_bytes + 1)
    workshop.train(text_encoder_lr=0.0, max_train_epochs=2)
    assert len(made[-1]._kept) == 2


def test_a_warm_up_that_never_ends_is_mentioned(workshop: Workshop, capsys):
    workshop.train(max_train_epochs=1, lr_scheduler="cosine", lr_warmup_steps=200)
    assert "warning: the warm-up of 200 steps is never over" in capsys.readouterr().out


def test_a_loss_that_stays_nan_ends_the_training(workshop: Workshop):
    workshop.dataset(subset="num_repeats = 30")
    with pytest.raises(
        UserError, match=r"the loss was nan for 20 steps in a row, last at step \d+ of epoch 1; lower the"
    ):
        workshop.train(learning_rate=1e30, max_grad_norm=0.0)
    assert workshop.checkpoints == []


def test_weights_that_no_checkpoint_can_hold_are_not_saved(workshop: Workshop):
    with pytest.raises(
        UserError, match=r"\d+ of 198 weights are not finite in fp16 after epoch 1, first lora_.*; lower"
    ):
        workshop.train(optimizer_type=f"{TROUBLE}.Infinite", max_train_epochs=1)
    assert workshop.checkpoints == []


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "OutOfGpuMemory",
            {"network_dim": 8},
            r"out of memory on the GPU: lower batch_size in .*dataset\.toml \(line 7\), set gradient_checkpointing = "
            r"true, use a smaller network_dim than 8, or pass --gpu-policy defer",
        ),
        (
            "OutOfGpuMemory",
            {"gradient_checkpointing": "auto"},
            r"out of memory on the GPU: lower batch_size in .*, set gradient_checkpointing = true, use a smaller",
        ),
        (
            "OutOfHostMemory",
            {"gradient_checkpointing": True},
            r"out of memory on the host: lower batch_size in .*dataset\.toml \(line 7\), use a smaller "
            r"network_dim than 4, or close other programs",
        ),
    ],
)
def test_a_lack_of_memory_names_the_remedies(workshop: Workshop, kind: str, settings, message: str):
    with pytest.raises(ResourceError, match=message):
        workshop.train(optimizer_type=f"{TROUBLE}.{kind}", **settings)


def test_half_precision_is_for_gpus(workshop: Workshop):
    with pytest.raises(UserError, match="mixed_precision: 'bf16' needs a GPU"):
        workshop.train(mixed_precision="bf16")


def test_a_gpu_that_is_not_there_is_a_missing_resource(workshop: Workshop):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ResourceError, match=r"device 'cuda:0': torch .* sees no CUDA GPU; use device = 'cpu'"):
        workshop.train(device="cuda:0")


def test_a_broken_part_of_the_base_model_is_named(workshop: Workshop, tmp_path: Path):
    import shutil

    shutil.copytree(workshop.base, tmp_path / "broken")
    workshop.base = tmp_path / "broken"
    weights = tmp_path / "broken/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"broken/unet: could not be loaded"):
        workshop.train()

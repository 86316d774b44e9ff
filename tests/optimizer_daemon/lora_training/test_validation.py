"""The validation loss."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from optimizer_daemon.lora_training.dataset import Batch
from optimizer_daemon.lora_training.learner import Learner
from shared.errors import Stopped
from shared.progress_bar import Progress, parse_preparation
from tests.optimizer_daemon.lora_training.pictures import write_images
from tests.optimizer_daemon.lora_training.reference import frozen_latent
from tests.optimizer_daemon.lora_training.test_optimizers import AveragingScheduleFree
from tests.optimizer_daemon.lora_training.workshop import StopAt, Workshop, header_of

AVERAGE, DIVERGENCE = "loss/validation/epoch_average", "loss/validation/epoch_divergence"
HELD = """
  [[datasets.subsets]]
  image_dir = "images"
[[datasets]]
resolution = 64
validation_split = 1.0
  [[datasets.subsets]]
  image_dir = "held"
"""
LEARNS_NOTHING = {"learning_rate": 1e-12, "text_encoder_lr": 0.0}


@pytest.fixture
def held(workshop: Workshop) -> Workshop:
    """A data set to train on, another only to validate with."""
    path = workshop.dataset()
    write_images(workshop.root / "held", {"v": "a yellow ring", "w": "a grey box"}, seed=8)
    text = path.read_text()
    path.write_text(text.replace('  [[datasets.subsets]]\n  image_dir = "images"\n', HELD))
    return workshop


def test_it_is_the_mean_at_fixed_timesteps_with_fixed_noise(held: Workshop):
    """Of the base model itself, since nothing is learned, so each epoch finds the same."""
    held.train(max_train_epochs=2, validation_seed=5, **LEARNS_NOTHING)
    scalars = held.scalars()
    assert list(scalars[AVERAGE]) == [1, 2] and len(set(scalars[AVERAGE].values())) == 1

    load = {"local_files_only": True}
    unet = UNet2DConditionModel.from_pretrained(held.base / "unet", **load).eval()
    encoder = CLIPTextModel.from_pretrained(held.base / "text_encoder", **load).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(held.base / "tokenizer", **load)
    vae = AutoencoderKL.from_pretrained(held.base / "vae", **load).eval()
    scheduler = DDPMScheduler.from_pretrained(held.base / "scheduler", **load)

    def expected(name: str, caption: str) -> float:
        clean = frozen_latent(vae, held.root / f"held/{name}.png")[None]
        ids = tokenizer([caption], padding="max_length", truncation=True, return_tensors="pt").input_ids
        losses = []
        with torch.no_grad():
            states = encoder(ids).last_hidden_state
            for timestep in (200, 400, 600, 800):
                noise, times = torch.randn_like(clean), torch.tensor([timestep])
                predicted = unet(scheduler.add_noise(clean, noise, times), times, states).sample
                losses.append(((predicted - noise) ** 2).mean().item())
        return sum(losses) / 4

    pictures = [("v", "a yellow ring"), ("w", "a grey box")]
    means = []
    for order in (pictures, pictures[::-1]):
        torch.manual_seed(5)  # once: the second batch has noise of its own
        means.append(sum(expected(*picture) for picture in order) / 2)
    found = scalars[AVERAGE][1]
    assert any(found == pytest.approx(mean, rel=2e-4) for mean in means), (found, means)
    assert means[0] != pytest.approx(means[1], rel=5e-4), "the noise does not tell which came first"
    for epoch in (1, 2):
        assert scalars[DIVERGENCE][epoch] == pytest.approx(found - scalars["loss/epoch_average"][epoch], abs=1e-6)


def test_it_drops_nothing_and_leaves_no_trace_in_the_weights(held: Workshop, monkeypatch):
    ways: set[tuple[bool, bool, bool]] = set()
    loss = Learner.loss

    def watched_loss(learner: Learner, batch: Batch, timestep: int | None = None) -> torch.Tensor:
        ways.add((timestep is None, learner.network.training, torch.is_grad_enabled()))
        return loss(learner, batch, timestep)

    monkeypatch.setattr(Learner, "loss", watched_loss)
    held.train(max_train_epochs=2, network_dropout=0.3, validate_every_n_steps=1)
    assert ways == {(True, True, True), (False, False, False)}
    watched = held.weights()
    _, metadata, _ = header_of(held.out / "lora.safetensors")
    assert (metadata["ss_num_validation_images"], metadata["ss_num_train_images"]) == ("2", "3")
    assert list(held.scalars()["loss/validation/step_average"]) == [1, 2, 3, 4]
    held.dataset()
    held.train(max_train_epochs=2, network_dropout=0.3)
    assert all(torch.equal(tensor, watched[name]) for name, tensor in held.weights().items())


def test_a_training_stopped_while_it_validates_goes_on_as_if_it_had_not_been(held: Workshop):
    held.train(max_train_epochs=2, save_every_n_epochs=1)
    whole = {name: held.weights(name) for name in held.checkpoints}
    held_out_of_epoch_1 = 3  # two batches are trained before it
    for file in held.out.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(Stopped):
        held.train(StopAt(held_out_of_epoch_1), max_train_epochs=2, save_every_n_epochs=1)
    assert held.checkpoints == []
    held.train(max_train_epochs=2, save_every_n_epochs=1, resume=True)
    assert held.checkpoints == list(whole)
    for name, weights in whole.items():
        assert all(torch.equal(tensor, weights[key]) for key, tensor in held.weights(name).items()), name
    assert list(held.scalars()[AVERAGE]) == [1, 2]


def test_validations_and_saves_leave_no_trace_in_a_schedule_free_training(held: Workshop):
    """Its way to the weights that are the result, and back, rounds."""
    kind = f"{AveragingScheduleFree.__module__}.AveragingScheduleFree"
    settings = {"max_train_epochs": 3, "save_precision": "float", "optimizer_type": kind, "learning_rate": 0.5}
    often = {**settings, "save_every_n_epochs": 1, "validate_every_n_steps": 1}
    held.train(**often)
    watched = held.weights()
    in_the_second_validation = 4
    with pytest.raises(Stopped):
        held.train(StopAt(in_the_second_validation), **often)
    held.train(resume=True, **often)
    resumed = held.weights()
    held.dataset()
    held.train(**settings)
    for name, tensor in held.weights().items():
        assert torch.equal(tensor, watched[name]) and torch.equal(tensor, resumed[name]), name


def test_a_validation_by_steps_that_a_stop_cuts_off_is_made_up_for_once(held: Workshop, capsys):
    settings = {"max_train_epochs": 2, "validate_every_n_steps": 1}
    for check in (2, 2):  # in the validation after step 1, then, that being done, before step 2
        with pytest.raises(Stopped):
            held.train(StopAt(check), resume=True, **settings)
    held.train(resume=True, **settings)
    assert list(held.scalars()["loss/validation/step_average"]) == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("validation loss after step 1: ") == 1


def test_a_split_leaves_the_rest_to_train_on_and_says_what_is_in_both(workshop: Workshop, capsys):
    captions = {f"image_{n}": "a ball" for n in range(4)}
    workshop.dataset(captions)
    workshop.train(max_train_epochs=2, validation_split=0.4, validate_every_n_epochs=2, **LEARNS_NOTHING)
    said = capsys.readouterr().out
    assert "num train images * repeats: 3\n  num validation images: 2\n" in said
    assert "warning: 1 of the validation images are trained on too" in said
    assert "validation loss after epoch 2: " in said and "validation loss after epoch 1: " not in said
    assert list(workshop.scalars()[AVERAGE]) == [2]


def test_a_long_validation_is_no_silence(held: Workshop, capsys, monkeypatch):
    monkeypatch.setattr("optimizer_daemon.lora_training.validation._SAY_EVERY_S", 0.0)
    held.train(max_train_epochs=1, **LEARNS_NOTHING)
    said = [found for line in capsys.readouterr().out.splitlines() if (found := parse_preparation(line))]
    assert [found for found in said if found.preparing == "validating"] == [
        Progress(None, 1, 2, preparing="validating"),
        Progress(None, 2, 2, preparing="validating"),
    ]

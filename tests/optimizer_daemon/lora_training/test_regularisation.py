"""Regularisation images in training."""

from __future__ import annotations

import json

import pytest

from tests.optimizer_daemon.lora_training.pictures import write_images
from tests.optimizer_daemon.lora_training.reference import reference_losses
from tests.optimizer_daemon.lora_training.workshop import Workshop, header_of

LEARNED = {"a": "sks ball", "b": "sks ball, soft light", "c": "sks ball, low"}
SUBSET = """
  [[datasets.subsets]]
  image_dir = "images/reg"
  is_reg = true
"""


@pytest.mark.parametrize("gamma", [None, 5.0], ids=["", "and by its timestep"])
def test_their_loss_counts_prior_loss_weight_times(workshop: Workshop, gamma):
    """Two of them beside three images: the first comes twice."""
    workshop.dataset(LEARNED, subset=SUBSET)
    regular = {"reg/r": "ball", "reg/s": "ball, soft light"}
    write_images(workshop.root / "images/reg", {"r": "ball", "s": "ball, soft light"}, seed=4)
    workshop.train(seed=11, max_train_epochs=1, prior_loss_weight=0.25, min_snr_gamma=gamma)
    expected = reference_losses(
        workshop.base,
        LEARNED | regular,
        workshop.root / "images",
        epochs=1,
        seed=11,
        lr=1e-2,
        gamma=gamma,
        repeats={"reg/r": 2},
        counts=dict.fromkeys(regular, 0.25),
    )
    assert list(workshop.scalars()["loss/current"].values()) == pytest.approx(expected, rel=2e-4)
    _, metadata, _ = header_of(workshop.out / "lora.safetensors")
    told = {key: metadata[f"ss_{key}"] for key in ("num_train_images", "num_reg_images", "prior_loss_weight")}
    assert told == {"num_train_images": "3", "num_reg_images": "2", "prior_loss_weight": "0.25"}
    assert json.loads(metadata["ss_dataset_dirs"]) == {"images": {"n_repeats": 1, "img_count": 3}}

"""The native trainer's data set against what sd-scripts' own classes made of the same cases: equal, to the last bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizer_daemon.lora_training.captions import Moment, drawn_caption
from optimizer_daemon.lora_training.dataset import ImageSet, TrainingImage, drawn, load_data
from optimizer_daemon.lora_training.dataset_config import Dataset, Subset
from optimizer_daemon.lora_training.latents import read_pixels
from optimizer_daemon.lora_training.size_conditions import time_ids
from shared.validation_split import split_for_validation
from tests.data.sd_scripts_dataset import cases

FOLDER = Path(cases.__file__).parent
GOLDEN: dict[str, Any] = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
MOMENT = Moment(**GOLDEN["moment"])
NAMES = {"train_batch_size": "batch_size"}


def test_every_case_is_in_the_golden_file():
    groups = {"fits": cases.RULES, "captions": cases.CAPTIONS, "splits": cases.SPLITS, "datasets": cases.DATASETS}
    assert {name: GOLDEN[name].keys() for name in groups} == {name: group.keys() for name, group in groups.items()}


@pytest.mark.parametrize("name", cases.RULES)
def test_sizes(name: str):
    rule = Dataset.model_validate({"batch_size": 1, **cases.RULES[name]}).rule
    found = [rule.fit(size) for size in cases.SIZES]
    assert [[list(fit.bucket), list(fit.resized)] for fit in found] == GOLDEN["fits"][name]


@pytest.mark.parametrize("name", cases.CAPTIONS)
def test_captions(name: str):
    keys, caption, epoch, step, total = cases.CAPTIONS[name]
    subset = Subset.model_validate({"image_dir": "none", **keys})
    rng = random.Random(GOLDEN["seed"])
    found = [drawn_caption(caption, subset, rng, Moment(epoch, step, total)) for _ in range(cases.DRAWS)]
    assert found == GOLDEN["captions"][name]


@pytest.mark.parametrize("name", cases.SPLITS)
def test_validation_splits(name: str):
    count, split, seed = cases.SPLITS[name]
    names = [f"{number:03}.png" for number in range(count)]
    assert list(split_for_validation(names, split, seed)) == GOLDEN["splits"][name]


@pytest.mark.parametrize("name", cases.DATASETS)
def test_data_sets(name: str, tmp_path: Path):
    text, command, folders = cases.DATASETS[name]
    cases.write_folders(tmp_path, folders)
    (tmp_path / "dataset.toml").write_text(text, encoding="utf-8")
    keys = dict(command)
    prior_loss_weight = keys.pop("prior_loss_weight", 1.0)
    data = load_data(tmp_path / "dataset.toml", batch_size=keys.pop("train_batch_size", 1), multiple_of=8, command=keys)
    for part, sets in {"training": data.sets, "validation": data.validation}.items():
        expected = [found for found in GOLDEN["datasets"][name][part] if found["images"]]
        assert len(sets) == len(expected), part
        for images, theirs in zip(sets, expected, strict=True):
            assert [_image(image, tmp_path) for image in images.images] == theirs["images"]
            assert _rules(images, part) == _their_rules(theirs)
            assert _batches(images, theirs["batches"], tmp_path, prior_loss_weight) == theirs["batches"]
            if part == "training":
                assert (images.num_train_images, images.num_reg_images) == (
                    theirs["num_train_images"],
                    theirs["num_reg_images"],
                )
                assert [images.count(subset) for subset in images.plan.subsets] == theirs["image_counts"]


def _image(image: TrainingImage, root: Path) -> dict[str, Any]:
    pixels = ((read_pixels(image) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    return {
        "path": str(image.path.relative_to(root)),
        "caption": image.caption,
        "repeats": image.repeats,
        "is_reg": image.subset.is_reg,
        "bucket": list(image.fit.bucket),
        "resized": list(image.fit.resized),
        "pixels": hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16],
    }


def _rules(images: ImageSet, part: str) -> list[Any]:
    dataset = images.plan.dataset.model_dump(mode="json")
    subsets = [subset for subset in images.plan.subsets if part == "training" or not subset.is_reg]
    return [dataset, [subset.model_dump() for subset in subsets]]


def _their_rules(theirs: dict[str, Any]) -> list[Any]:
    def of(values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        # a string that is not set is None there and "" here
        return {
            name: field.default if values[name] is None and field.default == "" else values[name]
            for name, field in fields.items()
        }

    return [
        of(theirs["dataset"], Dataset.model_fields),
        # what images are resized with is told of each data set there, and of each subset here
        [
            {
                **of(subset, Subset.model_fields),
                "resize_interpolation": subset["resize_interpolation"] or theirs["dataset"]["resize_interpolation"],
            }
            for subset in theirs["subsets"]
        ],
    ]


def _batches(images: ImageSet, theirs: list[Any], root: Path, prior_loss_weight: float) -> list[Any]:
    """Return the batches as drawn here, of the images that sd-scripts put together."""
    by_path = {str(image.path.relative_to(root)): image for image in images.images}
    found = []
    for batch in theirs:
        rng = random.Random(GOLDEN["seed"])
        draws = [drawn(by_path[draw["path"]], rng, MOMENT) for draw in batch]
        assert len({draw.image.fit.bucket for draw in draws}) == 1
        assert len(draws) <= images.plan.dataset.batch_size
        found.append(
            [
                {
                    "path": str(draw.image.path.relative_to(root)),
                    "caption": draw.caption,
                    "flipped": draw.flipped,
                    "weight": prior_loss_weight if draw.image.subset.is_reg else 1.0,
                    "size_condition": list(time_ids(draw.image.size, draw.image.fit.bucket, flipped=draw.flipped)),
                }
                for draw in draws
            ]
        )
    return found


@pytest.mark.skipif(
    not {"SD_SCRIPTS_DIR", "SD_SCRIPTS_PYTHON"} <= os.environ.keys(),
    reason="set SD_SCRIPTS_DIR and SD_SCRIPTS_PYTHON to run sd-scripts itself",
)
def test_the_golden_file_is_what_sd_scripts_says(tmp_path: Path):
    program = [os.environ["SD_SCRIPTS_PYTHON"], str(FOLDER / "make_golden.py"), str(tmp_path / "golden.json")]
    subprocess.run(program, check=True, capture_output=True, timeout=280)
    assert json.loads((tmp_path / "golden.json").read_text(encoding="utf-8")) == GOLDEN

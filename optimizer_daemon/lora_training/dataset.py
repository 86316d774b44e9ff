"""The training images, and which of them are drawn in what order at each epoch."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from optimizer_daemon.lora_training.buckets import Fit, Size
from optimizer_daemon.lora_training.captions import drawn_caption, read_caption
from optimizer_daemon.lora_training.dataset_config import DatasetPlan, Subset, load_dataset_config
from shared.errors import UserError
from shared.held_out import IMAGE_SUFFIXES


@dataclass(frozen=True)
class TrainingImage:
    """One file.

    Args:
        path: the file.
        sha256: of the file's bytes.
        size: of the file's picture.
        caption: its caption as read.
        fit: the size it is trained at.
        subset: the rules of its folder.
    """

    path: Path
    sha256: str
    size: Size
    caption: str
    fit: Fit
    subset: Subset


@dataclass(frozen=True)
class Draw:
    """One image as one batch uses it."""

    image: TrainingImage
    caption: str
    flipped: bool


Batch = tuple[Draw, ...]
"""Images of one size."""


@dataclass(frozen=True)
class ImageSet:
    """The images of one [[datasets]] table, without repeats."""

    plan: DatasetPlan
    images: tuple[TrainingImage, ...]

    @property
    def buckets(self) -> dict[Size, list[TrainingImage]]:
        """Images by training size, each as often as its subset repeats it; sorted, so that seeds mean the same."""
        found: dict[Size, list[TrainingImage]] = {}
        for image in self.images:
            found.setdefault(image.fit.bucket, []).extend([image] * image.subset.num_repeats)
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class TrainingData:
    """All images of a dataset TOML."""

    path: Path
    sets: tuple[ImageSet, ...]

    @property
    def images(self) -> list[TrainingImage]:
        return [image for images in self.sets for image in images.images]

    @property
    def num_train_images(self) -> int:
        """Images of one epoch, repeats included."""
        return sum(image.subset.num_repeats for image in self.images)

    @property
    def batches_per_epoch(self) -> int:
        return sum(
            -(-len(members) // images.plan.dataset.batch_size)
            for images in self.sets
            for members in images.buckets.values()
        )

    def epoch_batches(self, seed: int, epoch: int) -> list[Batch]:
        """Return the batches of an epoch, counted from 1: a pure function of the data, the seed and the epoch.

        A batch never mixes sizes; the last of a bucket may be short. The generator is seeded with seed + epoch and
        asked in this order: members of each bucket, order of all batches, then flip and caption of each draw.
        """
        rng = random.Random(seed + epoch)
        batches: list[list[TrainingImage]] = []
        for images in self.sets:
            for members in images.buckets.values():
                rng.shuffle(members)
                batches += _chunks(members, images.plan.dataset.batch_size)
        rng.shuffle(batches)
        return [tuple(_draw(image, rng) for image in batch) for batch in batches]

    def digest(self) -> str:
        """Return the identity of everything that decides the batches; file names and places do not."""
        content = [
            [
                images.plan.dataset.model_dump(mode="json"),
                [
                    [image.sha256, image.caption, image.fit.bucket, image.fit.resized, _rules(image.subset)]
                    for image in images.images
                ],
            ]
            for images in self.sets
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """Return how often each tag occurs, by folder name, as kohya's metadata has it."""
        frequency: dict[str, Counter[str]] = {}
        for image in self.images:
            tags = (tag.strip().lower() for tag in image.caption.split(","))
            frequency.setdefault(image.path.parent.name, Counter()).update(tag for tag in tags if tag)
        return {folder: dict(counts) for folder, counts in frequency.items()}


def load_data(
    path: Path, *, batch_size: int, multiple_of: int, held_out: Collection[str] = frozenset()
) -> TrainingData:
    """Read a dataset TOML, the sizes of its images and their captions; no pixel is decoded.

    Args:
        path: the dataset TOML.
        batch_size: of data sets that set none.
        multiple_of: sizes must be multiples of this many pixels.
        held_out: SHA-256 of files that are left out; whether each is there is not asked.
    Raises:
        UserError: the TOML, a folder, an image or a caption is unusable, or nothing is left to train on.
    """
    plans = load_dataset_config(path, batch_size=batch_size, multiple_of=multiple_of)
    sets = [_without(_image_set(path, plan), frozenset(held_out)) for plan in plans]
    if not any(images.images for images in sets):
        raise UserError(f"{path}: held_out leaves no picture to train on; take some of it out")
    return TrainingData(path, tuple(images for images in sets if images.images))


def check_data(path: Path, *, multiple_of: int) -> None:
    """Read a data set as a training does and decode every picture, as far as it takes to find a damaged file.

    10,000 pictures of a megapixel take half a minute on two cores as JPEG or PNG, more than a minute as WebP.

    Raises:
        UserError: as `load_data`, or a picture is damaged.
    """
    check_pictures(image.path for image in load_data(path, batch_size=1, multiple_of=multiple_of).images)


def check_pictures(files: Iterable[Path]) -> None:
    """Decode pictures as far as it takes to find a damaged one.

    Raises:
        UserError: one is damaged.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for damage in threads.map(_damage, sorted(set(files))):
            if damage is not None:
                threads.shutdown(wait=False, cancel_futures=True)
                raise damage


def _damage(file: Path) -> UserError | None:
    """Decode a picture in the cheapest way that reads it to its end; Pillow lets other threads run meanwhile."""
    try:
        with Image.open(file) as image:
            if image.format == "PNG":
                image.verify()  # each chunk has a checksum
            else:
                image.draft("RGB", (1, 1))  # JPEG: an eighth of the size
                image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return _no_image(file, error)
    return None


def _image_set(toml: Path, plan: DatasetPlan) -> ImageSet:
    images: list[TrainingImage] = []
    for number, subset in enumerate(plan.subsets):
        place = f"{toml}: {plan.place}.subsets[{number}].image_dir"
        images += [
            _training_image(file, plan, subset) for file in _files(place, toml.absolute().parent / subset.image_dir)
        ]
    return ImageSet(plan, tuple(images))


def _without(images: ImageSet, held_out: frozenset[str]) -> ImageSet:
    return ImageSet(images.plan, tuple(image for image in images.images if image.sha256 not in held_out))


def _files(place: str, folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{place}: {folder} is no folder; it counts from the TOML's own folder")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{place}: {folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def _training_image(file: Path, plan: DatasetPlan, subset: Subset) -> TrainingImage:
    try:
        with Image.open(file) as image:
            size = image.size
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise _no_image(file, error) from error
    fit = plan.dataset.rule.fit(size)
    if not all(fit.bucket):
        raise UserError(
            f"{file} is {size[0]} x {size[1]} pixels, less than one bucket step of {plan.dataset.bucket_reso_steps}; "
            "enlarge or remove it"
        )
    return TrainingImage(file, sha256, size, read_caption(file, subset), fit, subset)


def _no_image(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is no readable image ({error}); mend or remove it")


def _draw(image: TrainingImage, rng: random.Random) -> Draw:
    flipped = image.subset.flip_aug and rng.random() < 0.5
    return Draw(image, drawn_caption(image.caption, image.subset, rng), flipped)


def _chunks(members: Sequence[TrainingImage], size: int) -> Iterator[list[TrainingImage]]:
    for start in range(0, len(members), size):
        yield list(members[start : start + size])


def _rules(subset: Subset) -> dict[str, Any]:
    return subset.model_dump(mode="json", exclude={"image_dir", "caption_extension"})

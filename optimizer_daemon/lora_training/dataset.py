"""The training images, and which of them are drawn in what order at each epoch."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from optimizer_daemon.lora_training.buckets import Fit, Size
from optimizer_daemon.lora_training.captions import Moment, drawn_caption, read_caption
from optimizer_daemon.lora_training.dataset_config import DatasetPlan, Subset, load_dataset_config
from shared.errors import UserError
from shared.held_out import IMAGE_SUFFIXES, image_files
from shared.validation_split import split_for_validation


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
        repeats: how often an epoch shows it.
    """

    path: Path
    sha256: str
    size: Size
    caption: str
    fit: Fit
    subset: Subset
    repeats: int = 1


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
    """The images of one [[datasets]] table, without repeats.

    Args:
        plan: the table.
        images: those that are drawn, regularisation images last.
        unused: regularisation images beyond the number of training images.
    """

    plan: DatasetPlan
    images: tuple[TrainingImage, ...]
    unused: tuple[TrainingImage, ...] = ()

    @property
    def buckets(self) -> dict[Size, list[TrainingImage]]:
        """Images by training size, each as often as it repeats; sorted, so that seeds mean the same."""
        found: dict[Size, list[TrainingImage]] = {}
        for image in self.images:
            found.setdefault(image.fit.bucket, []).extend([image] * image.repeats)
        return dict(sorted(found.items()))

    @property
    def num_train_images(self) -> int:
        """Images of one epoch, repeats included, regularisation images not."""
        return sum(image.repeats for image in self.images if not image.subset.is_reg)

    @property
    def num_reg_images(self) -> int:
        """Regularisation images as often as their own subset repeats them, before they are matched to the others."""
        return sum(image.subset.num_repeats for image in (*self.images, *self.unused) if image.subset.is_reg)

    def count(self, subset: Subset) -> int:
        """Return how many images a subset has here."""
        return sum(image.subset is subset for image in (*self.images, *self.unused))


@dataclass(frozen=True)
class TrainingData:
    """All images of a dataset TOML.

    Args:
        path: the dataset TOML.
        sets: what is trained on.
        validation: what only the validation loss sees, each image once.
    """

    path: Path
    sets: tuple[ImageSet, ...]
    validation: tuple[ImageSet, ...] = ()

    @property
    def images(self) -> list[TrainingImage]:
        """Those that are trained on."""
        return [image for images in self.sets for image in images.images]

    @property
    def validation_images(self) -> list[TrainingImage]:
        return [image for images in self.validation for image in images.images]

    @property
    def num_train_images(self) -> int:
        """Images of one epoch, repeats included, regularisation images not."""
        return sum(images.num_train_images for images in self.sets)

    @property
    def num_reg_images(self) -> int:
        """See `ImageSet.num_reg_images`."""
        return sum(images.num_reg_images for images in self.sets)

    @property
    def batches_per_epoch(self) -> int:
        return sum(
            -(-len(members) // images.plan.dataset.batch_size)
            for images in self.sets
            for members in images.buckets.values()
        )

    def epoch_batches(self, seed: int, epoch: int, *, batches_per_step: int = 1, epochs: int = 1) -> list[Batch]:
        """Return the batches of an epoch, counted from 1: a pure function of the data and the arguments.

        A batch never mixes sizes; the last of a bucket may be short. The generator is seeded with seed + epoch and
        asked in this order: members of each bucket, order of all batches, then flip and caption of each draw.

        Args:
            seed: of the training.
            epoch: which.
            batches_per_step: batches of an optimizer step, for captions that warm up.
            epochs: of the whole training, likewise.
        """
        steps = -(-self.batches_per_epoch // batches_per_step)
        rng = random.Random(seed + epoch)
        return [
            tuple(
                drawn(image, rng, Moment(epoch, (epoch - 1) * steps + place // batches_per_step, epochs * steps))
                for image in batch
            )
            for place, batch in enumerate(_shuffled(self.sets, rng))
        ]

    def validation_batches(self, seed: int) -> list[Batch]:
        """Return the batches of every validation: always the same, with captions as after a warm-up."""
        rng = random.Random(seed)
        return [
            tuple(drawn(image, rng, Moment(epoch=1, step=sys.maxsize)) for image in batch)
            for batch in _shuffled(self.validation, rng)
        ]

    def digest(self) -> str:
        """Return the identity of everything that decides the trained batches; file names and places do not."""
        content = [
            [
                images.plan.dataset.model_dump(mode="json"),
                [
                    [
                        image.sha256,
                        image.caption,
                        image.size,
                        image.fit.bucket,
                        image.fit.resized,
                        image.repeats,
                        _rules(image.subset),
                    ]
                    for image in images.images
                ],
            ]
            for images in self.sets
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """Return how often each tag occurs, by folder name, as kohya's metadata has it."""
        frequency: dict[str, Counter[str]] = {}
        for image in (image for images in self.sets for image in (*images.images, *images.unused)):
            tags = (tag.strip().lower() for tag in image.caption.split(","))
            frequency.setdefault(image.path.parent.name, Counter()).update(tag for tag in tags if tag)
        return {folder: dict(counts) for folder, counts in frequency.items()}


def load_data(
    path: Path,
    *,
    batch_size: int,
    multiple_of: int,
    held_out: Collection[str] = frozenset(),
    seed: int = 0,
    command: Mapping[str, Any] | None = None,
) -> TrainingData:
    """Read a dataset TOML, the sizes of its images and their captions; no pixel is decoded.

    Args:
        path: the dataset TOML.
        batch_size: of data sets that set none.
        multiple_of: sizes must be multiples of this many pixels.
        held_out: SHA-256 of files that are left out; whether each is there is not asked.
        seed: of the validation split where the file sets no validation_seed.
        command: further keys of train_config.toml that the file may leave out.
    Raises:
        UserError: the TOML, a folder, an image or a caption is unusable, or nothing is left to train on or to validate
            with.
    """
    plans = load_dataset_config(path, batch_size=batch_size, multiple_of=multiple_of, command=command)
    parts = [_image_sets(path, plan, frozenset(held_out), seed) for plan in plans]
    training = tuple(part for part, _ in parts if part.images)
    validation = tuple(part for _, part in parts if part.images)
    if not training and held_out:
        raise UserError(f"{path}: held_out leaves no picture to train on; take some of it out")
    if not training:
        raise UserError(
            f"{path}: every picture is for regularisation or validation, so there is none to train on; add a subset "
            "without is_reg, or lower validation_split"
        )
    split = next((plan for plan in plans if plan.dataset.validation_split > 0), None)
    if split is not None and not validation:
        raise UserError(
            f"{path}: {split.place}.validation_split: {split.dataset.validation_split} will not do; it rounds to no "
            "picture, so there is none to validate with; raise it, or set it to 0"
        )
    return TrainingData(path, training, validation)


def check_data(
    path: Path, *, multiple_of: int, commands: Sequence[tuple[int, Mapping[str, Any]]] = ((1, {}),)
) -> list[int]:
    """Read a data set as trainings do and decode every picture, as far as it takes to find a damaged file.

    10,000 pictures of a megapixel take half a minute on two cores as JPEG or PNG, more than a minute as WebP.

    Args:
        path: the dataset TOML.
        multiple_of: as in `load_data`.
        commands: batch size and further keys of each training.
    Returns:
        Batches per epoch of each.
    Raises:
        UserError: as `load_data`, or a picture is damaged.
    """
    found = [load_data(path, batch_size=size, multiple_of=multiple_of, command=keys) for size, keys in commands]
    check_pictures(image.path for data in found for image in data.images + data.validation_images)
    return [data.batches_per_epoch for data in found]


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


def _image_sets(toml: Path, plan: DatasetPlan, held_out: frozenset[str], seed: int) -> tuple[ImageSet, ImageSet]:
    """Return what a data set trains on and what it validates with."""
    split, split_seed = plan.dataset.validation_split, plan.dataset.validation_seed
    training: list[TrainingImage] = []
    regularisation: list[TrainingImage] = []
    validation: list[TrainingImage] = []
    for number, subset in enumerate(plan.subsets):
        place = f"{toml}: {plan.place}.subsets[{number}].image_dir"
        images = [
            _training_image(file, plan, subset) for file in _files(place, toml.absolute().parent / subset.image_dir)
        ]
        images = [image for image in images if image.sha256 not in held_out]
        if subset.is_reg:
            regularisation += images
            continue
        ours, theirs = split_for_validation(images, split, seed if split_seed is None else split_seed)
        training += ours
        validation += [replace(image, repeats=1) for image in theirs]
    used, unused = _matched(regularisation, sum(image.repeats for image in training))
    return ImageSet(plan, (*training, *used), tuple(unused)), ImageSet(plan, tuple(validation))


def _matched(images: Sequence[TrainingImage], count: int) -> tuple[list[TrainingImage], list[TrainingImage]]:
    """Return regularisation images, repeated until there are at least `count`, and those that are not needed.

    As in sd-scripts: each comes with its subset's repeats, then once more in turn.
    """
    used: list[TrainingImage] = []
    shown = 0
    for image in images:
        if shown >= count:
            break
        used.append(image)
        shown += image.repeats
    rounds, rest = divmod(max(0, count - shown), len(used)) if used else (0, 0)
    matched = [replace(image, repeats=image.repeats + rounds + (place < rest)) for place, image in enumerate(used)]
    return matched, list(images[len(used) :])


def _files(place: str, folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{place}: {folder} is no folder; it counts from the TOML's own folder")
    files = image_files(folder)
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
    return TrainingImage(file, sha256, size, read_caption(file, subset), fit, subset, repeats=subset.num_repeats)


def _no_image(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is no readable image ({error}); mend or remove it")


def _shuffled(sets: Sequence[ImageSet], rng: random.Random) -> list[list[TrainingImage]]:
    batches: list[list[TrainingImage]] = []
    for images in sets:
        for members in images.buckets.values():
            rng.shuffle(members)
            batches += _chunks(members, images.plan.dataset.batch_size)
    rng.shuffle(batches)
    return batches


def drawn(image: TrainingImage, rng: random.Random, moment: Moment) -> Draw:
    """Return an image as a batch uses it; `rng` is asked for the flip, then for the caption."""
    flipped = image.subset.flip_aug and rng.random() < 0.5
    return Draw(image, drawn_caption(image.caption, image.subset, rng, moment), flipped)


def _chunks(members: Sequence[TrainingImage], size: int) -> Iterator[list[TrainingImage]]:
    for start in range(0, len(members), size):
        yield list(members[start : start + size])


def _rules(subset: Subset) -> dict[str, Any]:
    return subset.model_dump(mode="json", exclude={"image_dir", "caption_extension"})

"""Which pictures of a data set are never trained on, so that likeness to them tells learning from copying.

A pure choice by seed and content: the same pictures are held out wherever they lie and whatever they are called.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import SettingsError, StudyMismatchError
from shared.schemas.pictures import Picture, StudyPictures

FEWEST_TO_SPLIT = 20
"""Below this many pictures each one is needed for the training."""
FEWEST_HELD_OUT = 3
HELD_OUT_PERCENT = 15
MOST_MEASURED = 200
"""The mean of so many pictures is good to a few thousandths; more would only take time."""
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


def hold_out(digests: Iterable[str], seed: int) -> frozenset[str]:
    """Choose the contents that are held out; none where there are too few.

    Args:
        digests: SHA-256 of each picture; equal ones are one picture, or a copy would be trained on.
        seed: the study's.
    """
    contents = sorted(set(digests), key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
    if len(contents) < FEWEST_TO_SPLIT:
        return frozenset()
    count = max(FEWEST_HELD_OUT, (len(contents) * HELD_OUT_PERCENT + 50) // 100)
    return frozenset(contents[:count])


def study_pictures(dataset_config: Path) -> StudyPictures:
    """Look at the pictures of a data set, all of them for training.

    Args:
        dataset_config: kohya dataset TOML.
    Raises:
        SettingsError: a file of it cannot be read.
    """
    files = list_pictures(dataset_config)
    return StudyPictures(
        training=tuple(
            Picture(path=str(file.absolute()), sha256=file_digest(file, "--dataset-config")) for file in files
        )
    )


def with_held_out(pictures: StudyPictures, seed: int) -> StudyPictures:
    """Take the held-out pictures out of the training.

    Args:
        seed: the study's.
    Raises:
        SettingsError: there are too few pictures.
    """
    held = hold_out((picture.sha256 for picture in pictures.training), seed)
    if not held:
        count = len({picture.sha256 for picture in pictures.training})
        raise SettingsError(
            "--dataset-config",
            f"{count} different pictures",
            f"likeness is measured to held-out pictures, which are only taken out of {FEWEST_TO_SPLIT} or more; add "
            "pictures, or leave the likeness metrics and scorings that need them out",
        )
    return StudyPictures(
        held_out=tuple(picture for picture in pictures.training if picture.sha256 in held),
        training=tuple(picture for picture in pictures.training if picture.sha256 not in held),
    )


def pictures_in(folder: Path, setting: str) -> tuple[Picture, ...]:
    """Return the pictures directly in a folder, by name.

    Raises:
        SettingsError: there is no such folder, it holds none, or one cannot be read.
    """
    files = image_files(folder) if folder.is_dir() else []
    if not files:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise SettingsError(setting, str(folder), f"name a folder that holds pictures ({kinds})")
    return tuple(Picture(path=str(file.absolute()), sha256=file_digest(file, setting)) for file in files)


def measured_pictures(pictures: Sequence[Picture]) -> list[Picture]:
    """Choose the pictures whose mean brightness and the like stand for all of them.

    Both daemons measure these, in this order, so that the targets of their plans are equal to the last bit: all, or
    MOST_MEASURED evenly spaced ones in the order of their contents.
    """
    ordered = sorted(pictures, key=lambda picture: picture.sha256)
    count = min(len(ordered), MOST_MEASURED)
    return [ordered[index * len(ordered) // count] for index in range(count)]


def require_unchanged(pictures: Sequence[Picture], what: str) -> None:
    """See that the pictures are still those the study began with.

    Raises:
        StudyMismatchError: one has gone or has another content.
    """
    for picture in pictures:
        try:
            same = _digest(Path(picture.path)) == picture.sha256
        except OSError as error:
            raise StudyMismatchError(
                f"{picture.path}: this {what} picture of the study cannot be read ({error.strerror}); put it back"
            ) from error
        if not same:
            raise StudyMismatchError(
                f"{picture.path}: the content of this {what} picture is not what the study was started with, so "
                "likeness could not be compared; put that file back or start a new study"
            )


def pictures_digest(pictures: Sequence[Picture]) -> str:
    """Return the identity of a set of pictures, whatever their names and order."""
    return hashlib.sha256("\n".join(sorted(picture.sha256 for picture in pictures)).encode()).hexdigest()


def list_pictures(dataset_config: Path) -> list[Path]:
    """Return the pictures of a kohya dataset TOML, regularisation pictures left out; image_dir counts from the file.

    Raises:
        SettingsError: the file is no such TOML, or a folder cannot be read.
    """
    try:
        document = tomllib.loads(dataset_config.read_text(encoding="utf-8"))
        folders = list(dict.fromkeys(_folders(document, dataset_config.absolute().parent)))
        return [file for folder in folders for file in image_files(folder)]
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            "--dataset-config", str(dataset_config), f"name a readable kohya dataset TOML ({error})"
        ) from error
    except (AttributeError, TypeError) as error:  # a list where a table belongs, and the like
        raise SettingsError(
            "--dataset-config", str(dataset_config), f"write its tables as kohya's dataset TOML has them ({error})"
        ) from error


def image_files(folder: Path) -> list[Path]:
    """Return the pictures directly in a folder by name, hidden files left out: macOS leaves `._name.png` beside them.

    Raises:
        OSError: the folder cannot be read.
    """
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def file_digest(file: Path, setting: str) -> str:
    """Return the SHA-256 of a file's bytes.

    Args:
        setting: how the user named it, for messages.
    Raises:
        SettingsError: it cannot be read.
    """
    try:
        return _digest(file)
    except OSError as error:
        raise SettingsError(setting, str(file), f"name a readable file ({error.strerror})") from error


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _folders(document: Mapping[str, Any], beside: Path) -> Iterator[Path]:
    for dataset in document.get("datasets", []):
        for subset in dataset.get("subsets", []):
            merged = {**document.get("general", {}), **dataset, **subset}
            if not merged.get("is_reg") and "image_dir" in merged:
                yield beside / merged["image_dir"]

"""The training pictures of a study as one plain folder, as most programs take them: links, captions, metadata.jsonl.

Each picture has its caption in a .txt of the same name, caption_prefix and caption_suffix included, and metadata.jsonl
holds both for the imagefolder loader of Hugging Face's datasets. Held-out pictures are not in it; num_repeats are
not kept.
"""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer_daemon.dataset_files import caption_extension
from shared.errors import DiskError, SettingsError, UserError
from shared.files import sweep_temp_files, write_text
from shared.held_out import file_digest, image_files
from shared.layout import StudyLayout

METADATA = "metadata.jsonl"
_OUR_NAME = re.compile(r"\d{2,}_.*")


@dataclass(frozen=True)
class CaptionedPicture:
    """One picture.

    Args:
        name: in the folder; the number of its subset keeps equal names apart.
        file: where it is.
        caption: its text, one line.
    """

    name: str
    file: Path
    caption: str


def picture_folder(study: StudyLayout) -> Path:
    """Return where the folder of a study lies."""
    return study.trainer_cache / "pictures"


def check_pictures(dataset_config: Path) -> None:
    """See that there are pictures, that each has a caption that says something, and that each decodes.

    Raises:
        UserError: something of it will not do.
    """
    pictures = list(_pictures(dataset_config))
    if not pictures:
        raise SettingsError("--dataset-config", str(dataset_config), "its folders hold no picture; name others")
    # By name: only this check needs the imaging library, the plans do not.
    dataset: Any = importlib.import_module("optimizer_daemon.lora_training.dataset")
    dataset.check_pictures(picture.file for picture in pictures)


def make_picture_folder(dataset_config: Path, folder: Path, held_out: Set[str]) -> None:
    """Bring the folder to what the data set is now; only what differs is touched, for trainings may be reading it.

    Programs keep files of their own there, such as latents: of what is not wanted only links of ours and the
    captions beside them are removed.

    Args:
        held_out: SHA-256 of the pictures that stay away.
    Raises:
        UserError: a picture or a caption cannot be read.
        DiskError: the folder could not be made.
    """
    pictures = [
        picture
        for picture in _pictures(dataset_config)
        if not held_out or file_digest(picture.file, "--dataset-config") not in held_out
    ]
    texts = {Path(picture.name).with_suffix(".txt").name: picture.caption + "\n" for picture in pictures}
    rows = [json.dumps({"file_name": one.name, "text": one.caption}, ensure_ascii=False) for one in pictures]
    names = {picture.name for picture in pictures}
    texts[METADATA] = "\n".join(rows) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep_temp_files(folder)
        for path in list(folder.iterdir()):
            if path.is_symlink() and _OUR_NAME.fullmatch(path.name) and path.name not in names:
                caption = path.with_suffix(".txt")
                if caption.name not in texts:
                    caption.unlink(missing_ok=True)
                path.unlink()  # last: without it the caption would not be known for ours
        for picture in pictures:
            link = folder / picture.name
            if not link.is_symlink() or link.readlink() != picture.file:
                link.unlink(missing_ok=True)
                link.symlink_to(picture.file)
        for name, text in texts.items():
            path = folder / name
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                write_text(path, text)
    except OSError as error:
        raise DiskError(folder, error) from error


def _pictures(dataset_config: Path) -> Iterator[CaptionedPicture]:
    try:
        document = tomllib.loads(dataset_config.read_text(encoding="utf-8"))
        subsets = [
            {**document.get("general", {}), **dataset, **subset}
            for dataset in document.get("datasets", [])
            for subset in dataset.get("subsets", [])
        ]
        folders = [
            (number, subset, dataset_config.absolute().parent / subset["image_dir"])
            for number, subset in enumerate(subsets, 1)
            if not subset.get("is_reg") and "image_dir" in subset
        ]
        for number, subset, folder in folders:
            for file in image_files(folder):
                yield CaptionedPicture(f"{number:02d}_{file.name}", file, _caption(file, subset))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            "--dataset-config", str(dataset_config), f"name a readable kohya dataset TOML ({error})"
        ) from error
    except (AttributeError, TypeError) as error:  # a list where a table belongs, and the like
        raise SettingsError(
            "--dataset-config", str(dataset_config), f"write its tables as kohya's dataset TOML has them ({error})"
        ) from error


def _caption(file: Path, subset: dict[str, Any]) -> str:
    """Return the caption as sd-scripts complete it; the trigger word often stands in the prefix."""
    parts = (subset.get("caption_prefix"), _written_caption(file, subset), subset.get("caption_suffix"))
    return " ".join(str(part) for part in parts if part)


def _written_caption(file: Path, subset: dict[str, Any]) -> str:
    path = file.with_suffix(caption_extension(subset))
    try:
        caption = path.read_text(encoding="utf-8-sig").partition("\n")[0].strip()
    except FileNotFoundError:
        if subset.get("class_tokens"):
            return str(subset["class_tokens"])
        raise UserError(f"{file} has no caption: {path.name} is missing; write it, or set class_tokens") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the caption as UTF-8") from error
    if not caption:
        raise UserError(f"{path}: its first line is empty; write the caption of {file.name} into it")
    return caption

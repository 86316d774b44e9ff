"""The files of a data set, whichever trainer reads them: what a study is trained on, held to for its whole life."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.errors import SettingsError, StudyMismatchError
from shared.held_out import file_digest, image_files

_SETTING = "--dataset-config"
_MOST_NAMED = 3


def caption_extension(settings: Mapping[str, Any]) -> str:
    """Return the suffix of caption files with its dot, which may be left out of the setting, as in sd-scripts.

    Args:
        settings: of one subset, with those of all tables above it and, lowest, the trainer's own options.
    """
    told = str(settings.get("caption_extension", ".caption"))  # sd-scripts' default
    return f".{told}" if told and not told.startswith(".") else told


def dataset_files(dataset_config: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of a data set's TOML, pictures and captions by path.

    Of the TOML what it says counts, not how it is written. One that is none of kohya's, for a trainer of one's own,
    counts by its bytes alone.

    Args:
        options: the study file's table of the trainer.
    Raises:
        SettingsError: a file cannot be read.
    """
    path = dataset_config.absolute()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        files = dict.fromkeys(_files(document, path.parent, options))  # a folder may be named twice
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, AttributeError, TypeError):
        return {str(path): file_digest(path, _SETTING)}
    except OSError as error:
        raise SettingsError(_SETTING, str(error.filename), f"make it readable ({error.strerror})") from error
    said = json.dumps(document, sort_keys=True, ensure_ascii=False, default=str)
    return {str(path): hashlib.sha256(said.encode()).hexdigest()} | {
        str(file): file_digest(file, _SETTING) for file in files
    }


def require_same_files(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """See that a data set is what it was when its study began.

    Raises:
        StudyMismatchError: it is not; the message names the first files that differ.
    """
    differences = [
        f"{path} {'is new' if path not in before else 'is gone' if path not in now else 'has changed'}"
        for path in sorted({*before, *now})
        if before.get(path) != now.get(path)
    ]
    if differences:
        more = len(differences) - _MOST_NAMED
        raise StudyMismatchError(
            f"the data set is not what the study began with ({'; '.join(differences[:_MOST_NAMED])}"
            f"{f'; and {more} more' if more > 0 else ''}), so new scores could not be compared with the old ones; put "
            "it back as it was, or use another --output-dir and --study-name"
        )


def _files(document: Mapping[str, Any], beside: Path, options: Mapping[str, Any]) -> Iterator[Path]:
    for dataset in document.get("datasets", []):
        for subset in dataset.get("subsets", []):
            settings = {**options, **document.get("general", {}), **dataset, **subset}
            folder = beside / settings.get("image_dir", "")
            if "image_dir" not in settings or not folder.is_dir():  # another program may count from elsewhere
                continue
            yield from image_files(folder)
            extension = caption_extension(settings)
            yield from sorted(
                file
                for file in folder.iterdir()
                if extension and file.name.endswith(extension) and not file.name.startswith(".") and file.is_file()
            )

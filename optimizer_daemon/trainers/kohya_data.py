"""The data set as kohya gets it: links to the pictures, in folders of the study's own.

sd-scripts keep their latents beside the pictures under names that tell neither resolution nor VAE nor base model, so
two studies on one folder, or one picture changed, would train on latents of something else. The outputs of text
encoders that they keep there tell as little of the captions. Hence one set of links for each combination of these:

    trainer_cache/dataset-<settings>.json       the data set's tables, image_dir pointing below
    trainer_cache/data-<contents>/<n>_<m>/<image_dir's name>/     links to its pictures and captions, kohya's latents
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer_daemon.dataset_files import caption_extension
from optimizer_daemon.lora_training.toml_file import read_toml
from optimizer_daemon.trainers.kohya_config import DATA_KEYS
from shared.errors import DiskError, SettingsError, UserError
from shared.files import write_text
from shared.held_out import IMAGE_SUFFIXES, file_digest, image_files
from shared.layout import StudyLayout
from shared.model_folders import digest_model
from shared.schemas import Run

_SETTING = "--dataset-config"


@dataclass(frozen=True)
class Source:
    """One picture with the name it gets and the caption file that kohya would read for it, if any."""

    picture: Path
    name: str
    caption: Path | None


@dataclass(frozen=True)
class Subset:
    """One [[datasets.subsets]] with what lies in its folder; `place` is e.g. datasets[0].subsets[1]."""

    place: str
    folder: Path
    caption_extension: str
    sources: tuple[Source, ...]


def dataset_path(run: Run, study: StudyLayout) -> Path:
    """Return what kohya reads the data set of a study from; whether it is there makes no difference."""
    settings = {
        "base": None if run.plan is None else run.plan.base_digest,
        "family": run.trainer.family,
        "options": {name: value for name, value in run.trainer.options.items() if name in DATA_KEYS},
        "config": run.settings.get("dataset-config"),
    }
    return study.trainer_cache / f"dataset-{_short(settings)}.json"


def read_dataset(path: Path) -> dict[str, Any]:
    """Return the document of a dataset TOML.

    Raises:
        UserError: it is unreadable, or its tables are none that could hold a data set.
    """
    document = read_toml(path)
    datasets = document.get("datasets")
    well_formed = isinstance(datasets, list) and all(
        isinstance(table, dict) and isinstance(table.get("subsets", []), list) for table in datasets
    )
    if not datasets or not well_formed or not isinstance(document.get("general", {}), dict):
        raise UserError(f"{path}: write its tables as [general], [[datasets]] and [[datasets.subsets]]")
    return document


def settings_of_subset(
    options: Mapping[str, Any], document: Mapping[str, Any], dataset: Mapping[str, Any], subset: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what kohya takes for a subset: what no table says falls back on the script's own option."""
    return {**options, **document.get("general", {}), **dataset, **subset}


def list_subsets(path: Path, document: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[Subset]:
    """Yield each subset with its pictures; image_dir counts from the folder of the file.

    Args:
        options: the [trainer.kohya] table.
    Raises:
        UserError: a subset is none of pictures with caption files, or its folder has no pictures.
    """
    for number, dataset in enumerate(document["datasets"]):
        seen: set[Path] = set()
        for index, subset in enumerate(dataset.get("subsets", [])):
            place = f"datasets[{number}].subsets[{index}]"
            for key in ("metadata_file", "conditioning_data_dir"):
                if key in subset:
                    raise UserError(f"{path}: {place}.{key}: only pictures with caption files can be trained on here")
            image_dir = subset.get("image_dir")
            if not isinstance(image_dir, str) or not image_dir:
                raise UserError(f"{path}: {place}.image_dir: {image_dir!r} will not do; name a folder of pictures")
            folder = (path.absolute().parent / image_dir).resolve()
            if folder in seen:
                raise UserError(
                    f"{path}: {place}.image_dir: {image_dir!r} occurs twice in datasets[{number}], and kohya would "
                    "leave the second one out; use num_repeats to see its pictures more often"
                )
            seen.add(folder)
            extension = caption_extension(settings_of_subset(options, document, dataset, subset))
            sources = tuple(_sources(folder, extension))
            if not sources:
                kinds = ", ".join(sorted(IMAGE_SUFFIXES))
                raise UserError(f"{path}: {place}.image_dir: {str(folder)!r} holds no pictures ({kinds})")
            yield Subset(place, folder, extension, sources)


def make_dataset(run: Run, study: StudyLayout) -> Path:
    """Link the data set's pictures and captions and write what kohya reads it from; return that.

    Held-out pictures are left out, by their content, wherever they lie. Links of the same content are used again, and
    with them the latents that are there.

    Raises:
        UserError: the data set cannot be read.
        DiskError: the links could not be made.
    """
    path = Path(str(run.settings["dataset-config"]))
    document = read_dataset(path)
    held_out = {picture.sha256 for picture in run.pictures.held_out} if run.pictures is not None else set()
    subsets = [
        (subset, [(source, digest) for source in subset.sources if (digest := _digest(source)) not in held_out])
        for subset in list_subsets(path, document, run.trainer.options)
    ]
    target = dataset_path(run, study)
    contents = {
        "settings": target.name,
        "tables": document,
        "vae": _vae_digest(run.trainer.options),
        "pictures": [
            [subset.place, [(source.name, digest, _caption_digest(source)) for source, digest in left]]
            for subset, left in subsets
        ],
    }
    farm = study.trainer_cache / f"data-{_short(contents)}"
    folders = iter([_link(subset, [source for source, _ in left], farm) for subset, left in subsets])
    tables = [
        {**dataset, "subsets": [{**table, "image_dir": str(next(folders))} for table in dataset.get("subsets", [])]}
        for dataset in document["datasets"]
    ]
    write_text(target, json.dumps({**document, "datasets": tables}, indent=2, ensure_ascii=False) + "\n")
    return target


def remove_broken_latents(study: StudyLayout) -> list[Path]:
    """Remove the latents that a killed training left half written: kohya would fail on them for ever.

    Only what was written since the last look is read, for the latents of a large data set are gigabytes.

    Raises:
        DiskError: one could not be removed.
    """
    looked = study.trainer_cache / "latents_looked_at"
    try:
        since = looked.stat().st_mtime_ns if looked.exists() else 0
        latents = study.trainer_cache.glob("data-*/*/*/*.npz")
        fresh = sorted(path for path in latents if path.stat().st_mtime_ns >= since)
        broken = [path for path in fresh if not _is_whole(path)]
        for path in broken:
            path.unlink()
        if fresh:
            looked.touch()
    except OSError as error:
        raise DiskError(study.trainer_cache, error) from error
    return broken


def _link(subset: Subset, sources: Iterable[Source], farm: Path) -> Path:
    """Make the folder of one subset and return it; its name is image_dir's, which the LoRA's metadata shows."""
    numbers = re.sub(r"\D+", "_", subset.place).strip("_")
    folder = farm / numbers / (subset.folder.name or "root")
    wanted = {source.name: source.picture for source in sources}
    for source in sources:
        if source.caption is not None:
            wanted[Path(source.name).stem + subset.caption_extension] = source.caption
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.iterdir():
            if entry.is_symlink() and entry.name not in wanted:
                entry.unlink()
        for name, file in wanted.items():
            link = folder / name
            if not link.is_symlink() or link.readlink() != file:
                link.unlink(missing_ok=True)
                link.symlink_to(file)
    except OSError as error:
        raise DiskError(folder, error) from error
    return folder


def _sources(folder: Path, caption_extension: str) -> Iterator[Source]:
    try:
        files = image_files(folder)
    except OSError as error:
        raise SettingsError(_SETTING, str(folder), f"name a folder of pictures ({error.strerror})") from error
    taken: set[str] = set()
    for file in files:
        # Two pictures of one stem and size would share one file of latents.
        stem = file.stem if file.stem not in taken else f"{file.stem}-{file.suffix[1:].lower()}"
        taken.add(stem)
        yield Source(file, stem + file.suffix.lower(), _caption_of(file, caption_extension))


def _caption_of(picture: Path, extension: str) -> Path | None:
    """Return the caption file by kohya's rule: of the same stem, or without the four numbers of a face's place."""
    stem = str(picture.with_suffix(""))
    parts = stem.split("_")
    without_face = "_".join(parts[:-4]) if len(parts) >= 5 else stem
    return next((file for name in (stem, without_face) if (file := Path(name + extension)).is_file()), None)


def _digest(source: Source) -> str:
    return file_digest(source.picture, _SETTING)


def _caption_digest(source: Source) -> str | None:
    return None if source.caption is None else file_digest(source.caption, _SETTING)


def _vae_digest(options: Mapping[str, Any]) -> str | None:
    vae = Path(str(options.get("vae", "")))
    return digest_model(vae, setting="[trainer.kohya] vae") if "vae" in options and vae.exists() else None


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, ValueError):
        return False


def _short(content: object) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

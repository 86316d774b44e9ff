"""kohya's dataset TOML: [general], [[datasets]] and [[datasets.subsets]], each falling back on the one above.

Above all of them is the command, here train_config.toml. image_dir counts from the folder of the file. What kohya knows
and this trainer does not is refused by name, unless it is set to what it is without. docs/dataset.md has the keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from optimizer_daemon.lora_training.buckets import BucketRule, Size
from optimizer_daemon.lora_training.dataset_settings import Interpolation
from optimizer_daemon.lora_training.toml_file import read_toml, unknown_key
from shared.errors import UserError

# kohya's key -> the value that leaves it without effect; None where every value has one.
_UNSUPPORTED: Mapping[str, object] = {
    "alpha_mask": False,
    "cache_info": False,
    "color_aug": False,
    "random_crop": False,
    "face_crop_aug_range": None,
    "custom_attributes": {},
    "network_multiplier": 1.0,
    "metadata_file": None,
    "conditioning_data_dir": None,
}


class _Table(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


Table = TypeVar("Table", bound=_Table)


class Subset(_Table):
    """One folder of images."""

    image_dir: str = Field(min_length=1)
    is_reg: bool = False
    num_repeats: int = Field(1, ge=1)
    caption_extension: str = Field(".caption", pattern=r"^\.?[^./][^/]*$")
    class_tokens: str | None = None
    shuffle_caption: bool = False
    caption_separator: str = Field(",", min_length=1)
    keep_tokens: int = Field(0, ge=0)
    keep_tokens_separator: str = ""
    secondary_separator: str = ""
    enable_wildcard: bool = False
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_dropout_rate: float = Field(0.0, ge=0, le=1)
    caption_dropout_every_n_epochs: int = Field(0, ge=0)
    caption_tag_dropout_rate: float = Field(0.0, ge=0, le=1)
    token_warmup_min: int = Field(1, ge=0)
    token_warmup_step: float = Field(0.0, ge=0)
    flip_aug: bool = False
    resize_interpolation: Interpolation | None = None

    @field_validator("caption_extension")
    @classmethod
    def _with_dot(cls, value: str) -> str:
        return value if value.startswith(".") else f".{value}"


class Dataset(_Table):
    """Folders that are trained at one resolution and batch size."""

    resolution: Size
    batch_size: int = Field(ge=1)
    enable_bucket: bool = False
    min_bucket_reso: int = Field(256, ge=1)
    max_bucket_reso: int = Field(1024, ge=1)
    bucket_reso_steps: int = Field(64, ge=1)
    bucket_no_upscale: bool = False
    validation_split: float = Field(0.0, ge=0, le=1)
    validation_seed: int | None = None

    @field_validator("resolution", mode="before")
    @classmethod
    def _as_pair(cls, value: Any) -> Any:
        pair = [value, value] if type(value) is int else value
        if not isinstance(pair, list) or len(pair) != 2 or any(type(side) is not int or side < 1 for side in pair):
            raise ValueError("one whole number or [width, height], in pixels, is expected")
        return tuple(pair)

    @property
    def rule(self) -> BucketRule:
        return BucketRule(
            resolution=self.resolution,
            enable_bucket=self.enable_bucket,
            min_side=self.min_bucket_reso,
            max_side=self.max_bucket_reso,
            step=self.bucket_reso_steps,
            no_upscale=self.bucket_no_upscale,
        )


@dataclass(frozen=True)
class DatasetPlan:
    """One [[datasets]] table with its subsets; `place` is its name in messages, e.g. "datasets[0]"."""

    place: str
    dataset: Dataset
    subsets: tuple[Subset, ...]


class BatchShape(NamedTuple):
    """What all batches of a data set look like: pictures, and their height and width in pixels."""

    pictures: int
    height: int
    width: int


def batch_shape(plans: Iterable[DatasetPlan]) -> BatchShape | None:
    """Return the shape that all batches have; None where buckets or several tables make several."""
    shapes = {
        None
        if plan.dataset.enable_bucket
        else BatchShape(plan.dataset.batch_size, plan.dataset.resolution[1], plan.dataset.resolution[0])
        for plan in plans
    }
    return shapes.pop() if len(shapes) == 1 else None


_ONLY_IN_A_SUBSET = frozenset({"image_dir", "is_reg", "alpha_mask", "metadata_file", "conditioning_data_dir"})
_NOT_IN_A_SUBSET = frozenset(Dataset.model_fields) | {"network_multiplier"}
_SUBSET_KEYS = (frozenset(Subset.model_fields) | frozenset(_UNSUPPORTED)) - _NOT_IN_A_SUBSET
_ABOVE_KEYS = (frozenset(Subset.model_fields) | frozenset(_UNSUPPORTED) | _NOT_IN_A_SUBSET) - _ONLY_IN_A_SUBSET


def load_dataset_config(
    path: Path, *, batch_size: int, multiple_of: int, command: Mapping[str, Any] | None = None
) -> tuple[DatasetPlan, ...]:
    """Return every data set of the file.

    Args:
        path: the dataset TOML.
        batch_size: of data sets that set none.
        command: further keys of train_config.toml that the file may leave out.
        multiple_of: sizes must be multiples of this many pixels, the base model's VAE factor.
    Raises:
        UserError: the file, a table or a key is unusable; the message names the place in the file.
    """
    document = read_toml(path)
    for key in document:
        if key not in ("general", "datasets"):
            raise unknown_key(path, "", key, ("general", "datasets"))
    general = _table(path, "general", document.get("general", {}), _ABOVE_KEYS)
    plans = []
    for number, raw in enumerate(_tables(path, "datasets", document.get("datasets"))):
        place = f"datasets[{number}]"
        above = _table(path, place, raw, _ABOVE_KEYS | {"subsets"})
        defaults = {**(command or {}), "batch_size": batch_size}
        chain: list[tuple[str, Mapping[str, Any]]] = [
            (place, above),
            ("general", general),
            ("train_config.toml", defaults),
        ]
        dataset = _model(path, Dataset, chain)
        _check_sizes(path, place, dataset, multiple_of)
        subsets = []
        for index, raw_subset in enumerate(_tables(path, f"{place}.subsets", above.get("subsets"))):
            where = f"{place}.subsets[{index}]"
            subset = _table(path, where, raw_subset, _SUBSET_KEYS)
            subsets.append(_model(path, Subset, [(where, subset), *chain]))
            if subsets[-1].image_dir in {earlier.image_dir for earlier in subsets[:-1]}:
                raise UserError(
                    f"{path}: {where}.image_dir: {subsets[-1].image_dir!r} occurs twice in {place}; "
                    "use num_repeats to see its images more often"
                )
        plans.append(DatasetPlan(place, dataset, tuple(subsets)))
    return tuple(plans)


def _tables(path: Path, place: str, value: object) -> list[Any]:
    if value is None or value == []:
        raise UserError(f"{path}: there is no [[{_header(place)}]] table; add one")
    if not isinstance(value, list):
        raise UserError(f"{path}: {place} must be written as [[{_header(place)}]], for there may be several")
    return value


def _header(place: str) -> str:
    return "datasets.subsets" if place.endswith("subsets") else place


def _table(path: Path, place: str, value: object, known: frozenset[str]) -> dict[str, Any]:
    """Return the table, checked for keys that nobody reads."""
    if not isinstance(value, dict):
        raise UserError(f"{path}: {place}: {value!r} will not do; a table is expected")
    for key, content in value.items():
        if key not in known:
            if key in _ABOVE_KEYS | _SUBSET_KEYS:
                table = "[[datasets]]" if key in _NOT_IN_A_SUBSET else "[[datasets.subsets]]"
                raise UserError(f"{path}: {place}.{key}: this key does not belong there; move it to {table}")
            raise unknown_key(path, place, key, known)
        neutral = _UNSUPPORTED.get(key)
        if key in _UNSUPPORTED and (neutral is None or content != neutral):
            raise UserError(
                f"{path}: {place}.{key}: {content!r} will not do; the native trainer does not have this feature, "
                "so take the key out"
            )
    return value


def _model(path: Path, kind: type[Table], chain: list[tuple[str, Mapping[str, Any]]]) -> Table:
    """Build a table from the first value for each key along `chain`, given as (place, table)."""
    origins = {key: place for place, table in reversed(chain) for key in table}
    values = {key: value for _, table in reversed(chain) for key, value in table.items() if key in kind.model_fields}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = str(fault["loc"][0])
        if fault["type"] == "missing":
            raise UserError(f"{path}: {chain[0][0]}.{key} is missing; set it there or above") from error
        expected = fault["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {origins[key]}.{key}: {values[key]!r} will not do; {expected}") from error


def _check_sizes(path: Path, place: str, dataset: Dataset, multiple_of: int) -> None:
    def refuse(key: str, value: object, remedy: str) -> UserError:
        return UserError(f"{path}: {place}.{key}: {value!r} will not do; {remedy}")

    if any(side % multiple_of for side in dataset.resolution) and not dataset.enable_bucket:
        raise refuse("resolution", dataset.resolution, f"this base model needs multiples of {multiple_of} pixels")
    if not dataset.enable_bucket:
        return
    step = dataset.bucket_reso_steps
    if step % multiple_of:
        raise refuse("bucket_reso_steps", step, f"this base model needs a multiple of {multiple_of} pixels")
    if min(dataset.resolution) < step:
        raise refuse("bucket_reso_steps", step, f"it must not exceed the resolution {dataset.resolution}")
    if dataset.bucket_no_upscale:
        return
    if min(dataset.resolution) < dataset.min_bucket_reso - dataset.min_bucket_reso % step:
        raise refuse(
            "min_bucket_reso",
            dataset.min_bucket_reso,
            f"it must not exceed the resolution {dataset.resolution}; lower it",
        )
    if max(dataset.resolution) > dataset.max_bucket_reso + -dataset.max_bucket_reso % step:
        raise refuse(
            "max_bucket_reso",
            dataset.max_bucket_reso,
            f"it must not be below the resolution {dataset.resolution}; raise it",
        )
    if dataset.min_bucket_reso < step:
        raise refuse("min_bucket_reso", dataset.min_bucket_reso, f"it must be at least bucket_reso_steps, {step}")

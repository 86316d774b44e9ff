"""What a data set's TOML may leave to the command; kohya's names and meanings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from optimizer_daemon.lora_training.strict_settings import StrictSettings
from shared.errors import UserError
from shared.strict_json import first_fault

Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]

_Positive = Annotated[int, Field(ge=1)]
_Pair = Annotated[list[_Positive], Field(min_length=2, max_length=2)]
_Count = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]


class DatasetSettings(StrictSettings):
    """What a command says for all data sets that say nothing themselves; None says nothing either."""

    resolution: _Positive | Annotated[list[_Positive], Field(min_length=2, max_length=2)] | None = Field(
        None, description="size in pixels, or [width, height]"
    )
    enable_bucket: bool | None = Field(None, description="images keep about their own aspect ratio")
    min_bucket_reso: _Positive | None = Field(None, description="shortest side of a bucket")
    max_bucket_reso: _Positive | None = Field(None, description="longest side of a bucket")
    bucket_reso_steps: _Positive | None = Field(None, description="a bucket's sides are multiples of this")
    bucket_no_upscale: bool | None = Field(None, description="images are never enlarged")
    resize_interpolation: Interpolation | None = Field(None, description="how images are resized")
    caption_extension: str | None = Field(None, description="suffix of the caption files")
    shuffle_caption: bool | None = Field(None, description="tags are shuffled at each draw")
    caption_separator: str | None = Field(None, min_length=1, description="what stands between tags")
    keep_tokens: _Count | None = Field(None, description="leading tags that stay where they are")
    keep_tokens_separator: str | None = Field(None, description="marks the end of the tags that stay")
    secondary_separator: str | None = Field(None, description="joins tags that stay together")
    enable_wildcard: bool | None = Field(None, description="{a|b} is one of them; any line of a caption file")
    caption_prefix: str | None = Field(None, description="put before each caption")
    caption_suffix: str | None = Field(None, description="put behind each caption")
    caption_dropout_rate: _Share | None = Field(None, description="share of draws without a caption")
    caption_dropout_every_n_epochs: _Count | None = Field(None, description="every Nth epoch has no captions")
    caption_tag_dropout_rate: _Share | None = Field(None, description="share of tags left out of a draw")
    token_warmup_min: _Count | None = Field(None, description="tags shown at the first step")
    token_warmup_step: float | None = Field(
        None, ge=0, description="step, or fraction of all, from which all tags are shown"
    )
    flip_aug: bool | None = Field(None, description="half of the draws are mirrored")
    validation_split: _Share | None = Field(None, description="share of the images that only the validation loss sees")
    validation_seed: int | None = Field(None, description="seed of the split and of every validation; seed if unset")

    @property
    def of_datasets(self) -> dict[str, Any]:
        """Those that say something, by kohya's name in a dataset TOML."""
        values = {name: getattr(self, name) for name in DatasetSettings.model_fields}
        return {name: value for name, value in values.items() if value is not None}


def of_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the study file's [trainer.native] that a data set's TOML may leave to it.

    Raises:
        UserError: one has a value that will not do.
    """
    said = {name: value for name, value in options.items() if name in DatasetSettings.model_fields}
    try:
        DatasetSettings.model_validate(said)
    except ValidationError as error:
        raise UserError(f"[trainer.native] {first_fault(error, said)}") from error
    return said

"""What a data set's TOML may leave to the command; kohya's names and meanings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from optimizer_daemon.lora_training.strict_settings import StrictSettings

Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]


class DatasetSettings(StrictSettings):
    """What a command says for all data sets that say nothing themselves; None says nothing either."""

    resolution: int | list[int] | None = Field(None, description="size in pixels, or [width, height]")
    enable_bucket: bool | None = Field(None, description="images keep about their own aspect ratio")
    min_bucket_reso: int | None = Field(None, description="shortest side of a bucket")
    max_bucket_reso: int | None = Field(None, description="longest side of a bucket")
    bucket_reso_steps: int | None = Field(None, description="a bucket's sides are multiples of this")
    bucket_no_upscale: bool | None = Field(None, description="images are never enlarged")
    resize_interpolation: Interpolation | None = Field(None, description="how images are resized")
    caption_extension: str | None = Field(None, description="suffix of the caption files")
    shuffle_caption: bool | None = Field(None, description="tags are shuffled at each draw")
    caption_separator: str | None = Field(None, description="what stands between tags")
    keep_tokens: int | None = Field(None, description="leading tags that stay where they are")
    keep_tokens_separator: str | None = Field(None, description="marks the end of the tags that stay")
    secondary_separator: str | None = Field(None, description="joins tags that stay together")
    enable_wildcard: bool | None = Field(None, description="{a|b} is one of them; any line of a caption file")
    caption_prefix: str | None = Field(None, description="put before each caption")
    caption_suffix: str | None = Field(None, description="put behind each caption")
    caption_dropout_rate: float | None = Field(None, description="share of draws without a caption")
    caption_dropout_every_n_epochs: int | None = Field(None, description="every Nth epoch has no captions")
    caption_tag_dropout_rate: float | None = Field(None, description="share of tags left out of a draw")
    token_warmup_min: int | None = Field(None, description="tags shown at the first step")
    token_warmup_step: float | None = Field(None, description="step, or fraction of all, from which all tags are shown")
    flip_aug: bool | None = Field(None, description="half of the draws are mirrored")
    validation_split: float | None = Field(None, description="share of the images that only the validation loss sees")
    validation_seed: int | None = Field(None, description="seed of the split and of every validation; seed if unset")

    @property
    def of_datasets(self) -> dict[str, Any]:
        """Those that say something, by kohya's name in a dataset TOML."""
        values = {name: getattr(self, name) for name in DatasetSettings.model_fields}
        return {name: value for name, value in values.items() if value is not None}

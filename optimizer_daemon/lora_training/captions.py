"""Captions as kohya's sd-scripts makes them, one for every time an image is drawn."""

from __future__ import annotations

import random
from pathlib import Path

from optimizer_daemon.lora_training.dataset_config import Subset
from shared.errors import UserError


def read_caption(image: Path, subset: Subset) -> str:
    """Return the first line of the image's caption file, or the subset's class_tokens where there is no such file.

    Raises:
        UserError: neither is there, or the file is empty or not UTF-8.
    """
    file = image.with_suffix(subset.caption_extension)
    try:
        text = file.read_text(encoding="utf-8-sig")  # editors on Windows put a byte order mark
    except FileNotFoundError:
        if subset.class_tokens is not None:
            return subset.class_tokens.partition("\n")[0].strip()
        raise UserError(
            f"{image} has no caption: {file.name} is missing; write it, set caption_extension (now "
            f"{subset.caption_extension!r}), or give the subset class_tokens"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8; save the caption as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file}: could not be read ({error.strerror}); check its permissions") from error
    if not text:
        raise UserError(f"{file} is empty; write the caption of {image.name} into its first line")
    return text.partition("\n")[0].strip()


def drawn_caption(caption: str, subset: Subset, rng: random.Random) -> str:
    """Return the caption of one draw.

    Prefix and suffix come first, so a shuffle takes them along; then the whole caption may be dropped, the tags behind
    the first `keep_tokens` are shuffled, and each of these may be dropped. What was split is joined by ", ".

    Args:
        caption: as read, one line.
        subset: its rules.
        rng: asked only for what the rules need.
    """
    if subset.caption_prefix:
        caption = f"{subset.caption_prefix} {caption}"
    if subset.caption_suffix:
        caption = f"{caption} {subset.caption_suffix}"
    if subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate:
        return ""
    if not subset.shuffle_caption and subset.caption_tag_dropout_rate == 0:
        return caption
    tags = [tag.strip() for tag in caption.strip().split(subset.caption_separator)]
    fixed, movable = tags[: subset.keep_tokens], tags[subset.keep_tokens :]
    if subset.shuffle_caption:
        rng.shuffle(movable)
    if subset.caption_tag_dropout_rate > 0:
        movable = [tag for tag in movable if rng.random() >= subset.caption_tag_dropout_rate]
    return ", ".join(fixed + movable)

"""Captions as kohya's sd-scripts makes them, one for every time an image is drawn."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

from optimizer_daemon.lora_training.dataset_config import Subset
from shared.errors import UserError

_WILDCARD = re.compile(r"\{([^}]+)\}")
_OPEN, _CLOSE = "\ue000", "\ue001"  # private to each program: no caption has them


@dataclass(frozen=True)
class Moment:
    """When an image is drawn.

    Args:
        epoch: counted from 1.
        step: optimizer steps done before.
        total_steps: of the whole training.
    """

    epoch: int = 1
    step: int = 0
    total_steps: int = 0


def read_caption(image: Path, subset: Subset) -> str:
    """Return the caption of an image: the first line of its file, or class_tokens where there is no such file.

    With enable_wildcard it is every line that is not blank. The file is named as the image; for an image whose name
    ends in four numbers that place a face, `name_x_y_w_h`, it may leave them out.

    Raises:
        UserError: neither is there, or the file is empty or not UTF-8.
    """
    parts = image.stem.split("_")
    names = [image.stem, "_".join(parts[:-4])] if len(parts) > 4 else [image.stem]
    files = [image.parent / f"{name}{subset.caption_extension}" for name in names]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        if subset.class_tokens is not None:
            return subset.class_tokens
        raise UserError(
            f"{image} has no caption: {files[0].name} is missing; write it, set caption_extension (now "
            f"{subset.caption_extension!r}), or give the subset class_tokens"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")  # editors on Windows put a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8; save the caption as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file}: could not be read ({error.strerror}); check its permissions") from error
    if not text:
        raise UserError(f"{file} is empty; write the caption of {image.name} into its first line")
    lines = [line.strip() for line in text.split("\n")]
    return "\n".join(filter(None, lines)) if subset.enable_wildcard else lines[0]


def varies(subset: Subset) -> bool:
    """Whether the rules make ever new captions of one, so that hardly any comes twice."""
    return (
        subset.shuffle_caption
        or subset.caption_tag_dropout_rate > 0
        or subset.enable_wildcard
        or subset.token_warmup_step > 0
    )


def drawn_caption(caption: str, subset: Subset, rng: random.Random, moment: Moment) -> str:
    """Return the caption of one draw.

    In this order: prefix and suffix, dropping the whole caption, wildcards, the warm-up's cut, shuffling the tags that
    may move, dropping some of these, joining by ", ", the secondary separator.

    Args:
        caption: as read.
        subset: its rules.
        rng: asked only for what the rules need.
        moment: for the rules that depend on it.
    """
    if subset.caption_prefix:
        caption = f"{subset.caption_prefix} {caption}"
    if subset.caption_suffix:
        caption = f"{caption} {subset.caption_suffix}"
    if subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate:
        return ""
    every = subset.caption_dropout_every_n_epochs
    if every > 0 and moment.epoch % every == 0:
        return ""
    caption = _one_of_each_wildcard(caption, rng) if subset.enable_wildcard else caption.partition("\n")[0]
    if subset.shuffle_caption or subset.token_warmup_step > 0 or subset.caption_tag_dropout_rate > 0:
        first, movable, last = _parts(caption, subset)
        movable = movable[: _warm_count(len(movable), subset, moment)]
        if subset.shuffle_caption:
            rng.shuffle(movable)
        if subset.caption_tag_dropout_rate > 0:
            movable = [tag for tag in movable if rng.random() >= subset.caption_tag_dropout_rate]
        caption = ", ".join(first + movable + last)
    if subset.secondary_separator:
        caption = caption.replace(subset.secondary_separator, subset.caption_separator)
    return caption


def _one_of_each_wildcard(caption: str, rng: random.Random) -> str:
    """Choose a line, then one of each {a|b|c}; {{ and }} stand for braces."""
    if "\n" in caption:
        caption = rng.choice(caption.split("\n"))
    caption = caption.replace("{{", _OPEN).replace("}}", _CLOSE)
    caption = _WILDCARD.sub(lambda found: rng.choice(found[1].split("|")), caption)
    return caption.replace(_OPEN, "{").replace(_CLOSE, "}")


def _parts(caption: str, subset: Subset) -> tuple[list[str], list[str], list[str]]:
    """Return the tags that stay first, those that may move, and those that stay last."""
    if subset.keep_tokens_separator and subset.keep_tokens_separator in caption:
        first, _, rest = caption.partition(subset.keep_tokens_separator)
        movable, _, last = rest.partition(subset.keep_tokens_separator)
        tags = ([tag.strip() for tag in part.split(subset.caption_separator)] for part in (first, movable, last))
        kept_first, may_move, kept_last = (list(filter(None, part)) for part in tags)
        return kept_first, may_move, kept_last
    tags_of_all = [tag.strip() for tag in caption.strip().split(subset.caption_separator)]
    return tags_of_all[: subset.keep_tokens], tags_of_all[subset.keep_tokens :], []


def _warm_count(tags: int, subset: Subset, moment: Moment) -> int:
    """Return how many of the movable tags are shown: all, once the warm-up is over."""
    steps = subset.token_warmup_step
    if steps < 1:
        steps = math.floor(steps * moment.total_steps)
    if not steps or moment.step >= steps:
        return tags
    return math.floor(moment.step * ((tags - subset.token_warmup_min) / steps)) + subset.token_warmup_min

"""The prompts of an evaluation plan: from a file, or drawn from the data set's captions."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from pathlib import Path

from shared.errors import SettingsError


def draw_prompts(captions: Iterable[str], count: int, seed: int) -> tuple[str, ...]:
    """Draw `count` different captions; the same for the same captions in any order. Fewer when there are fewer.

    Raises:
        SettingsError: there is no caption at all.
    """
    known = sorted({" ".join(caption.split()) for caption in captions} - {""})
    if not known:
        raise SettingsError("--prompts", None, "the data set has no captions to draw prompts from; pass a prompt file")
    return tuple(random.Random(seed).sample(known, min(count, len(known))))


def read_prompt_file(path: Path) -> tuple[str, ...]:
    """Return the prompts of a text file, one a line; empty lines and lines that start with # do not count.

    Raises:
        SettingsError: not readable text, no prompt, or an option such as ` --n`, which would be rendered as words.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError("--prompts", str(path), f"name a readable UTF-8 text file ({error})") from error
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        prompt = " ".join(line.split())
        if not prompt or prompt.startswith("#"):
            continue
        if option := re.search(r"(?:^|\s)(--\w+)", prompt):
            raise SettingsError(
                f"{path} line {number}", option[1], "options are not known here; write the prompt alone"
            )
        prompts.append(prompt)
    if not prompts:
        raise SettingsError("--prompts", str(path), "it holds no prompt; write one a line")
    return tuple(prompts)

"""Data sets, captions, sizes and splits that both sd-scripts and the native trainer are asked about.

Read by make_golden.py, which runs in the Python of sd-scripts, and by the test: nothing of either is imported here.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TAGS = "sks, red, ball, soft, warm, low"
KEPT = "1girl, smile ||| hat, scarf, boots, gloves ||| high quality, sharp"

SIZES = [(64, 64), (97, 64), (64, 99), (512, 512), (600, 400), (400, 601), (1920, 1080), (333, 1000), (1000, 333)]
SIZES += [(width, 2000 - width) for width in range(150, 1900, 125)]
RULES: dict[str, dict[str, Any]] = {
    "one size": {"resolution": 512},
    "one size, not square": {"resolution": [512, 768]},
    "buckets of 512": {"resolution": 512, "enable_bucket": True},
    "buckets of an oblong": {"resolution": [768, 512], "enable_bucket": True, "min_bucket_reso": 320},
    "bounds off the step": {
        "resolution": 512,
        "enable_bucket": True,
        "min_bucket_reso": 300,
        "max_bucket_reso": 1000,
    },
    "steps of 32 at 1024": {
        "resolution": 1024,
        "enable_bucket": True,
        "bucket_reso_steps": 32,
        "max_bucket_reso": 2048,
    },
    "never enlarged": {"resolution": 512, "enable_bucket": True, "bucket_no_upscale": True},
    "never enlarged, steps of 8": {
        "resolution": [256, 384],
        "enable_bucket": True,
        "bucket_no_upscale": True,
        "bucket_reso_steps": 8,
    },
}

# name -> (subset keys, caption as read, epoch, optimizer steps done, optimizer steps of the training)
CAPTIONS: dict[str, tuple[dict[str, Any], str, int, int, int]] = {
    "as it is": ({}, TAGS, 1, 0, 100),
    "several lines": ({}, "first, line\nsecond, line", 1, 0, 100),
    "shuffled": ({"shuffle_caption": True}, TAGS, 1, 0, 100),
    "shuffled with blanks and empty tags": ({"shuffle_caption": True}, " a ,, b,c , ", 1, 0, 100),
    "two kept": ({"shuffle_caption": True, "keep_tokens": 2}, TAGS, 1, 0, 100),
    "more kept than there are": ({"shuffle_caption": True, "keep_tokens": 9}, TAGS, 1, 0, 100),
    "another separator": ({"shuffle_caption": True, "caption_separator": ";"}, "a;b ; c;d", 1, 0, 100),
    "prefix and suffix": (
        {"shuffle_caption": True, "keep_tokens": 1, "caption_prefix": "zxc", "caption_suffix": "icon, end"},
        TAGS,
        1,
        0,
        100,
    ),
    "a separator that keeps": ({"shuffle_caption": True, "keep_tokens_separator": "|||"}, KEPT, 1, 0, 100),
    "a separator that keeps the first only": (
        {"shuffle_caption": True, "keep_tokens_separator": "|||", "keep_tokens": 1},
        "a, b ||| c, d, e",
        1,
        0,
        100,
    ),
    "a separator that is not in the caption": (
        {"shuffle_caption": True, "keep_tokens_separator": "|||", "keep_tokens": 1},
        TAGS,
        1,
        0,
        100,
    ),
    "a separator without anything to do": ({"keep_tokens_separator": "|||"}, KEPT, 1, 0, 100),
    "tags that stay together": (
        {"shuffle_caption": True, "secondary_separator": ";;;"},
        "red;;;ball, soft;;;light, low",
        1,
        0,
        100,
    ),
    "tags that stay together, unshuffled": ({"secondary_separator": ";;;"}, "red;;;ball, soft;;;light", 1, 0, 100),
    "tags dropped": ({"caption_tag_dropout_rate": 0.4, "keep_tokens": 1}, TAGS, 1, 0, 100),
    "shuffled and dropped": ({"shuffle_caption": True, "caption_tag_dropout_rate": 0.4}, TAGS, 1, 0, 100),
    "captions dropped": ({"caption_dropout_rate": 0.5, "shuffle_caption": True}, TAGS, 1, 0, 100),
    "captions dropped every second epoch, the first": ({"caption_dropout_every_n_epochs": 2}, TAGS, 1, 0, 100),
    "captions dropped every second epoch, the second": ({"caption_dropout_every_n_epochs": 2}, TAGS, 2, 0, 100),
    "wildcards": ({"enable_wildcard": True}, "a {red|green|blue} {big|small} ball", 1, 0, 100),
    "wildcards and braces": ({"enable_wildcard": True}, "{{a|b}} {c|d}, {{{e|f}}}, {}", 1, 0, 100),
    "wildcards, several lines": (
        {"enable_wildcard": True, "caption_prefix": "zxc", "caption_suffix": "end"},
        "a {red|green} ball\na cube, {low|high}\na cone",
        1,
        0,
        100,
    ),
    "wildcards, shuffled": ({"enable_wildcard": True, "shuffle_caption": True}, "{a|b}, {c|d}, e", 1, 0, 100),
    "warm-up begins": ({"token_warmup_step": 10, "token_warmup_min": 2}, TAGS, 1, 0, 100),
    "warm-up goes on": ({"token_warmup_step": 10, "token_warmup_min": 2}, TAGS, 1, 6, 100),
    "warm-up is over": ({"token_warmup_step": 10, "token_warmup_min": 2}, TAGS, 1, 10, 100),
    "warm-up of a fraction": ({"token_warmup_step": 0.5, "shuffle_caption": True}, TAGS, 2, 30, 100),
    "warm-up of a fraction of nothing": ({"token_warmup_step": 0.005}, TAGS, 1, 0, 100),
    "warm-up with fewer tags than its least": ({"token_warmup_step": 8, "token_warmup_min": 9}, TAGS, 1, 3, 100),
    "everything": (
        {
            "shuffle_caption": True,
            "enable_wildcard": True,
            "keep_tokens_separator": "|||",
            "secondary_separator": ";;;",
            "caption_tag_dropout_rate": 0.2,
            "caption_dropout_rate": 0.1,
            "token_warmup_step": 0.4,
            "token_warmup_min": 2,
            "caption_prefix": "zxc",
        },
        "sks, {cat|dog} ||| red;;;ball, soft, warm, low ||| end\nother ||| lines",
        3,
        25,
        100,
    ),
}
DRAWS = 12

# name -> (pictures, validation_split, validation_seed)
SPLITS: dict[str, tuple[int, float, int]] = {
    f"{count} pictures, {split}, seed {seed}": (count, split, seed)
    for count in (1, 3, 10, 57)
    for split, seed in ((0.1, 42), (0.25, 1), (0.35, 42), (0.5, 7), (1.0, 0))
}

# name -> (dataset TOML, keys of the command, folder -> file -> its width and height or its text)
DATASETS: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "every key falls back": (
        """
[general]
resolution = 128
batch_size = 3
num_repeats = 2
caption_extension = "txt"
keep_tokens = 1

[[datasets]]
resolution = [64, 96]
num_repeats = 5
  [[datasets.subsets]]
  image_dir = "one"
  [[datasets.subsets]]
  image_dir = "two"
  num_repeats = 7
  keep_tokens = 0
  class_tokens = "a thing"

[[datasets]]
batch_size = 4
  [[datasets.subsets]]
  image_dir = "one"
""",
        {"shuffle_caption": True, "flip_aug": True, "train_batch_size": 9},
        {
            "one": {
                "a.png": (64, 64),
                "a.txt": "one, A",
                "b.PNG": (97, 64),
                "b.txt": "b, one\nline two",
                ".c.png": (64, 64),
            },
            "two": {"x_1_2_3_4.png": (70, 64), "x.txt": "a face", "y.bmp": (64, 99)},
        },
    ),
    "the command is the last resort": (
        """
[[datasets]]
  [[datasets.subsets]]
  image_dir = "one"
  caption_dropout_rate = 0.0
[[datasets]]
resolution = 64
validation_split = 0.0
  [[datasets.subsets]]
  image_dir = "one"
""",
        {
            "resolution": [128, 64],
            "train_batch_size": 2,
            "enable_bucket": True,
            "bucket_reso_steps": 8,
            "min_bucket_reso": 32,
            "caption_extension": ".txt",
            "caption_dropout_rate": 0.5,
            "validation_split": 0.5,
            "validation_seed": 3,
        },
        {
            "one": {
                **{f"{name}.png": (60 + 10 * place, 64) for place, name in enumerate("abcdef")},
                **{f"{name}.txt": f"caption, {name}" for name in "abcdef"},
            }
        },
    ),
    "regularisation pictures, too few": (
        """
[[datasets]]
resolution = 64
batch_size = 2
enable_bucket = true
bucket_reso_steps = 8
min_bucket_reso = 32
  [[datasets.subsets]]
  image_dir = "sks"
  class_tokens = "sks ball"
  num_repeats = 5
  flip_aug = true
  [[datasets.subsets]]
  image_dir = "reg"
  class_tokens = "ball"
  is_reg = true
  num_repeats = 2
  [[datasets.subsets]]
  image_dir = "more"
  class_tokens = "toy"
  is_reg = true
""",
        {"prior_loss_weight": 0.5},
        {
            "sks": {"a.png": (64, 64), "b.png": (128, 64), "c.png": (64, 100)},
            "reg": {"a.png": (64, 64), "b.png": (99, 64)},
            "more": {"z.png": (64, 64)},
        },
    ),
    "regularisation pictures, too many": (
        """
[[datasets]]
resolution = 64
  [[datasets.subsets]]
  image_dir = "reg"
  class_tokens = "ball"
  is_reg = true
  num_repeats = 2
  [[datasets.subsets]]
  image_dir = "sks"
  class_tokens = "sks ball"
""",
        {},
        {
            "sks": {"a.png": (64, 64), "b.png": (64, 64), "c.png": (64, 64)},
            "reg": {f"{i}.png": (64, 64) for i in range(5)},
        },
    ),
    "a validation split with regularisation pictures": (
        """
[[datasets]]
resolution = 64
validation_split = 0.4
validation_seed = 11
  [[datasets.subsets]]
  image_dir = "sks"
  class_tokens = "sks ball"
  num_repeats = 3
  shuffle_caption = true
  flip_aug = true
  [[datasets.subsets]]
  image_dir = "reg"
  class_tokens = "ball"
  is_reg = true
[[datasets]]
resolution = 64
validation_split = 1.0
validation_seed = 2
  [[datasets.subsets]]
  image_dir = "held"
  class_tokens = "held out"
""",
        {"validation_seed": 5},
        {
            "sks": {f"{i}.png": (64, 64) for i in range(7)},
            "reg": {"a.png": (64, 64), "b.png": (64, 64)},
            "held": {"a.png": (64, 64), "b.png": (64, 64)},
        },
    ),
    "every way to resize": (
        """
[general]
class_tokens = "x"
resolution = 64
enable_bucket = true
bucket_reso_steps = 8
min_bucket_reso = 32
resize_interpolation = "lanczos"
"""
        + "".join(
            f"""
[[datasets]]
{f'resize_interpolation = "{how}"' if how else ""}
  [[datasets.subsets]]
  image_dir = "one"
"""
            for how in ("", "bilinear", "linear", "bicubic", "cubic", "area", "box")
        )
        + """
[[datasets]]
  [[datasets.subsets]]
  image_dir = "one"
  resize_interpolation = "box"
""",
        {},
        {"one": {"a.png": (64, 64), "b.png": (131, 64), "c.png": (40, 33), "d.png": (300, 301), "e.png": (64, 90)}},
    ),
    "resized by default": (
        """
[[datasets]]
resolution = 64
enable_bucket = true
bucket_reso_steps = 8
min_bucket_reso = 32
  [[datasets.subsets]]
  image_dir = "one"
  class_tokens = "x"
""",
        {},
        {"one": {"a.png": (64, 64), "b.png": (131, 64), "c.png": (40, 33), "d.png": (300, 301), "e.png": (128, 128)}},
    ),
}


def write_folders(root: Path, folders: dict[str, dict[str, Any]]) -> None:
    """Write the files of a data set: pictures of noise, the hardest to resize alike, and captions."""
    for folder, files in folders.items():
        (root / folder).mkdir(parents=True)
        for name, content in files.items():
            path = root / folder / name
            if isinstance(content, str):
                path.write_text(content, encoding="utf-8")
                continue
            width, height = content
            rng = np.random.default_rng(zlib.crc32(f"{folder}/{name}".encode()))
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)

"""The kohya dataset TOML, and what is drawn from it."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from optimizer_daemon.lora_training.captions import Moment, drawn_caption
from optimizer_daemon.lora_training.dataset import Batch, TrainingData, load_data
from optimizer_daemon.lora_training.dataset_config import Subset, load_dataset_config
from shared.errors import UserError
from tests.optimizer_daemon.lora_training.pictures import write_dataset, write_images

EIGHT = {f"image_{n}": f"number {n}" for n in range(8)}


def data_of(path: Path) -> TrainingData:
    return load_data(path, batch_size=1, multiple_of=8)


def rules(**changes) -> Subset:
    return Subset(image_dir="images", **changes)


def drawn(batches: list[Batch]) -> list[str]:
    return [draw.image.path.stem for batch in batches for draw in batch]


# ------------------------------------------------------------------------------------------------------ the tables


FALLBACK = """
[general]
resolution = 128
batch_size = 3
num_repeats = 2
caption_extension = ".txt"
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

[[datasets]]
batch_size = 4

  [[datasets.subsets]]
  image_dir = "one"
"""


def test_a_key_falls_back_on_the_table_above(tmp_path: Path):
    (tmp_path / "d.toml").write_text(FALLBACK)
    first, second = load_dataset_config(tmp_path / "d.toml", batch_size=9, multiple_of=8)
    assert (first.dataset.resolution, first.dataset.batch_size) == ((64, 96), 3)
    assert (second.dataset.resolution, second.dataset.batch_size) == ((128, 128), 4)
    assert [(s.image_dir, s.num_repeats, s.keep_tokens) for s in first.subsets] == [("one", 5, 1), ("two", 7, 0)]
    assert [(s.image_dir, s.num_repeats, s.keep_tokens) for s in second.subsets] == [("one", 2, 1)]


def test_defaults_are_kohyas(tmp_path: Path):
    (tmp_path / "d.toml").write_text("[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'x'\n")
    (plan,) = load_dataset_config(tmp_path / "d.toml", batch_size=9, multiple_of=8)
    assert plan.dataset.model_dump() == {
        "resolution": (512, 512),
        "batch_size": 9,  # of train_config.toml
        "enable_bucket": False,
        "min_bucket_reso": 256,
        "max_bucket_reso": 1024,
        "bucket_reso_steps": 64,
        "bucket_no_upscale": False,
        "validation_split": 0.0,
        "validation_seed": None,
    }
    assert plan.subsets[0].model_dump() == {
        "image_dir": "x",
        "is_reg": False,
        "num_repeats": 1,
        "caption_extension": ".caption",
        "class_tokens": None,
        "shuffle_caption": False,
        "caption_separator": ",",
        "keep_tokens": 0,
        "keep_tokens_separator": "",
        "secondary_separator": "",
        "enable_wildcard": False,
        "caption_prefix": "",
        "caption_suffix": "",
        "caption_dropout_rate": 0.0,
        "caption_dropout_every_n_epochs": 0,
        "caption_tag_dropout_rate": 0.0,
        "token_warmup_min": 1,
        "token_warmup_step": 0.0,
        "flip_aug": False,
        "resize_interpolation": None,
    }


@pytest.mark.parametrize(
    "line",
    ["random_crop = false", "alpha_mask = false", "cache_info = false"],
)
def test_a_feature_we_lack_may_be_named_while_it_is_off(tmp_path: Path, line: str):
    data_of(write_dataset(tmp_path, subset=line))


@pytest.mark.parametrize(
    ("parts", "place"),
    [
        ({"subset": "random_crop = true"}, "datasets[0].subsets[0].random_crop: True will not do; the native trainer"),
        ({"general": "color_aug = true"}, "general.color_aug: True"),
        ({"dataset": "resolution = 64\nnetwork_multiplier = 0.5"}, "datasets[0].network_multiplier: 0.5"),
        (
            {"subset": "validation_split = 0.1"},
            "datasets[0].subsets[0].validation_split: this key does not belong there; move it to [[datasets]]",
        ),
        ({"dataset": "resolution = 64\nvalidation_split = 1.5"}, "datasets[0].validation_split: 1.5 will not do"),
        (
            {"dataset": "resolution = 64\nvalidation_split = 0.1"},
            "datasets[0].validation_split: 0.1 will not do; it rounds to no picture",
        ),
        ({"subset": "resize_interpolation = 'sinc'"}, "datasets[0].subsets[0].resize_interpolation: 'sinc' will not"),
        ({"subset": "token_warmup_step = -1"}, "datasets[0].subsets[0].token_warmup_step: -1 will not do"),
        ({"subset": "metadata_file = 'm.json'"}, "datasets[0].subsets[0].metadata_file: 'm.json'"),
        (
            {"subset": "flip_augg = true"},
            "datasets[0].subsets[0].flip_augg: there is no such key; did you mean 'flip_aug'?",
        ),
        ({"general": "colour = 1"}, "general.colour: there is no such key"),
        (
            {"general": "image_dir = 'x'"},
            "general.image_dir: this key does not belong there; move it to [[datasets.subsets]]",
        ),
        ({"subset": "resolution = 64"}, "datasets[0].subsets[0].resolution: this key does not belong there"),
        ({"dataset": "batch_size = 1"}, "datasets[0].resolution is missing"),
        ({"dataset": "resolution = '64'"}, "datasets[0].resolution: '64' will not do"),
        (
            {"dataset": "resolution = 60"},
            "datasets[0].resolution: (60, 60) will not do; this base model needs multiples of 8",
        ),
        ({"dataset": "resolution = [64, 64, 64]"}, "datasets[0].resolution: [64, 64, 64] will not do"),
        ({"dataset": "resolution = 64\nbatch_size = 0"}, "datasets[0].batch_size: 0 will not do"),
        ({"dataset": "resolution = 64\nbatch_size = true"}, "datasets[0].batch_size: True will not do"),
        ({"general": "num_repeats = 0"}, "general.num_repeats: 0 will not do"),
        ({"general": "caption_dropout_rate = 2.0"}, "general.caption_dropout_rate: 2.0 will not do"),
        (
            {"dataset": "resolution = 64\nenable_bucket = true"},
            "datasets[0].min_bucket_reso: 256 will not do; it must not exceed the resolution (64, 64)",
        ),
        (
            {"dataset": "resolution = 2048\nenable_bucket = true"},
            "datasets[0].max_bucket_reso: 1024 will not do; it must not be below the resolution (2048, 2048)",
        ),
        (
            {"dataset": "resolution = 512\nenable_bucket = true\nbucket_reso_steps = 12"},
            "datasets[0].bucket_reso_steps: 12",
        ),
        (
            {"subset": "[[datasets.subsets]]\nimage_dir = 'images'"},
            "datasets[0].subsets[1].image_dir: 'images' occurs twice in datasets[0]",
        ),
    ],
)
def test_an_unusable_key_is_refused_with_its_place(tmp_path: Path, parts, place: str):
    path = write_dataset(tmp_path, **parts)
    with pytest.raises(UserError) as caught:
        data_of(path)
    assert re.match(rf"{re.escape(str(path))}( line \d+)?: {re.escape(place)}", str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no [[datasets]] table; add one"),
        ("[[datasets]]\nresolution = 64", "there is no [[datasets.subsets]] table; add one"),
        ("[datasets]\nresolution = 64", "datasets must be written as [[datasets]]"),
        ("datasets = [1]", "datasets[0]: 1 will not do; a table is expected"),
        ("[generall]", "generall: there is no such key; did you mean 'general'?"),
        (
            "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nnum_repeats = 1",
            "datasets[0].subsets[0].image_dir is missing",
        ),
        ("= 1", "not valid TOML"),
    ],
)
def test_a_broken_document_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "d.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        data_of(path)
    assert re.match(rf"{re.escape(str(path))}( line \d+)?: {re.escape(message)}", str(caught.value))


# ------------------------------------------------------------------------------------------------ images, captions


def test_images_are_found_beside_the_toml_in_order_whatever_their_case(tmp_path: Path):
    path = write_dataset(tmp_path, {"b": "2", "a": "1", "._a": None})
    (tmp_path / "images/b.png").rename(tmp_path / "images/b.PNG")
    (tmp_path / "images/notes.md").write_text("not an image")
    assert [(image.path.name, image.caption) for image in data_of(path).images] == [("a.png", "1"), ("b.PNG", "2")]


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        ("a red ball\nsecond line", "a red ball"),
        ("  a red ball \r\n", "a red ball"),
        ("\ufeffa red ball", "a red ball"),
        ("\na red ball", ""),
        ("紅色的球, 柔光", "紅色的球, 柔光"),
    ],
    ids=[
        "only the first line counts",
        "blanks around it do not",
        "nor a byte order mark",
        "an empty first line",
        "any script",
    ],
)
def test_the_caption_is_the_first_line(tmp_path: Path, content: str, caption: str):
    (image,) = data_of(write_dataset(tmp_path, {"a": content})).images
    assert image.caption == caption


def test_class_tokens_stand_in_for_a_missing_caption_only(tmp_path: Path):
    path = write_dataset(tmp_path, {"a": "a red ball", "b": None}, subset="class_tokens = 'sks ball'")
    assert [image.caption for image in data_of(path).images] == ["a red ball", "sks ball"]


def test_a_missing_caption_is_one_error_that_names_the_image(tmp_path: Path):
    path = write_dataset(tmp_path, {"a": "a red ball", "b": None})
    with pytest.raises(UserError, match=r"images/b\.png has no caption: b\.txt is missing; write it, set caption_ext"):
        data_of(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty; write the caption of a.png"), (b"caf\xe9", "byte 3 is not UTF-8")],
    ids=["an empty file", "another encoding"],
)
def test_an_unusable_caption_file_is_named(tmp_path: Path, content: bytes, message: str):
    path = write_dataset(tmp_path, {"a": "x"})
    (tmp_path / "images/a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        data_of(path)


def test_folders_without_images_are_refused(tmp_path: Path):
    path = write_dataset(tmp_path, {})
    with pytest.raises(UserError, match=r"datasets\[0\]\.subsets\[0\]\.image_dir: .*images holds no image"):
        data_of(path)
    (tmp_path / "images").rmdir()
    with pytest.raises(UserError, match=r"image_dir: .*images is no folder; it counts from the TOML's own folder"):
        data_of(path)


def test_a_file_that_is_no_image_is_named(tmp_path: Path):
    path = write_dataset(tmp_path)
    (tmp_path / "images/b.png").write_bytes(b"GIF?")
    with pytest.raises(UserError, match=r"b\.png is no readable image .*; mend or remove it"):
        data_of(path)


def test_an_image_below_one_bucket_step_is_refused(tmp_path: Path):
    path = write_dataset(
        tmp_path, dataset="resolution = 512\nenable_bucket = true\nbucket_no_upscale = true\nbucket_reso_steps = 128"
    )
    with pytest.raises(UserError, match=r"a\.png is 64 x 64 pixels, less than one bucket step of 128"):
        data_of(path)


# ------------------------------------------------------------------------------------------------- captions drawn


TAGS = "sks, red, ball, soft, warm, low"


@pytest.mark.parametrize(
    ("subset", "expected"),
    [
        (rules(), {TAGS}),
        (rules(caption_prefix="zxc", caption_suffix="icon"), {f"zxc {TAGS} icon"}),
        (rules(caption_dropout_rate=1.0, caption_prefix="zxc"), {""}),
        (rules(caption_tag_dropout_rate=1.0, keep_tokens=2), {"sks, red"}),
        (rules(caption_tag_dropout_rate=1.0), {""}),
        (rules(shuffle_caption=True, keep_tokens=6), {TAGS}),
        (rules(shuffle_caption=True, keep_tokens=5), {TAGS}),
        (rules(shuffle_caption=True, keep_tokens=4), {TAGS, "sks, red, ball, soft, low, warm"}),
        (rules(shuffle_caption=True, caption_separator="|"), {TAGS}),
        (
            rules(shuffle_caption=True, keep_tokens=4, caption_prefix="zxc"),
            {f"zxc {TAGS}", "zxc sks, red, ball, soft, low, warm"},
        ),
    ],
    ids=[
        "nothing asked, nothing changed",
        "prefix and suffix, joined by a blank",
        "a dropped caption is empty, prefix and all",
        "kept tags are never dropped",
        "all tags may be dropped",
        "as many kept as there are",
        "one movable tag",
        "two movable tags",
        "another separator makes one tag of it",
        "the prefix belongs to the first tag",
    ],
)
def test_the_captions_one_image_may_get(subset: Subset, expected: set[str]):
    rng = random.Random(1)
    assert {drawn_caption(TAGS, subset, rng, Moment()) for _ in range(60)} == expected


def test_shuffled_tags_are_rejoined_with_a_comma_whatever_separated_them():
    subset = rules(shuffle_caption=True, keep_tokens=9, caption_separator=";")
    assert drawn_caption("a ;b;  c", subset, random.Random(0), Moment()) == "a, b, c"


def test_dropout_rates_are_shares():
    rng = random.Random(2)
    captions = [drawn_caption("a, b", rules(caption_dropout_rate=0.3), rng, Moment()) for _ in range(4000)]
    assert captions.count("") / 4000 == pytest.approx(0.3, abs=0.03)
    tags = Counter(
        drawn_caption("k, a, b", rules(caption_tag_dropout_rate=0.2, keep_tokens=1), rng, Moment()) for _ in range(4000)
    )
    assert tags["k, a, b"] / 4000 == pytest.approx(0.64, abs=0.03)
    assert tags["k"] / 4000 == pytest.approx(0.04, abs=0.02)


# ---------------------------------------------------------------------------------------------------------- epochs


def test_an_epoch_shows_every_image_as_often_as_it_repeats(tmp_path: Path):
    data = data_of(write_dataset(tmp_path, EIGHT, subset="num_repeats = 3"))
    for epoch in (1, 2):
        assert Counter(drawn(data.epoch_batches(7, epoch))) == dict.fromkeys(EIGHT, 3)
    assert (data.num_train_images, data.batches_per_epoch) == (24, 12)


def test_order_follows_from_seed_plus_epoch_alone(tmp_path: Path):
    data = data_of(write_dataset(tmp_path, EIGHT, subset="shuffle_caption = true\nflip_aug = true"))
    assert data.epoch_batches(7, 2) == data.epoch_batches(7, 2)
    assert data.epoch_batches(7, 2) == data.epoch_batches(8, 1)
    orders = {tuple(drawn(data.epoch_batches(7, epoch))) for epoch in range(1, 9)}
    assert len(orders) == 8


def test_the_last_batch_is_short(tmp_path: Path):
    data = data_of(write_dataset(tmp_path, EIGHT, dataset="resolution = 64\nbatch_size = 3"))
    assert sorted(map(len, data.epoch_batches(1, 1))) == [2, 3, 3]
    assert data.batches_per_epoch == 3


def test_batches_never_mix_sizes(tmp_path: Path):
    bucketed = "enable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 8"
    path = write_dataset(tmp_path, EIGHT, dataset=f"resolution = 64\nbatch_size = 3\n{bucketed}")
    write_images(tmp_path / "images", {f"wide_{n}": "wide" for n in range(4)}, size=(96, 64))
    data = data_of(path)
    batches = data.epoch_batches(1, 1)
    assert data.batches_per_epoch == len(batches) == 3 + 2
    assert all(len({draw.image.fit.bucket for draw in batch}) == 1 for batch in batches)
    assert Counter(draw.image.fit.bucket for batch in batches for draw in batch) == {(64, 64): 8, (80, 48): 4}
    assert list(data.sets[0].buckets) == [(64, 64), (80, 48)]


def test_several_datasets_take_turns_in_one_epoch(tmp_path: Path):
    (tmp_path / "d.toml").write_text(FALLBACK)
    write_images(tmp_path / "one", {"a": "1", "b": "2"})
    write_images(tmp_path / "two", {"c": "3"})
    data = data_of(tmp_path / "d.toml")
    batches = data.epoch_batches(3, 1)
    # 2 x 5 + 1 x 7 images in threes, then 2 x 2 in fours.
    assert len(batches) == data.batches_per_epoch == 6 + 1
    assert Counter(drawn(batches)) == {"a": 5 + 2, "b": 5 + 2, "c": 7}


def test_half_of_the_draws_are_flipped_where_asked(tmp_path: Path):
    data = data_of(write_dataset(tmp_path, EIGHT, subset="flip_aug = true\nnum_repeats = 200"))
    flips = [draw.flipped for batch in data.epoch_batches(1, 1) for draw in batch]
    assert sum(flips) / len(flips) == pytest.approx(0.5, abs=0.04)
    still = data_of(write_dataset(tmp_path, EIGHT))
    assert not any(draw.flipped for batch in still.epoch_batches(1, 1) for draw in batch)


def test_the_digest_is_that_of_what_decides_the_batches(tmp_path: Path):
    first = data_of(write_dataset(tmp_path / "one", EIGHT)).digest()
    assert data_of(write_dataset(tmp_path / "two", EIGHT)).digest() == first
    changed = {
        "another caption": write_dataset(tmp_path / "caption", {**EIGHT, "image_3": "other"}),
        "another size": write_dataset(tmp_path / "size", EIGHT, dataset="resolution = 32\nbatch_size = 2"),
        "another batch size": write_dataset(tmp_path / "batch", EIGHT, dataset="resolution = 64\nbatch_size = 4"),
        "other repeats": write_dataset(tmp_path / "repeats", EIGHT, subset="num_repeats = 2"),
        "other pixels": write_dataset(tmp_path / "pixels", EIGHT),
    }
    write_images(tmp_path / "pixels/images", {"image_0": "number 0"}, seed=9)
    for what, path in changed.items():
        assert data_of(path).digest() != first, what


def test_tags_are_counted_by_folder(tmp_path: Path):
    data = data_of(write_dataset(tmp_path, {"a": "Red, soft light", "b": "red,, soft Light"}))
    assert data.tag_frequency() == {"images": {"red": 2, "soft light": 2}}


def test_held_out_contents_are_left_out_and_leaving_out_all_is_refused(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    toml = tmp_path / "d.toml"
    toml.write_text('[[datasets]]\nresolution = 8\n[[datasets.subsets]]\nimage_dir = "pictures"\nclass_tokens = "a"\n')
    everything = load_data(toml, batch_size=1, multiple_of=8)
    digests = [image.sha256 for image in everything.images]
    some = load_data(toml, batch_size=1, multiple_of=8, held_out=[digests[1]])
    assert [image.path.name for image in some.images] == ["0.png", "2.png"]
    assert some.digest() != everything.digest()
    with pytest.raises(UserError, match="held_out leaves no picture"):
        load_data(toml, batch_size=1, multiple_of=8, held_out=digests)

"""Pictures on disk: laid out, the same bytes every time, and read by others as they were made."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluator_daemon.job import Job
from evaluator_daemon.pictures import AppliedLora, descriptions, grid, read_pictures, to_png, write_pictures
from shared.layout import StudyLayout
from shared.safetensors_file import read_checkpoint
from shared.schemas import EvaluationPlan, PromptOptions, ScoringPreset
from tests.evaluator_daemon.tiny_models import lora_bytes

LORA = AppliedLora("lora_trial_5-000002", "abcdef123456", 1.0)


def job(**changes) -> Job:
    values = {
        "prompts": ("a red ball, pixar style",), "negative_prompt": "", "num_samples": 2, "base_seed": 42,
        "width": 512, "height": 512, "steps": 20, "sampler": "dpmpp_2m_karras", "cfg_scale": 7.5, "clip_skip": 1,
        "base_digest": "0123456789abcdef" * 4, "vae_digest": None, "lora_scale": 1.0, "dtype": "float32",
        "batch_size": 2, "scoring": ScoringPreset(name="seed", objective="combined_score", values={}),
    }  # fmt: skip
    return Job(Path(), EvaluationPlan(**values | changes), Path("/models/sd15"), None, "cpu", 1, 1.0, 1.0)


# The web UI's own reading, written anew from its published regular expression and rules
# (stable-diffusion-webui 1.10, modules/infotext_utils.py, parse_generation_parameters).
PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
SIZE = re.compile(r"^(\d+)x(\d+)$")


def as_the_web_ui_reads_it(text: str) -> dict[str, str]:
    *words, settings = text.strip().split("\n")
    if len(PARAMETER.findall(settings)) < 3:
        words, settings = [*words, settings], ""
    split = next((n for n, line in enumerate(words) if line.startswith("Negative prompt:")), len(words))
    found = {
        "Prompt": "\n".join(words[:split]),
        "Negative prompt": "\n".join(words[split:]).removeprefix("Negative prompt:").strip(),
    }
    for name, value in PARAMETER.findall(settings):
        plain = json.loads(value) if value[0] == value[-1] == '"' else value
        size = SIZE.match(plain)
        found |= {f"{name}-1": size[1], f"{name}-2": size[2]} if size else {name: plain}
    return found


def test_a_picture_says_how_it_was_made_in_the_web_uis_form():
    text = descriptions(job(clip_skip=2, negative_prompt="ugly, flat"), LORA)[1]
    assert text == (
        "a red ball, pixar style <lora:lora_trial_5-000002:1>\n"
        "Negative prompt: ugly, flat\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 43, Size: 512x512, Model hash: 0123456789, "
        'Model: sd15, Clip skip: 2, RNG: CPU, Lora hashes: "lora_trial_5-000002: abcdef123456", '
        "Version: lora-tuner 0.1.0"
    )
    assert as_the_web_ui_reads_it(text) == {
        "Prompt": "a red ball, pixar style <lora:lora_trial_5-000002:1>",
        "Negative prompt": "ugly, flat",
        "Steps": "20",
        "Sampler": "DPM++ 2M Karras",
        "CFG scale": "7.5",
        "Seed": "43",
        "Size-1": "512",
        "Size-2": "512",
        "Model hash": "0123456789",
        "Model": "sd15",
        "Clip skip": "2",
        "RNG": "CPU",
        "Lora hashes": "lora_trial_5-000002: abcdef123456",
        "Version": "lora-tuner 0.1.0",
    }


@pytest.mark.parametrize(
    ("changes", "lora", "expected"),
    [
        pytest.param({}, None, {"Prompt": "a red ball, pixar style", "Negative prompt": ""}, id="the base model"),
        pytest.param({"prompts": ("藍色的球: 1, 2, 3",)}, LORA,
                     {"Prompt": "藍色的球: 1, 2, 3 <lora:lora_trial_5-000002:1>"}, id="another script, commas"),
        pytest.param({"prompts": ("a\nball",)}, None, {"Prompt": "a ball"}, id="a line break in an old plan"),
        pytest.param({"cfg_scale": 7.0}, None, {"CFG scale": "7"}, id="a whole guidance scale"),
        pytest.param({"lora_scale": 0.8}, AppliedLora("x", "0" * 12, 0.8),
                     {"Prompt": "a red ball, pixar style <lora:x:0.8>"}, id="another strength"),
        pytest.param({"overrides": (PromptOptions(width=64, height=72, seed=7, sampler="euler", steps=5),)}, None,
                     {"Size-1": "64", "Size-2": "72", "Seed": "7", "Sampler": "Euler", "Steps": "5"}, id="own options"),
    ],
)  # fmt: skip
def test_the_web_ui_reads_every_value_back(changes, lora, expected):
    found = as_the_web_ui_reads_it(descriptions(job(**changes), lora)[0])
    assert expected.items() <= found.items()


def test_the_lora_is_named_by_the_hash_that_the_web_ui_computes(tmp_path):
    raw = lora_bytes(3)
    (length,) = struct.unpack("<Q", raw[:8])
    (tmp_path / "lora.safetensors").write_bytes(raw)
    applied = AppliedLora.of(read_checkpoint(tmp_path / "lora.safetensors", tmp_path), 1.0)
    assert applied.short_hash == hashlib.sha256(raw[8 + length :]).hexdigest()[:12]


def picture(height: int, width: int, value: int) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_pictures_of_unequal_size_lie_in_the_middle_of_equal_cells():
    sheet = grid([picture(4, 8, 10), picture(8, 4, 20), picture(8, 8, 30), picture(2, 2, 40), picture(8, 8, 50)])
    assert sheet.shape == (16, 32, 3)
    cells = [sheet[top : top + 8, left : left + 8, 0] for top in (0, 8) for left in (0, 8, 16, 24)]
    assert (cells[0][2:6] == 10).all()
    assert cells[0].sum() == 32 * 10, "bars above and below"
    assert (cells[1][:, 2:6] == 20).all()
    assert cells[1].sum() == 32 * 20, "bars left and right"
    assert (cells[2] == 30).all()
    assert (cells[3][3:5, 3:5] == 40).all()
    assert (cells[4] == 50).all()
    assert sum(int(cell.sum()) for cell in cells[5:]) == 0, "an unfilled end"
    assert grid([picture(4, 8, 10)] * 3).shape == (4, 24, 3)


@pytest.mark.parametrize("words", ["a ball", "藍色的球"])
def test_a_file_holds_the_pixels_and_the_text_and_is_the_same_every_time(tmp_path, words):
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    content = to_png(noise, words)
    assert content == to_png(noise.copy(), words)
    assert content != to_png(noise, words + ".")
    (tmp_path / "x.png").write_bytes(content)
    with Image.open(tmp_path / "x.png") as image:
        assert image.text == {"parameters": words}
        assert (np.asarray(image) == noise).all()
    assert _chunks(content)[1] == (b"tEXt" if words.isascii() else b"iTXt")


def _chunks(content: bytes) -> list[bytes]:
    kinds, at = [], 8
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        kinds.append(kind)
        at += 12 + length
    return kinds


def test_samples_and_sheet_are_written_and_those_of_a_larger_plan_go(tmp_path):
    layout = StudyLayout(tmp_path).trial(1).evaluations.checkpoint("x")
    layout.folder.parent.mkdir(parents=True)
    shapes = [(16, 16), (24, 8), (16, 16)]
    many = [picture(*shape, index) for index, shape in enumerate(shapes)]
    write_pictures(layout, many, ["one", "two", "three"])
    assert all((a == b).all() for a, b in zip(read_pictures(layout, 3), many, strict=True))
    for file, text in ((layout.sample(1), "two"), (layout.grid, "one")):
        with Image.open(file) as image:
            assert image.text["parameters"] == text
    before = layout.sample(0).read_bytes()
    write_pictures(layout, many[:1], ["one"])
    assert sorted(path.name for path in layout.folder.iterdir()) == ["grid.png", "sample_0.png"]
    assert layout.sample(0).read_bytes() == before

"""What the UNet is told of captions and sizes, against what sd-scripts' own functions told it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from optimizer_daemon.lora_training.size_conditions import time_ids
from optimizer_daemon.lora_training.text import TextConditioning
from shared.clip_tokenizers import kohya_tokenizer_folder, write_tokenizer
from tests.data.sd_scripts.make_text_golden import states_of, text_encoders

FOLDER = Path(__file__).parents[2] / "data/sd_scripts"
GOLDEN = json.loads((FOLDER / "text_golden.json").read_text())
PARTS = {"sd15": ("sd15/tokenizer",), "sdxl": ("sdxl/tokenizer", "sdxl/tokenizer_2")}
SETTINGS = sorted(
    {(entry["family"], entry["max_token_length"], entry["clip_skip"]) for entry in GOLDEN["text"]}, key=str
)


@pytest.fixture(scope="module")
def encoders() -> list:
    kinds = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection)}
    return text_encoders(kinds, CLIPTextConfig)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[CLIPTokenizer]]:
    root = tmp_path_factory.mktemp("tokenizers")
    for part in {part for parts in PARTS.values() for part in parts}:
        write_tokenizer(part, root / part)
    return {family: [CLIPTokenizer.from_pretrained(root / part) for part in parts] for family, parts in PARTS.items()}


@pytest.mark.parametrize(("family", "length", "clip_skip"), SETTINGS)
def test_captions_become_the_numbers_of_sd_scripts(encoders, tokenizers, family: str, length, clip_skip):
    """A short one, one longer than CLIP reads at once, and an empty one; in one batch and, frozen, alone."""
    entries = [
        entry
        for entry in GOLDEN["text"]
        if (entry["family"], entry["max_token_length"], entry["clip_skip"]) == (family, length, clip_skip)
    ]
    captions = [entry["caption"] for entry in entries]
    assert len(captions) == 3
    used = encoders[: len(PARTS[family])]
    for trained in (True, False):
        text = TextConditioning(tokenizers[family], used, clip_skip, max_token_length=length, trained=trained)
        with torch.no_grad():
            found = text.of(captions)
        for number, entry in enumerate(entries):
            assert found.states.shape[1] == entry["tokens"]
            for states, golden in zip(states_of(found.states[number]), entry["states"], strict=True):
                assert states == pytest.approx(golden, rel=1e-4, abs=1e-4)
            if family == "sdxl":
                assert found.pooled[number, ::8].tolist() == pytest.approx(entry["pooled"], rel=1e-4, abs=1e-4)
            else:
                assert found.pooled is None


@pytest.mark.parametrize("entry", GOLDEN["crops"], ids=lambda entry: f"{entry['original']} in {entry['bucket']}")
def test_sizes_and_crops_are_those_of_sd_scripts(entry):
    (width, height), (bucket_width, bucket_height) = entry["original"], entry["bucket"]
    size, bucket = (width, height), (bucket_width, bucket_height)
    told = (height, width, entry["top"], entry["left"], bucket_height, bucket_width)
    assert time_ids(size, bucket, flipped=False) == told
    assert time_ids(size, bucket, flipped=True) == (*told[:3], entry["mirrored_left"], *told[4:])


@pytest.mark.skipif(
    not os.environ.get("SD_SCRIPTS_DIR") or not os.environ.get("SD_SCRIPTS_PYTHON"),
    reason="the golden numbers are made anew where SD_SCRIPTS_DIR and SD_SCRIPTS_PYTHON name sd-scripts and its Python",
)
def test_sd_scripts_still_gives_the_golden_numbers(tmp_path: Path):
    made = subprocess.run(
        [os.environ["SD_SCRIPTS_PYTHON"], FOLDER / "make_text_golden.py", kohya_tokenizer_folder(tmp_path)],
        cwd=os.environ["SD_SCRIPTS_DIR"],
        env={**os.environ, "PYTHONPATH": ""},
        check=True,
        capture_output=True,
    )
    again = json.loads(made.stdout)
    assert again["crops"] == GOLDEN["crops"]
    for entry, golden in zip(again["text"], GOLDEN["text"], strict=True):
        assert [*map(flat, (entry["states"], [entry.get("pooled", [])]))] == [
            pytest.approx(flat(numbers), rel=1e-4, abs=1e-4)
            for numbers in (golden["states"], [golden.get("pooled", [])])
        ]


def flat(rows: list[list[float]]) -> list[float]:
    return [number for row in rows for number in row]

"""The data that single-file base models lack: made by the script, read by the tokenizers, part of every package."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from shared.clip_tokenizers import BASE_CONFIGS, kohya_tokenizer_folder, write_tokenizer
from shared.errors import DiskError

ROOT = Path(__file__).resolve().parents[2]
KOHYA = ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k")
CAT = [49406, 320, 1125, 539, 320, 2368, 49407]

PINNED = {
    "vocab.json": "4845b0e575739dbabfda3b54f086884b37d73e94b067988d925a7e52bfdfb8e8",
    "merges.txt": "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
}


def shipped(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_script_makes_what_is_shipped(tmp_path):
    # The packed list of OpenAI holds a heading, the merges in use and further ones that CLIP leaves out.
    merges = (BASE_CONFIGS / "clip_vocabulary" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    packed = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    packed.write_bytes(gzip.compress("\n".join(['"heading', *merges, "left out</w>"]).encode()))
    command = [sys.executable, ROOT / "scripts" / "make_base_configs", packed, "--into", tmp_path / "made"]
    subprocess.run(command, check=True)
    made = shipped(tmp_path / "made")
    assert made == {name: content for name, content in shipped(BASE_CONFIGS).items() if name != "README.md"}


def test_the_vocabulary_is_that_of_clip(tmp_path):
    """Pinned by content: another number for a word would be another word to every model."""
    write_tokenizer("sd15/tokenizer", tmp_path)
    found = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("vocab.json", "merges.txt")}
    assert found == PINNED


@pytest.mark.parametrize(
    ("setup", "filling"), [("sd15/tokenizer", 49407), ("sdxl/tokenizer", 49407), ("sdxl/tokenizer_2", 0)]
)
def test_each_tokenizer_numbers_words_and_fills_short_prompts_as_its_model_was_trained(tmp_path, setup, filling):
    write_tokenizer(setup, tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    ids = tokenizer("a photo of a cat", padding="max_length", max_length=tokenizer.model_max_length).input_ids
    assert ids == CAT + [filling] * (77 - len(CAT))
    assert len(tokenizer) == 49_408


def test_a_kohya_tokenizer_folder_holds_both_and_is_not_written_again(tmp_path):
    folder = kohya_tokenizer_folder(tmp_path / "cache" / "tokenizers")
    assert sorted(file.name for file in folder.iterdir()) == sorted(KOHYA)
    times = {name: (folder / name / "vocab.json").stat().st_mtime_ns for name in KOHYA}
    (folder / KOHYA[1] / "merges.txt").write_text("cut sh", encoding="utf-8")
    assert kohya_tokenizer_folder(folder) == folder
    assert {name: (folder / name / "vocab.json").stat().st_mtime_ns for name in KOHYA} == times
    assert CLIPTokenizer.from_pretrained(folder / KOHYA[1]).encode("a photo of a cat") == CAT


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DiskError, match="file/tokenizers"):
        kohya_tokenizer_folder(tmp_path / "file" / "tokenizers")


@pytest.mark.skipif("SD_SCRIPTS_PYTHON" not in os.environ, reason="SD_SCRIPTS_PYTHON names no Python with kohya's pins")
def test_the_transformers_that_kohya_pins_reads_the_folder(tmp_path):
    folder = kohya_tokenizer_folder(tmp_path)
    code = (
        "import sys, transformers\n"
        "for name in sys.argv[2:]:\n"
        "    tokenizer = transformers.CLIPTokenizer.from_pretrained(f'{sys.argv[1]}/{name}')\n"
        "    print(len(tokenizer), tokenizer('a photo of a cat').input_ids)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [os.environ["SD_SCRIPTS_PYTHON"], "-c", code, folder, *KOHYA]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.splitlines() == [f"49408 {CAT}"] * 2


def test_a_wheel_and_a_source_archive_hold_all_of_it(tmp_path):
    for name in ("shared", "optimizer_daemon", "evaluator_daemon"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    code = "from setuptools import build_meta; build_meta.build_sdist('dist'); build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    wanted = {f"shared/base_configs/{name}" for name in shipped(BASE_CONFIGS)}
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())
    (source,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(source) as archive:
        assert wanted <= {name.partition("/")[2] for name in archive.getnames()}

"""One flipped byte of a real LoRA: refused, harmless, or another identity; never accepted as the same checkpoint."""

import hashlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from shared.errors import CheckpointError
from shared.safetensors_file import CODES, Checkpoint, lora_modules, read_checkpoint
from tests.shared.weight_files import data_section, real_lora, saved

MUTATIONS = 2000


def content_of(checkpoint: Checkpoint) -> tuple:
    """Everything the identity stands for."""
    return {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()}, data_section(checkpoint.raw)


def mutations(file: bytes, seed: int) -> list[tuple[int, int]]:
    """Return (position, new byte): a quarter in the metadata, a quarter in the tensors' entries, half in the data."""
    rng = random.Random(seed)
    data_start = len(file) - len(data_section(file))
    entries_start = file.index(b'"}') + 2  # the metadata's end; no text in it holds these two bytes unescaped
    positions = rng.choices(range(entries_start), k=MUTATIONS // 4)
    positions += rng.choices(range(entries_start, data_start), k=MUTATIONS // 4)
    positions += rng.choices(range(data_start, len(file)), k=MUTATIONS // 2)
    return [(at, rng.choice([b for b in range(256) if b != file[at]])) for at in positions]


def outcome_of(path: Path, original: Checkpoint) -> str:
    """Return what became of a mutated file, having checked that identity and content agree."""
    try:
        checkpoint = read_checkpoint(path, path.parent)
    except CheckpointError as error:
        assert error.code in CODES
        return "refused"
    same = content_of(checkpoint) == content_of(original)
    assert same == (checkpoint.sha256 == original.sha256)
    try:
        lora_modules(checkpoint)
    except CheckpointError as error:
        assert error.code in CODES
        return "no LoRA any more"
    return "harmless" if same else "another identity"


@pytest.mark.parametrize("with_hash", [True, False], ids=["with sshs_model_hash", "without sshs_model_hash"])
def test_2000_random_mutations_never_pass_as_the_original(tmp_path, with_hash):
    file = real_lora(with_hash=with_hash)
    data_start = len(file) - len(data_section(file))
    path = saved(tmp_path / "a.safetensors", file)
    original = read_checkpoint(path, tmp_path)
    in_header, in_data = Counter(), Counter()
    fd = os.open(path, os.O_WRONLY)
    for at, byte in mutations(file, seed=20 + with_hash):
        os.pwrite(fd, bytes([byte]), at)
        start = time.process_time()
        (in_data if at >= data_start else in_header)[outcome_of(path, original)] += 1
        assert time.process_time() - start < 20
        os.pwrite(fd, file[at : at + 1], at)
    os.close(fd)
    assert in_header.total() + in_data.total() == MUTATIONS
    assert min(in_header["refused"], in_header["harmless"]) > 20, in_header
    assert "harmless" not in in_data
    if with_hash:
        assert set(in_data) == {"refused"}
    else:
        assert in_data["another identity"] > in_data["refused"] > 0, in_data
    assert read_checkpoint(path, tmp_path).sha256 == original.sha256


def test_the_mutated_file_has_the_same_bytes_in_another_process():
    print_hash = "import hashlib; from tests.shared.weight_files import real_lora as r; "
    print_hash += "print(hashlib.sha256(r()).hexdigest())"
    root = Path(__file__).parents[2]
    elsewhere = subprocess.check_output([sys.executable, "-c", print_hash], cwd=root, text=True)
    assert elsewhere.strip() == hashlib.sha256(real_lora()).hexdigest()

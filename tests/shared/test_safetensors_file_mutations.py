"""One flipped byte of a real LoRA: refused, harmless, or another identity; never accepted as the same checkpoint."""

import os
import random
import time

import pytest

from shared.errors import CheckpointError
from shared.safetensors_file import CODES, Checkpoint, lora_modules, read_checkpoint
from tests.shared.weight_files import data_section, real_lora, saved

MUTATIONS = 2000


def content_of(checkpoint: Checkpoint) -> tuple:
    """Everything the identity stands for."""
    return {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()}, data_section(checkpoint.raw)


def mutations(file: bytes, seed: int) -> list[tuple[int, int]]:
    """Return (position, new byte), half of them in the header."""
    rng = random.Random(seed)
    data_start = len(file) - len(data_section(file))
    positions = rng.choices(range(data_start), k=MUTATIONS // 2)
    positions += rng.choices(range(data_start, len(file)), k=MUTATIONS - len(positions))
    return [(at, rng.choice([b for b in range(256) if b != file[at]])) for at in positions]


@pytest.mark.parametrize("with_hash", [True, False], ids=["with sshs_model_hash", "without sshs_model_hash"])
def test_2000_random_mutations_never_pass_as_the_original(tmp_path, with_hash):
    file = real_lora(with_hash=with_hash)
    data_start = len(file) - len(data_section(file))
    path = saved(tmp_path / "a.safetensors", file)
    original = read_checkpoint(path, tmp_path)
    lora_modules(original)
    outcomes = {"refused": 0, "harmless": 0, "another identity": 0}
    fd = os.open(path, os.O_WRONLY)
    for at, byte in mutations(file, seed=20 + with_hash):
        os.pwrite(fd, bytes([byte]), at)
        start = time.process_time()
        try:
            checkpoint = read_checkpoint(path, tmp_path)
            same = content_of(checkpoint) == content_of(original)
            assert same == (checkpoint.sha256 == original.sha256), at
            assert not (with_hash and at >= data_start), f"a mutated data byte {at} passed"
            outcomes["harmless" if same else "another identity"] += 1
            lora_modules(checkpoint)
        except CheckpointError as error:
            assert error.code in CODES
            outcomes["refused"] += 1
        assert time.process_time() - start < 1
        os.pwrite(fd, file[at : at + 1], at)
    os.close(fd)
    assert all(outcomes.values()), outcomes
    assert read_checkpoint(path, tmp_path).sha256 == original.sha256

"""Real LoRA files of three makers, damaged in every way: refused with a reason, or still the same tensors.

Where the file promises its hash, damage to the data is always refused. Without that promise other finite numbers are a
LoRA as good as any; then its identity must tell that it is another.

The long form, `python -m pytest --slow -s tests/shared/test_safetensors_file_damage.py`, prints the table of outcomes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import safetensors.torch

from shared.errors import CheckpointError
from shared.safetensors_file import CODES, Checkpoint, lora_modules, read_checkpoint
from tests.shared.damage import DAMAGES, Victim
from tests.shared.weight_files import data_section, real_lora

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "tests" / "data" / "lora"
RELATIVES = {"native": "native-000001", "kohya": "native", "diffusers": "kohya"}
"""Whose blocks, halves and tails each file gets; the first is the epoch before."""
PROMISES_HASH = {"native", "kohya"}
SEED = 2026


def tensors_of(checkpoint: Checkpoint) -> dict[str, tuple]:
    """Names, shapes, dtypes and bytes."""
    found = {}
    for name, tensor in checkpoint.tensors.items():
        start, end = checkpoint.bounds(name)
        found[name] = tensor.dtype, tensor.shape, checkpoint.raw[start:end]
    return found


def judged(path: Path) -> Checkpoint | str:
    """The accepted checkpoint, or the code of the refusal."""
    try:
        checkpoint = read_checkpoint(path, path.parent)
        lora_modules(checkpoint)
    except CheckpointError as error:
        assert error.code in CODES
        assert error.reason
        assert len(str(error)) < 2000, "a damaged file must not fill the log"
        return error.code
    return checkpoint


def outcomes(name: str, count: int, folder: Path) -> dict[str, Counter[str]]:
    """Damage one file `count` times, the classes taking turns; class of damage -> code or outcome -> how often."""
    content = (FILES / f"{name}.safetensors").read_bytes()
    victim = Victim(content, (FILES / f"{RELATIVES[name]}.safetensors").read_bytes())
    path = folder / "lora.safetensors"
    path.write_bytes(content)
    original = judged(path)
    assert isinstance(original, Checkpoint)
    expected, random = tensors_of(original), Random(f"{SEED} {name}")
    found: dict[str, Counter[str]] = {damage: Counter() for damage in DAMAGES}
    classes = list(DAMAGES)
    for number in range(count):
        damage = classes[number % len(classes)]
        damaged = DAMAGES[damage](random, victim)
        path.write_bytes(damaged)
        verdict = judged(path)
        if isinstance(verdict, str):
            found[damage][verdict] += 1
            continue
        same = tensors_of(verdict) == expected
        if same:
            assert verdict.sha256 == original.sha256 or list(verdict.tensors) != list(original.tensors)
        else:
            assert verdict.sha256 != original.sha256, (damage, number)
            assert all(tensor.isfinite().all() for tensor in safetensors.torch.load(damaged).values())
        if "sshs_model_hash" in verdict.metadata and name in PROMISES_HASH:
            assert data_section(damaged) == data_section(content), (damage, number)
        assert same or name not in PROMISES_HASH, (damage, number)
        found[damage]["the same tensors" if same else "another identity"] += 1
    return found


@pytest.mark.parametrize("name", RELATIVES)
def test_500_damages_to_a_real_lora_are_refused_or_leave_its_tensors_alone(tmp_path: Path, name: str):
    found = outcomes(name, 500, tmp_path)
    total = sum(found.values(), Counter())
    assert total.total() == 500
    assert total["incomplete"] and total["trailing_bytes"] and total["header_json"]
    assert (total["not_finite"] and total["half_pair"]) or name in PROMISES_HASH  # the hash is looked at first
    assert total["the same tensors"], total
    assert found["cut short"].keys() == {"incomplete"}
    of_a_bit = {"hash_mismatch"} if name in PROMISES_HASH else {"another identity", "not_finite"}
    assert found["a bit of the data"].keys() <= of_a_bit


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_10000_damages_to_real_loras_are_refused_or_leave_their_tensors_alone(tmp_path: Path):
    counts = {"native": 3400, "kohya": 3300, "diffusers": 3300}
    for name, count in counts.items():
        found = outcomes(name, count, tmp_path)
        assert sum(found.values(), Counter()).total() == count
        print(f"\n{name}.safetensors: {count} damages")
        for damage, codes in found.items():
            print(f"  {damage:28} {', '.join(f'{code} {times}' for code, times in codes.most_common())}")
        print(f"  {'all':28} {', '.join(f'{c} {n}' for c, n in sum(found.values(), Counter()).most_common())}")


def test_the_files_are_what_their_makers_say():
    kohya, diffusers, native = (
        read_checkpoint(FILES / f"{name}.safetensors", FILES) for name in ("kohya", "diffusers", "native")
    )
    assert {"sshs_model_hash", "sshs_legacy_hash", "ss_network_module"} <= kohya.metadata.keys()
    assert "sshs_model_hash" in native.metadata and "sshs_model_hash" not in diffusers.metadata
    layouts = [lora_modules(checkpoint) for checkpoint in (kohya, native, diffusers)]
    assert [layout.family for layout in layouts] == ["kohya", "kohya", "diffusers"]
    assert layouts[0].modules == layouts[1].modules, "our trainer and sd-scripts adapt the same layers"


READ_WHILE_ANOTHER_CUTS = """
import collections, faulthandler, json, os, random, sys
from pathlib import Path
from shared.errors import CheckpointError
from shared.safetensors_file import read_checkpoint, read_header
faulthandler.enable()
path, reads = Path(sys.argv[1]), int(sys.argv[2])
content, parent = path.read_bytes(), os.getpid()
child = os.fork()
if child == 0:
    cuts = random.Random(3)
    while os.getppid() == parent:
        os.truncate(path, cuts.randrange(len(content)))
        with open(path, "r+b", buffering=0) as file:
            file.write(content)
    os._exit(0)
found = collections.Counter()
try:
    for number in range(reads):
        try:
            (read_checkpoint if number % 2 else read_header)(path, path.parent)
            found["accepted"] += 1
        except CheckpointError as error:
            found[error.code] += 1
finally:
    os.kill(child, 9)
    os.waitpid(child, 0)
print(json.dumps(found))
"""


def test_a_file_that_is_cut_while_it_is_read_kills_no_reader(tmp_path: Path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(real_lora())
    command = [sys.executable, "-X", "faulthandler", "-c", READ_WHILE_ANOTHER_CUTS, str(path), "400"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() <= {"accepted", "incomplete", "changing"}, found
    assert found.keys() & {"incomplete", "changing"}, found

"""The proof that a weight file is whole and within bounds."""

import hashlib
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch

import shared.safetensors_file
from shared.errors import IncompleteCheckpointError
from shared.safetensors_file import (
    CODES,
    INCOMPLETE_CODES,
    MAX_FILE_BYTES,
    REFUSED_CODES,
    Stamp,
    is_stable,
    read_checkpoint,
    read_header,
)
from tests.shared.weight_files import data_section, file_of, file_with, real_lora, refusal_of, saved

HALVES = b"\x00\x3c\x00\xc0"  # 1.0, -2.0 as F16


# --- whole files ---------------------------------------------------------------------------------------------------


def test_a_real_lora_is_accepted_with_everything_it_says(tmp_path):
    path = saved(tmp_path / "lora_trial_5-000002.safetensors", real_lora())

    header = read_header(path, tmp_path)
    checkpoint = read_checkpoint(path, tmp_path)

    loaded = safetensors.torch.load(checkpoint.raw)
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in loaded.items()
    }
    assert checkpoint.tensors == header.tensors
    assert checkpoint.size == header.size == len(real_lora()) == len(checkpoint.raw)
    assert checkpoint.stamp == header.stamp == Stamp.of(path.stat())
    assert checkpoint.epoch == 2
    assert checkpoint.metadata["ss_session_id"] == "1874624210"
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"
    start, end = checkpoint.bounds(name)
    assert checkpoint.raw[start:end] == loaded[name].numpy().tobytes()
    assert "raw" not in repr(checkpoint)


@pytest.mark.parametrize(
    ("text", "epoch"), [("12", 12), ("", None), ("None", None), ("-1", None), ("٣", None), ("1" * 5000, None)]
)
def test_the_epoch_is_what_the_trainer_wrote_or_unknown(tmp_path, text, epoch):
    path = saved(tmp_path / "a.safetensors", file_with({"a": ("F16", [2], HALVES)}, {"ss_epoch": text}))
    assert read_header(path, tmp_path).epoch == epoch


# --- incomplete files ----------------------------------------------------------------------------------------------


def test_2000_random_truncations_of_a_real_lora_are_all_incomplete(tmp_path):
    path = saved(tmp_path / "a.safetensors", real_lora())
    size = len(real_lora())
    cuts = {*random.Random(5).sample(range(size), 2000), *range(12), *range(size - 3, size)}
    for cut in sorted(cuts, reverse=True):
        os.truncate(path, cut)
        looks = (read_header, read_checkpoint) if cut % 8 == 0 else (read_header,)
        for look in looks:
            with pytest.raises(IncompleteCheckpointError) as caught:
                look(path, tmp_path)
            assert caught.value.code == "incomplete", cut


APPEND_2_KB_FOR_EACH_LINE = """
import sys
source, target = sys.argv[1:]
data = open(source, "rb").read()
with open(target, "wb", buffering=0) as file:
    for start in range(0, len(data), 2048):
        sys.stdin.readline()
        file.write(data[start:start + 2048])
        print("written", flush=True)
"""


def test_a_file_that_grows_in_place_by_2_kb_is_never_accepted_before_it_is_whole(tmp_path):
    source = saved(tmp_path / "source", real_lora())
    target = tmp_path / "lora.safetensors"
    command = [sys.executable, "-c", APPEND_2_KB_FOR_EACH_LINE, str(source), str(target)]

    def look() -> str:
        try:
            return "whole" if read_checkpoint(target, tmp_path).raw == real_lora() else "partial"
        except IncompleteCheckpointError as error:
            return error.code

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        for start in range(0, len(real_lora()), 2048):
            last = start + 2048 >= len(real_lora())
            writer.stdin.write(b"\n")
            writer.stdin.flush()
            racing = look()  # while the writer writes
            assert racing in {"vanished", "incomplete", "changing"} or (last and racing == "whole")
            assert writer.stdout.readline() == b"written\n"
            assert look() == ("whole" if last else "incomplete")
    assert writer.returncode == 0


REWRITE_FOR_EVER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
at = int(sys.argv[2])
old = os.pread(fd, 1, at)
new = bytes([old[0] ^ 1])
print("ready", flush=True)
while os.getppid() == int(sys.argv[3]):
    os.pwrite(fd, new, at)
    os.pwrite(fd, old, at)
"""


def test_a_file_overwritten_while_it_is_read_gets_no_verdict(tmp_path):
    path = saved(tmp_path / "a.safetensors", file_with({"a": ("F16", [4 * 2**20], HALVES * 2**21)}))
    last = path.stat().st_size - 2
    command = [sys.executable, "-c", REWRITE_FOR_EVER, str(path), str(last), str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"ready\n"
        codes, deadline = set(), time.monotonic() + 30
        while "changing" not in codes and time.monotonic() < deadline:
            try:
                read_checkpoint(path, tmp_path)
            except IncompleteCheckpointError as error:
                codes.add(error.code)
        writer.kill()
    assert codes == {"changing"}


def test_a_file_that_is_not_there_is_looked_for_again(tmp_path):
    for path in (tmp_path / "a.safetensors", saved(tmp_path / "file", b"") / "a.safetensors"):
        with pytest.raises(IncompleteCheckpointError, match="not there") as caught:
            read_header(path, tmp_path)
        assert caught.value.code == "vanished"


def test_a_file_the_system_cannot_read_is_looked_at_again(tmp_path):
    too_long = tmp_path / ("a" * 300)
    failing_device = Path("/proc/self/mem")  # a regular file whose first byte gives EIO
    for path, inside, why in ((too_long, tmp_path, "File name"), (failing_device, Path("/proc/self"), "Input/output")):
        with pytest.raises(IncompleteCheckpointError, match=why) as caught:
            read_header(path, inside)
        assert caught.value.code == "unreadable"


@pytest.mark.parametrize(
    ("previous", "current", "stable"),
    [
        pytest.param(None, Stamp(9, 1, 7, 4), False, id="a first look is never stable"),
        pytest.param(Stamp(9, 1, 7, 4), Stamp(9, 1, 7, 4), True, id="nothing changed"),
        pytest.param(Stamp(8, 1, 7, 4), Stamp(9, 1, 7, 4), False, id="it grew"),
        pytest.param(Stamp(9, 1, 7, 4), Stamp(9, 2, 7, 4), False, id="it was written again"),
        pytest.param(Stamp(9, 1, 7, 4), Stamp(9, 1, 8, 4), False, id="another file took the name"),
        pytest.param(Stamp(9, 1, 7, 4), Stamp(9, 1, 7, 5), False, id="it was written and its time put back"),
    ],
)
def test_two_looks_decide_whether_a_file_is_stable(previous, current, stable):
    assert is_stable(previous, current) is stable


# --- files that are none, or elsewhere -----------------------------------------------------------------------------


def test_only_a_regular_file_inside_the_folder_is_opened(tmp_path):
    trial, elsewhere = tmp_path / "trial_0001", tmp_path / "elsewhere"
    trial.mkdir()
    elsewhere.mkdir()
    outside = saved(elsewhere / "a.safetensors", real_lora())
    saved(trial / "real.safetensors", real_lora())
    (trial / "link_out").symlink_to(outside)
    (trial / "link_in").symlink_to(trial / "real.safetensors")
    (trial / "link_dead").symlink_to(trial / "nothing")
    (trial / "folder_out").symlink_to(elsewhere)
    (trial / "loop").symlink_to(trial / "loop")
    (trial / "folder.safetensors").mkdir()
    os.mkfifo(trial / "fifo.safetensors")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(trial / "socket.safetensors"))
    expected = {
        outside: "outside_folder",
        trial / ".." / "elsewhere" / "a.safetensors": "outside_folder",
        trial / "folder_out" / "a.safetensors": "outside_folder",
        trial / "link_out": "symlink",
        trial / "link_in": "symlink",
        trial / "link_dead": "symlink",
        trial / "loop": "symlink",
        trial / "folder.safetensors": "not_a_file",
        trial / "fifo.safetensors": "not_a_file",  # without O_NONBLOCK this would wait for ever
        trial / "socket.safetensors": "not_a_file",
    }
    assert {path: refusal_of(path, trial) for path in expected} == expected
    assert refusal_of(Path("/dev/zero"), Path("/dev")) == "not_a_file"
    (tmp_path / "alias").symlink_to(trial)
    assert read_checkpoint(trial / "real.safetensors", tmp_path / "alias").epoch == 2


def test_a_file_larger_than_memory_is_meant_for_is_not_read(tmp_path):
    path = tmp_path / "sparse.safetensors"
    path.touch()
    os.truncate(path, MAX_FILE_BYTES + 1)
    assert refusal_of(path, tmp_path) == "too_large"


# --- identity by content -------------------------------------------------------------------------------------------

PAIR = {"a": ("F16", [2], HALVES), "b": ("F16", [1, 2], HALVES)}


def sha256_of(file: bytes, folder: Path) -> str:
    return read_checkpoint(saved(folder / "a.safetensors", file), folder).sha256


def test_the_identity_ignores_metadata_and_the_spacing_and_order_of_the_header(tmp_path):
    entries = [
        f'"{name}" : {{ "shape":{shape}, "data_offsets":[{4 * i},{4 * i + 4}],"dtype":"{dtype}"}}'
        for i, (name, (dtype, shape, _)) in enumerate(PAIR.items())
    ]
    same = [
        file_with(PAIR),
        file_with(PAIR, {}),
        file_with(PAIR, {"ss_session_id": "1", "ss_epoch": "2"}),
        file_of("{" + ", ".join(reversed(entries)) + "}   \n", HALVES * 2),
    ]
    assert len({sha256_of(file, tmp_path) for file in same}) == 1


def test_the_identity_depends_on_names_dtypes_shapes_and_data(tmp_path):
    different = [
        PAIR,
        {"a": ("F16", [2], HALVES), "c": ("F16", [1, 2], HALVES)},
        {"a": ("BF16", [2], HALVES), "b": ("F16", [1, 2], HALVES)},
        {"a": ("F16", [2], HALVES), "b": ("F16", [2, 1], HALVES)},
        {"a": ("F16", [2], HALVES), "b": ("F16", [1, 2], HALVES[::-1])},
        {"a": ("F16", [2], HALVES), "b": ("F16", [1, 2], HALVES), "c": ("F16", [0], b"")},
        {"a": ("F16", [3], HALVES + b"\0\0"), "b": ("F16", [1, 1], b"\0\xc0")},
    ]
    assert len({sha256_of(file_with(tensors), tmp_path) for tensors in different}) == len(different)


def test_the_identity_follows_its_published_definition(tmp_path):
    layout = b'[["a","F16",[2]],["b","F16",[1,2]]]'
    expected = hashlib.sha256(layout + hashlib.sha256(HALVES * 2).digest()).hexdigest()
    assert sha256_of(file_with(PAIR), tmp_path) == expected


# --- sshs_model_hash -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("promised", "accepted"),
    [
        pytest.param(hashlib.sha256(HALVES).hexdigest(), True, id="the hash of the data section"),
        pytest.param(hashlib.sha256(HALVES).hexdigest().upper(), True, id="the same in upper case"),
        pytest.param(hashlib.sha256(HALVES).hexdigest()[:12], False, id="its first digits only"),
        pytest.param(hashlib.sha256(b"other").hexdigest(), False, id="the hash of other data"),
        pytest.param("", False, id="an empty text"),
    ],
)
def test_a_promised_hash_must_be_the_datas(tmp_path, promised, accepted):
    file = file_with({"a": ("F16", [2], HALVES)}, {"sshs_model_hash": promised})
    path = saved(tmp_path / "a.safetensors", file)
    if accepted:
        assert data_section(read_checkpoint(path, tmp_path).raw) == HALVES
    else:
        assert refusal_of(path, tmp_path) == "hash_mismatch"


A, B = ("F16", [2], HALVES), ("F32", [1], bytes(3) + b"\x3f")


@pytest.mark.parametrize(
    ("tensors", "accepted"),
    [
        pytest.param({"b": B, "a": A, "c": A}, True, id="as the library stores them"),
        pytest.param({"a": A, "c": A, "b": B}, True, id="another order of the dtypes, as other versions may have it"),
        pytest.param({"b": B, "c": A, "a": A}, False, id="two names have changed places"),
        pytest.param({"a": A, "b": B, "c": A}, False, id="one dtype in two places"),
    ],
)
def test_where_a_hash_is_promised_names_stand_in_the_order_of_its_writers(tmp_path, tensors, accepted):
    digest = hashlib.sha256(b"".join(data for _, _, data in tensors.values())).hexdigest()
    path = saved(tmp_path / "a.safetensors", file_with(tensors, {"sshs_model_hash": digest}))
    assert read_checkpoint(saved(tmp_path / "b.safetensors", file_with(tensors)), tmp_path), "nothing is promised"
    if accepted:
        assert list(read_checkpoint(path, tmp_path).tensors) == list(tensors)
    else:
        assert refusal_of(path, tmp_path) == "hash_mismatch"


# --- the codes -----------------------------------------------------------------------------------------------------


def test_every_code_is_documented_used_and_either_a_verdict_or_not():
    folder = Path(shared.safetensors_file.__file__).parent
    source = "".join(path.read_text() for path in folder.glob("*.py") if path.name != "refusals.py")
    used = set(re.findall(r'(?:refused|incomplete)\(\s*(?:\w+\.)?path,\s*"(\w+)"', source))
    used |= set(re.findall(r'refusal\(\s*"(\w+)"', source))
    assert used == set(CODES)
    assert CODES == {**INCOMPLETE_CODES, **REFUSED_CODES}
    assert not INCOMPLETE_CODES.keys() & REFUSED_CODES.keys()
    assert all(re.fullmatch(r"[a-z_]+", code) and meaning for code, meaning in CODES.items())

"""Is a LoRA the whole one that its trial trains? As a table; and what has become of a file since it was admitted."""

from __future__ import annotations

import errno
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from evaluator_daemon import admission
from evaluator_daemon.admission import (
    COARSE_SETTLE_S,
    EVALUATOR_CODES,
    LONG_AGO_S,
    SETTLE_S,
    TICK_S,
    FirstLook,
    Looks,
    admit,
    file_system_clock_ns,
    require_own_network,
    standing,
)
from evaluator_daemon.sweep import WeightFile
from shared.errors import CheckpointError, IncompleteCheckpointError, RefusedCheckpointError
from shared.safetensors_file import CODES, MAX_FILE_BYTES, Stamp, lora_modules, lora_ranks, read_checkpoint
from shared.schemas import TrialParams
from tests.scenarios.lora_files import STANDARD, every_module, lora, peft_lora, unet, unet_shapes
from tests.shared.weight_files import saved

ALL = every_module()
HALF = dict(list(ALL.items())[::2])
CONV = {**unet(), "lora_unet_conv_in": (32, 4, 3, 3)}
ARGS = {**STANDARD, "ss_network_args": '{"conv_dim": "4"}'}
TE_RATE = {"text_encoder_lr": 1e-4}
PEFT = {f"unet.{name}": shape for name, shape in unet_shapes().items()}


def params(**parameters) -> TrialParams:
    return TrialParams(trial=1, optuna_number=0, parameters=parameters, origin="sampler", training_seed=1)


def verdict(folder: Path, content: bytes, parameters: dict, scored: bytes | None = None) -> str | None:
    checkpoint = read_checkpoint(saved(folder / "a.safetensors", content), folder)
    others = {}
    if scored is not None:
        others["b"] = lora_ranks(read_checkpoint(saved(folder / "b.safetensors", scored), folder))
    try:
        require_own_network(checkpoint, lora_modules(checkpoint), params(**parameters), others)
    except RefusedCheckpointError as error:
        assert error.code in EVALUATOR_CODES
        return error.code
    return None


@pytest.mark.parametrize(
    ("content", "parameters", "scored"),
    [
        pytest.param(lora(1), {"network_dim": 4, "network_alpha": 2.0}, lora(2), id="the same network as before"),
        pytest.param(lora(1, alpha=4.0), {"network_dim": 4, "network_alpha": 0}, None, id="alpha 0 means the rank"),
        pytest.param(lora(1, alpha=0.3), {"network_alpha": 0.3}, None, id="an alpha that half precision rounds"),
        pytest.param(lora(1, alpha=None), {"network_alpha": 2.0}, None, id="no alpha: it may be in the weights"),
        pytest.param(lora(1, unet()), {"learning_rate": 1e-4}, None, id="the UNet alone, nothing says otherwise"),
        pytest.param(lora(1, unet()), TE_RATE, None, id="the UNet alone by a trainer that tells nothing of itself"),
        pytest.param(lora(1, unet(), metadata=STANDARD), {"text_encoder_lr": 0}, None, id="a text encoder left alone"),
        pytest.param(
            lora(1, unet(), metadata=STANDARD),
            {**TE_RATE, "network_train_unet_only": True},
            None,
            id="a text encoder left alone by flag",
        ),
        pytest.param(lora(1, CONV, rank=8, metadata=ARGS), {"network_dim": 4}, None, id="arguments of the network"),
        pytest.param(lora(1, CONV, rank=8), {"network_dim": 8}, None, id="a convolution beside"),
        pytest.param(lora(1, ALL), {}, lora(2, HALF), id="more than a checkpoint before: that one is the half"),
        pytest.param(peft_lora(1, PEFT), {"network_dim": 4}, peft_lora(2, PEFT), id="diffusers' names"),
    ],
)
def test_a_legitimate_lora_is_never_refused(tmp_path, content, parameters, scored):
    assert verdict(tmp_path, content, parameters, scored) is None


@pytest.mark.parametrize(
    ("content", "parameters", "scored", "code"),
    [
        pytest.param(lora(1, rank=8), {"network_dim": 4}, None, "other_network", id="rank against params.json"),
        pytest.param(peft_lora(1, PEFT, rank=8), {"network_dim": 4}, None, "other_network", id="in diffusers' form"),
        pytest.param(lora(1, alpha=4.0), {"network_alpha": 2}, None, "other_network", id="alpha against params.json"),
        pytest.param(lora(1, rank=8), {}, lora(2), "other_network", id="rank against another checkpoint"),
        pytest.param(lora(1, HALF), {}, lora(2), "half_network", id="fewer modules than another checkpoint"),
        pytest.param(lora(1, unet(), metadata=STANDARD), TE_RATE, None, "half_network", id="no text encoder"),
        pytest.param(
            lora(1, unet(), metadata={**STANDARD, "ss_text_encoder_lr": "5e-05"}),
            {"learning_rate": 1e-4},
            None,
            "half_network",
            id="no text encoder, by its own metadata",
        ),
        pytest.param(
            lora(1, {n: s for n, s in ALL.items() if "_te_" in n}, metadata=STANDARD),
            {"unet_lr": 1e-4},
            None,
            "half_network",
            id="no UNet",
        ),
    ],
)
def test_a_half_or_a_strange_one_is_never_accepted(tmp_path, content, parameters, scored, code):
    assert verdict(tmp_path, content, parameters, scored) == code


@pytest.mark.parametrize(
    ("change", "fate"),
    [
        pytest.param(lambda path: None, "unchanged", id="nothing"),
        pytest.param(lambda path: path.write_bytes(lora(1)), "unchanged", id="the same content again"),
        pytest.param(lambda path: path.write_bytes(lora(2)), "replaced", id="other content"),
        pytest.param(lambda path: path.write_bytes(lora(1)[:-9]), "replaced", id="other content, not whole yet"),
        pytest.param(Path.unlink, "deleted", id="deleted"),
        pytest.param(lambda path: shutil.rmtree(path.parent), "deleted", id="with its folder"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), "replaced", id="a folder of that name"),
    ],
)
def test_what_has_become_of_an_admitted_file(tmp_path, change, fate):
    (tmp_path / "trial").mkdir()
    checkpoint, _ = admit(saved(tmp_path / "trial" / "a.safetensors", lora(1)), tmp_path / "trial")
    change(checkpoint.path)
    assert standing(checkpoint, tmp_path / "trial") == fate


def test_no_code_means_two_things():
    assert not EVALUATOR_CODES.keys() & CODES.keys()


# ------------------------------------------------------------------------------------------------- waits and looks


def look_of(path: Path, seen_s: float) -> FirstLook:
    status = path.lstat()
    return FirstLook(status.st_size, status.st_mtime_ns, status.st_ctime, seen_s)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that admission sleeps; it sleeps them, too."""
    slept: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(admission.time, "sleep", lambda seconds: (slept.append(seconds), sleep(seconds)))
    return slept


def waited(naps: list[float], path: Path, first_look: FirstLook | None = None) -> list[float]:
    naps.clear()
    assert admit(path, path.parent, first_look=first_look)[0].sha256
    return naps


def test_a_file_just_written_is_waited_for_while_it_is_proved(tmp_path, naps):
    before_s, after_s = waited(naps, saved(tmp_path / "a.safetensors", lora(1)))
    assert before_s == TICK_S
    assert 0 <= after_s <= SETTLE_S


def test_an_earlier_look_that_shows_the_same_saves_the_wait_as_far_as_it_is_old(tmp_path, naps):
    path, now_s = saved(tmp_path / "a.safetensors", lora(1)), time.monotonic()
    assert sum(waited(naps, path, look_of(path, now_s - SETTLE_S))) == 0
    assert sum(waited(naps, path, look_of(path, time.monotonic() - SETTLE_S + 0.1))) <= 0.1 + TICK_S
    other = replace(look_of(path, now_s - 100), size=1)
    assert waited(naps, path, other)[0] == TICK_S, "it shows another file"


def test_a_file_unchanged_for_long_is_not_waited_for(tmp_path, naps):
    path = saved(tmp_path / "a.safetensors", lora(1))
    deadline = time.monotonic() + 60
    while sum(waited(naps, path)) > 0:
        assert time.monotonic() < deadline
    assert file_system_clock_ns(path) - path.stat().st_ctime_ns >= LONG_AGO_S * 1e9


@pytest.mark.parametrize("shift_s", [-3600, 3600], ids=["behind", "ahead"])
def test_what_the_modification_time_pretends_does_not_shorten_the_wait(tmp_path, naps, shift_s):
    path = saved(tmp_path / "a.safetensors", lora(1))
    os.utime(path, (time.time() + shift_s, time.time() + shift_s))
    assert waited(naps, path)[0] == TICK_S


def test_where_no_clock_can_be_read_the_whole_wait_comes_before_the_reading(tmp_path, naps, monkeypatch):
    path = saved(tmp_path / "a.safetensors", lora(1))
    monkeypatch.setattr(admission, "file_system_clock_ns", lambda path: None)
    assert waited(naps, path) == [SETTLE_S, 0.0]
    coarse = Stamp(size=1, mtime_ns=7 * 10**9, inode=1, ctime_ns=8 * 10**9)
    assert admission._waits(path, coarse, None, 0.0) == (COARSE_SETTLE_S, COARSE_SETTLE_S)


def test_the_file_systems_clock_is_asked_without_a_trace(tmp_path):
    before = tmp_path.stat()
    first = file_system_clock_ns(saved(tmp_path.parent / "beside", b"").parent / tmp_path.name)
    assert abs(first - time.time_ns()) < 60e9
    assert (tmp_path.stat().st_mtime_ns, list(tmp_path.iterdir())) == (before.st_mtime_ns, [])
    assert file_system_clock_ns(Path("/proc/self/status")) is None, "a file system that cannot tell"


def replaced_by_rename(path: Path) -> None:
    saved(path.with_name("new"), path.read_bytes()).replace(path)


def rewritten_in_place_with_its_time_put_back(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("content", [lora(1), lora(1) + b"tail"], ids=["to be accepted", "to be refused"])
@pytest.mark.parametrize("nap", [0, 1], ids=["before it is read", "after it was read"])
@pytest.mark.parametrize(
    ("change", "code"),
    [
        (replaced_by_rename, "changing"),
        (rewritten_in_place_with_its_time_put_back, "changing"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "changing"),
        (Path.unlink, "vanished"),
    ],
    ids=["replaced", "rewritten", "grown", "deleted"],
)
def test_a_file_that_changes_between_the_looks_gets_no_verdict(tmp_path, monkeypatch, content, nap, change, code):
    path, naps, sleep = saved(tmp_path / "a.safetensors", content), iter(range(9)), time.sleep

    def changing_sleep(seconds: float) -> None:
        sleep(TICK_S)
        if next(naps) == nap:
            change(path)

    monkeypatch.setattr(admission.time, "sleep", changing_sleep)
    with pytest.raises(IncompleteCheckpointError) as caught:
        admit(path, tmp_path)
    assert caught.value.code == code


def test_looks_remember_since_when_a_file_is_as_it_is():
    def seen(size: int, name: str = "a") -> WeightFile:
        return WeightFile(name, 1, False, size, 7, 0.0, 8.0)

    looks = Looks()
    assert looks.first("a") is None
    for seen_s, files in ((1.0, [seen(5)]), (2.0, [seen(5), seen(5, "b")]), (3.0, [seen(6), seen(5, "b")])):
        looks.note(files, seen_s)
    assert looks.first("a") == FirstLook(6, 7, 8.0, 3.0)
    assert looks.first("b") == FirstLook(5, 7, 8.0, 2.0)
    looks.note([seen(6)], 4.0)
    assert looks.first("b") is None


@pytest.mark.parametrize("error", [errno.ESTALE, errno.ENOTCONN, errno.EIO, errno.EACCES])
def test_a_mount_that_has_gone_is_no_verdict(tmp_path, monkeypatch, error):
    path = saved(tmp_path / "a.safetensors", lora(1))
    checkpoint, _ = admit(path, tmp_path)

    def lstat(self: Path):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Path, "lstat", lstat)
    with pytest.raises(IncompleteCheckpointError) as caught:
        admit(path, tmp_path)
    assert caught.value.code == "unreadable"
    assert standing(checkpoint, tmp_path) == "replaced", "its result is thrown away"


# ------------------------------------------------------------------------------------- what may stand at the name


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_link(path: Path) -> None:
    path.symlink_to(saved(path.with_name("real"), lora(1)))


def all_holes(path: Path) -> None:
    content = lora(1)
    start = 8 + int.from_bytes(content[:8], "little")
    saved(path, content[:start])
    os.truncate(path, len(content))


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, MAX_FILE_BYTES + 1)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (Path.mkdir, "not_a_file"),
        (a_fifo, "not_a_file"),
        (a_link, "symlink"),
        (all_holes, "all_zero"),
        (huge, "too_large"),
        (Path.touch, "incomplete"),
        (lambda path: None, "vanished"),
    ],
    ids=["a folder", "a FIFO", "a symbolic link", "a file of holes", "a huge sparse file", "an empty file", "nothing"],
)
def test_whatever_stands_at_the_name_gets_its_code(tmp_path, make, code):
    make(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        admit(tmp_path / "a.safetensors", tmp_path)
    assert caught.value.code == code


def test_a_hard_link_and_a_linked_trial_folder_are_fine(tmp_path):
    (tmp_path / "trial").mkdir()
    original = saved(tmp_path / "original", lora(1))
    (tmp_path / "trial" / "a.safetensors").hardlink_to(original)
    (tmp_path / "alias").symlink_to(tmp_path / "trial")
    checkpoint, _ = admit(tmp_path / "alias" / "a.safetensors", tmp_path / "alias")
    assert checkpoint.raw == lora(1)

"""Wake-ups, where there are none, and how a broken watch is mended."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from evaluator_daemon.watcher import MAX_FAILURES, FolderWatch, Watches


@pytest.mark.parametrize(
    ("change", "wakes"),
    [
        pytest.param(lambda f: (f / "new").write_bytes(b"x"), True, id="a file is written"),
        pytest.param(lambda f: (f / "old").rename(f / "moved"), True, id="a file is renamed"),
        pytest.param(lambda f: (f / "trial_0001").mkdir(), True, id="a folder is made"),
        pytest.param(lambda f: (f / "old").read_bytes(), False, id="a file is read"),
        pytest.param(lambda f: (f / "own.json").write_bytes(b"x"), False, id="a name that does not matter"),
        pytest.param(lambda f: (f / "below/new").write_bytes(b"x"), False, id="something happens further below"),
    ],
)
def test_what_wakes(tmp_path, change, wakes):
    (tmp_path / "old").write_bytes(b"")
    (tmp_path / "below").mkdir()
    woken = threading.Event()
    watch = FolderWatch(tmp_path, ("trial_*", "new", "moved"), woken.set)
    try:
        assert watch.blind_because is None
        change(tmp_path)
        assert woken.wait(10.0 if wakes else 0.5) is wakes
        watch.check()
    finally:
        watch.close()


@pytest.fixture
def watched(tmp_path):
    """A folder under watch, and an event that is set by every wake-up."""
    folder = tmp_path / "study"
    folder.mkdir()
    woken = threading.Event()
    watches = Watches(woken.set)
    assert watches.keep({folder: ("trial_*",)})
    yield folder, watches, woken
    watches.close()


def wakes(folder: Path, woken: threading.Event) -> bool:
    woken.clear()
    (folder / f"trial_{time.monotonic_ns()}").mkdir()
    return woken.wait(10.0)


def test_nothing_is_lost_while_all_is_well(watched):
    folder, watches, woken = watched
    assert wakes(folder, woken)
    assert watches.check() is None
    assert not watches.keep({folder: ("trial_*",)}), "no new folder"


def test_a_folder_moved_to_a_waking_name_wakes(watched):
    folder, _, woken = watched
    (folder / "being_made").mkdir()
    woken.clear()
    (folder / "being_made").rename(folder / "trial_0001")
    assert woken.wait(10.0)


def deleted(folder: Path) -> None:
    folder.rmdir()


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def found_by(watches: Watches) -> str | None:
    """What a check finds; a moment later where the new folder got the old inode: then only the dead thread tells."""
    deadline = time.monotonic() + 20
    while (why := watches.check()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return why


@pytest.mark.parametrize("away", [deleted, moved])
def test_a_folder_that_was_replaced_is_watched_again(watched, away):
    folder, watches, woken = watched
    away(folder)
    folder.mkdir()
    assert found_by(watches) == "study was replaced"
    assert wakes(folder, woken)
    assert watches.check() is None


def test_a_folder_that_is_gone_for_a_while_is_watched_when_it_is_back(watched):
    folder, watches, woken = watched
    folder.rmdir()
    assert watches.check() == "study was replaced"
    assert watches.check() is None
    folder.mkdir()
    assert watches.check() == "study can be watched again"
    assert wakes(folder, woken)


def test_a_link_turned_to_another_folder_is_followed(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    link, woken = tmp_path / "trial_0001", threading.Event()
    link.symlink_to("one")
    watches = Watches(woken.set)
    watches.keep({link: ("trial_*",)})
    try:
        assert wakes(tmp_path / "one", woken)
        link.unlink()
        link.symlink_to("two")
        assert watches.check() == "trial_0001 was replaced"
        assert wakes(tmp_path / "two", woken)
    finally:
        watches.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_ended_by_its_handler_is_replaced_and_later_and_later_if_it_happens_again(tmp_path):
    now, crashes = [0.0], [True]
    woken = threading.Event()

    def wake() -> None:
        woken.set()
        if crashes[0]:
            raise RuntimeError("a handler that crashes")

    watches = Watches(wake, clock=lambda: now[0])
    watches.keep({tmp_path: ("trial_*",)})
    why = "a thread that reads events had ended"

    def crash() -> str:
        assert wakes(tmp_path, woken)
        deadline = time.monotonic() + 10
        while (lost := watches.check()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return lost

    try:
        assert crash() == why
        assert not watches.blind, "the first is replaced at once"
        assert crash() == why
        assert watches.blind == {tmp_path: "watching failed a moment ago"}
        now[0] = 3.9
        assert watches.check() is None
        now[0] = 4.0
        assert watches.check() == f"{tmp_path.name} can be watched again"
        for failure in range(3, MAX_FAILURES + 1):
            assert crash() == why
            now[0] += min(300.0, 2.0**failure)
            watches.check()
        assert list(watches.blind.values()) == [
            f"watching failed {MAX_FAILURES} times in a row; start again to try again"
        ]
        now[0] += 1e6
        assert watches.check() is None
    finally:
        watches.close()


def test_only_the_folders_asked_for_wake(watched, tmp_path):
    folder, watches, woken = watched
    other = tmp_path / "other"
    other.mkdir()
    assert watches.keep({folder: ("trial_*",), other: ("trial_*",)})
    assert wakes(other, woken)
    assert not watches.keep({folder: ("trial_*",)})
    woken.clear()
    (other / "trial_2").mkdir()
    assert not woken.wait(0.3)
    assert wakes(folder, woken)


def test_no_thread_and_no_descriptor_is_left(tmp_path):
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        watch = FolderWatch(tmp_path, ("*",), lambda: None)
        watch.close()
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before

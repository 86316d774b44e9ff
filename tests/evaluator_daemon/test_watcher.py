"""Wake-ups, and where there are none."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from evaluator_daemon.watcher import FolderWatch, mount_type

MOUNTS = [
    "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw",
    "30 22 0:30 / /mnt/c rw,noatime - 9p C:\\134 rw,dirsync,aname=drvfs",
    "31 30 8:2 / /mnt/c/fast rw - xfs /dev/sdb rw",
    "32 22 0:33 / /mnt/my\\040share rw - nfs4 server:/x rw",
]


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/me", "ext4"),
        ("/mnt/c/x", "9p"),
        ("/mnt/cc", "ext4"),
        ("/mnt/c/fast/x", "xfs"),
        ("/mnt/my share", "nfs4"),
    ],
)
def test_the_longest_mount_point_decides(folder, kind):
    assert mount_type(Path(folder), MOUNTS) == kind


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

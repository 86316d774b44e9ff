"""The mount table: the deepest mount of a path, and which file systems SQLite cannot work on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.mounts import file_system, network_type, tells_changes

TABLE = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 27 0:40 / /mnt/c rw,noatime - 9p C:\134 rw,aname=drvfs;path=C:\134
41 27 0:41 / /home rw shared:7 master:2 - nfs4 server:/home rw,vers=4.2
42 41 254:0 /scratch /home/ann/scratch rw - ext4 /dev/vda rw
43 27 0:43 / /my\040share\134x rw - cifs //box/share rw
44 27 0:44 / /old rw - ext4 /dev/vdb rw
45 44 0:45 / /old rw - fuse.sshfs box:/data rw
46 27 0:46 / /vault rw - fuse.gocryptfs /crypt rw
47 27 0:47 / /mnt/Büro\040\134040 rw - nfs4 server:/y rw
48 27 0:48 / /mnt/@FF@ rw - cifs //server/z rw
49 27 0:49 / /mnt/a@LS@b@NB@c rw - beegfs nodev rw
50 27 0:50 / /data rw - fuseblk /dev/sdb1 rw
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    text = TABLE.replace("@LS@", "\u2028").replace("@NB@", "\u00a0").replace("@FF@", "\udcff")
    path.write_bytes(os.fsencode(text))
    return path


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/mnt/c/studies/one", "9p"),
        ("/mnt/cd", None),
        ("/home/ann/study", "nfs4"),
        ("/home/ann/scratch/study", None),  # a bind mount of a local disk within
        (r"/my share\x/study", "cifs"),
        ("/old/study", "fuse.sshfs"),  # mounted over a local disk
        ("/vault/study", None),
        ("/mnt/Büro \\040/study", "nfs4"),
        ("/mnt/\udcff/study", "cifs"),
        ("/mnt/a\u2028b\u00a0c/study", "beegfs"),
        ("/data/study", None),
        ("/srv", None),
    ],
)
def test_network_file_systems_by_the_deepest_and_latest_mount(table, path, kind):
    assert network_type(Path(path), table) == kind


def test_links_are_followed(table, tmp_path):
    (tmp_path / "link").symlink_to("/mnt/c/studies")
    assert network_type(tmp_path / "link" / "not there yet", table) == "9p"


def test_this_machine_tells_and_one_without_a_table_does_not(tmp_path):
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/"), tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("kind", "tells"),
    [("ext4", True), ("overlay", True), ("nfs", False), ("9p", False), ("fuse", False), ("fuseblk", False)],
)
def test_where_inotify_sees_what_others_write(kind, tells):
    assert tells_changes(kind) is tells

"""A study folder on a real network mount: sshfs over a pipe to its own server, where FUSE is to be had."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from shared.mounts import network_type
from tests.scenarios.invariants import violations
from tests.scenarios.quick_lab import PATIENCE_S, QuickLab

SFTP_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    server = next((path for path in SFTP_SERVERS if Path(path).exists()), None)
    if shutil.which("sshfs") is None or server is None or not Path("/dev/fuse").exists():
        pytest.skip("no sshfs with an sftp-server and /dev/fuse here")
    for name in ("server", "share"):
        (tmp_path / name).mkdir()
    pipe = tmp_path / "ssh"
    pipe.write_text(f"#!/bin/sh\nexec {server}\n")
    pipe.chmod(0o755)
    share = tmp_path / "share"
    mount = ["sshfs", "-o", f"ssh_command={pipe}", f"here:{tmp_path / 'server'}", str(share)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"sshfs cannot mount here: {made.stderr.strip()}")
    try:
        yield share
    finally:
        subprocess.run(["fusermount", "-u", "-z", str(share)], check=True)


class NetworkLab(QuickLab):
    """A quick lab whose study folder lies on the mount; each `machine` has a home of its own."""

    def __init__(self, share: Path) -> None:
        super().__init__(share)
        self.machine = "first"

    @property
    def home(self) -> Path:
        return self.folder.parent / self.machine

    def environment(self, failpoints: str = "", env=None) -> dict[str, str]:
        return {**super().environment(failpoints, env), "XDG_STATE_HOME": str(self.home)}

    @property
    def live(self) -> Path:
        (found,) = self.home.glob("lora-tuner/lora_study-*/optuna_study.db")
        return found

    def finish(self, count: int) -> str:
        """Run to that many trials; return what the daemon said."""
        daemon = self.optimizer("--n-trials", count, "--sampler", "random")
        assert daemon.wait(PATIENCE_S) == 0, daemon.said
        # sshfs keeps what was replaced while somebody had it open under such a name, until the last one closes it
        assert [found for found in violations(self.study, finished=count) if not found.startswith(".fuse_hidden")] == []
        return daemon.said


def trials_in(database: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    storage = f"sqlite:///{database}"
    return [trial.state.name for trial in optuna.load_study(study_name="lora_study", storage=storage).trials]


def test_the_database_is_kept_at_home_and_its_copy_is_whole_after_every_trial(mounted):
    assert network_type(mounted) == "fuse.sshfs"
    with NetworkLab(mounted) as lab:
        said = lab.finish(1)
        assert said.count("database kept outside the study folder") == 1
        assert trials_in(lab.live) == trials_in(lab.study.database) == ["COMPLETE"]
        beside = sorted(path.name for path in lab.study.root.glob("optuna_study.db*"))
        assert beside == ["optuna_study.db"], "a copy needs no log of writes beside it"
        lab.machine = "second"  # its home has nothing of the study
        assert 'begun from the copy of the database copy="1 trials"' in lab.finish(2)


@pytest.mark.slow
def test_a_machine_that_comes_back_goes_on_from_what_another_one_did(mounted):
    with NetworkLab(mounted) as lab:
        lab.finish(1)
        lab.machine = "second"
        lab.finish(2)
        lab.machine = "first"
        assert 'begun from the copy of the database copy="2 trials" here="1 trials"' in lab.finish(3)
        assert trials_in(lab.live.with_name("optuna_study.db.set-aside-1")) == ["COMPLETE"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["database.changed=kill@2", "database.changed=kill@4", "files.written=kill@6", "optimizer.reported=kill"]
)
def test_a_daemon_killed_before_the_copy_is_replaced_goes_on_here_or_elsewhere(mounted, place):
    with NetworkLab(mounted) as lab:
        for machine in ("first", "second", "first"):
            lab.machine = machine
            daemon = lab.optimizer("--n-trials", 2, "--sampler", "random", failpoints=place)
            assert daemon.wait(PATIENCE_S) in (-9, 0), daemon.said
        lab.finish(2)


def test_a_database_on_the_mount_that_somebody_names_is_refused(mounted):
    with NetworkLab(mounted) as lab:
        daemon = lab.optimizer("--storage", f"sqlite:///{lab.study.root}/mine.db")
        assert daemon.wait(PATIENCE_S) == 2
        assert "it lies on fuse.sshfs" in daemon.said and "leave --storage out" in daemon.said
        assert not lab.study.run.exists()


@pytest.mark.slow
def test_a_configuration_can_be_enqueued_while_no_daemon_runs(mounted):
    with NetworkLab(mounted) as lab:
        lab.finish(1)
        answer = lab.ask("enqueue", "learning_rate=0.001")
        assert answer.returncode == 0, answer.stderr
        assert trials_in(lab.study.database) == ["COMPLETE", "WAITING"]
        lab.machine = "second"
        lab.finish(2)
        assert lab.ask("status").returncode == 0

"""A study folder where SQLite cannot work: the database elsewhere, its copy, and which of the two is gone on from."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from optimizer_daemon import database
from optimizer_daemon.database import Database, require_local, sqlite_file
from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.search.space import parse_space
from shared.errors import LabError, ResourceError, SettingsError, StudyMismatchError
from shared.files import read_model
from shared.layout import StudyLayout
from shared.schemas import Run
from tests.scenarios.written_study import plan_study

SPACE = parse_space('name = "line"\n[parameters.x]\ntype = "float"\nlow = 0.0\nhigh = 1.0\n', "test.toml")


class Share:
    """A study folder that every machine sees, and a home of each machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.copy = folder / "optuna_study.db"

    def live(self, machine: str) -> Path:
        return self.folder / machine / "optuna_study.db"

    def opened(self, machine: str, folder_id: str = "a") -> TuningStudy:
        url = f"sqlite:///{self.live(machine)}"
        return TuningStudy.open("s", url, SPACE, seed=1, folder_id=folder_id, sampler="random", copy=self.copy)

    def run(self, machine: str, trials: int) -> None:
        study = self.opened(machine)
        for _ in range(trials):
            study.tell_complete(study.ask().number, 0.5, None)
        study.close()

    def count(self, database: Path) -> int:
        with contextlib.closing(sqlite3.connect(database)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            return connection.execute("SELECT count(*) FROM trials").fetchone()[0]


@pytest.fixture
def share(tmp_path: Path) -> Share:
    return Share(tmp_path)


def test_every_change_is_in_the_copy_which_is_one_plain_file(share):
    study = share.opened("here")
    draw = study.ask()
    assert share.count(share.copy) == 1
    study.report(draw.number, 2, 0.7)
    with contextlib.closing(sqlite3.connect(share.copy)) as connection:
        assert connection.execute("SELECT intermediate_value FROM trial_intermediate_values").fetchall() == [(0.7,)]
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    before = share.copy.stat()
    study.report(draw.number, 2, 0.7)
    assert share.copy.stat() == before, "nothing has changed"
    assert [path.name for path in share.folder.glob("optuna_study.db*")] == ["optuna_study.db"]
    study.enqueue({"x": 0.5}, "request")
    assert share.count(share.copy) == 2
    study.close()


def test_another_machine_begins_from_the_copy_and_an_earlier_database_never_wins(share, caplog):
    caplog.set_level("INFO")
    share.run("here", 2)
    share.run("there", 3)
    assert share.count(share.live("there")) == 5
    share.run("here", 1)
    assert [share.count(path) for path in (share.live("here"), share.copy)] == [6, 6]
    assert share.count(share.folder / "here" / "optuna_study.db.set-aside-1") == 2
    assert caplog.messages.count("begun from the copy of the database") == 2
    caplog.clear()
    share.run("here", 1)
    assert caplog.messages == [], "the usual start has nothing to tell"


def test_a_live_database_that_is_ahead_is_gone_on_with(share, caplog):
    caplog.set_level("INFO")
    share.run("here", 1)
    earlier = share.copy.read_bytes()
    share.run("here", 1)
    share.copy.write_bytes(earlier)  # as after kill -9 before the copy was replaced
    share.run("here", 0)
    assert share.count(share.copy) == 2
    assert caplog.messages == ["copy of the database is behind"]
    share.copy.unlink()
    share.run("here", 0)
    assert share.count(share.copy) == 2


def test_by_scores_where_the_trials_are_as_many(share):
    study = share.opened("here")
    number = study.ask().number
    study.close()
    study = share.opened("there")
    study.report(number, 2, 0.5)
    study.close()
    study = share.opened("here")
    study.tell_pruned(number, "losing")
    assert study.ended()[0].curve == {2: 0.5}
    study.close()


def test_damage_on_either_side(share, caplog):
    caplog.set_level("INFO")
    share.run("here", 2)
    whole = share.copy.read_bytes()
    share.copy.write_bytes(b"no database at all, and longer than a header" * 10)
    share.run("here", 0)
    assert share.count(share.copy) == 2
    share.live("here").write_bytes(whole[:5000])
    share.run("here", 0)
    assert share.count(share.live("here")) == 2
    share.copy.write_bytes(whole[:5000])
    with pytest.raises(ResourceError, match="put a copy of it back"):
        share.opened("there")
    assert share.copy.read_bytes() == whole[:5000]
    assert not share.live("there").exists()


def test_a_copy_of_another_study_folder_is_refused_and_nothing_is_changed(share):
    share.run("here", 2)
    before = share.copy.read_bytes(), share.live("here").read_bytes()
    with pytest.raises(StudyMismatchError, match="belongs to folder a, not to b"):
        share.opened("here", folder_id="b")
    assert (share.copy.read_bytes(), share.live("here").read_bytes()) == before


def test_a_live_database_of_another_study_folder_is_set_aside(share):
    share.run("here", 1)
    other = Share(share.folder / "other")
    other.folder.mkdir()
    other.opened("here", folder_id="b").close()
    share.live("here").write_bytes(other.live("here").read_bytes())
    share.run("here", 1)
    assert share.count(share.copy) == 2


def test_two_machines_at_once_are_noticed(share):
    here = share.opened("here")
    draw = here.ask()
    there = share.opened("there")
    with pytest.raises(StudyMismatchError, match="was replaced by somebody else"):
        here.report(draw.number, 2, 0.5)
    there.report(draw.number, 2, 0.5)
    here.close()
    there.close()


def test_a_database_that_was_once_written_on_the_mount_itself_is_taken_with_its_log_of_writes(share):
    study = TuningStudy.open("s", f"sqlite:///{share.copy}", SPACE, seed=1, folder_id="a", sampler="random")
    study.ask()
    left = {path: path.read_bytes() for path in share.folder.glob("optuna_study.db*")}
    study.close()
    for path, content in left.items():  # as kill -9 leaves it
        path.write_bytes(content)
    assert len(left) == 3
    share.run("here", 1)
    assert share.count(share.live("here")) == share.count(share.copy) == 2
    assert [path.name for path in share.folder.glob("optuna_study.db*")] == ["optuna_study.db"]


def test_a_full_disk_under_the_copy_stops_the_study_and_the_next_start_goes_on(share, monkeypatch):
    study = share.opened("here")
    monkeypatch.setenv("LORA_TUNER_FAILPOINTS", "files.written=full")
    with pytest.raises(LabError, match="free space"):
        study.ask()
    study.close()
    monkeypatch.delenv("LORA_TUNER_FAILPOINTS")
    study = share.opened("here")
    assert [draw.number for draw in study.running()] == [0]
    study.close()
    assert share.count(share.copy) == 1


# ------------------------------------------------------------------------------------------- where the database is


@pytest.fixture
def study(tmp_path: Path) -> StudyLayout:
    layout = StudyLayout(tmp_path / "study")
    plan_study(layout)
    return layout


def mounts(folder: Path, kinds: dict[Path, str]) -> Path:
    table = folder / "mountinfo"
    lines = [f"1 0 0:1 / {path} rw - {kind} source rw" for path, kind in kinds.items()]
    table.write_text("\n".join(["1 0 0:1 / / rw - ext4 /dev/vda rw", *lines]) + "\n")
    return table


def test_only_the_default_database_on_a_network_mount_is_kept_elsewhere(study, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = read_model(study.run, Run)
    local = Database.of(run, study, mounts(tmp_path, {}))
    assert local == Database(run.storage)
    table = mounts(tmp_path, {study.root: "9p"})
    kept = Database.of(run.model_copy(update={"study_name": "my/study"}), study, table)
    live = tmp_path / "state" / "lora-tuner" / f"my_study-{run.folder_id}" / "optuna_study.db"
    assert kept == Database(f"sqlite:///{live}", study.database)
    assert kept.readable_url == f"sqlite:///{study.database}"
    other = run.model_copy(update={"storage": "postgresql+psycopg://db/optuna"})
    assert Database.of(other, study, table) == Database(other.storage)


def test_a_home_on_the_network_too_is_passed_over(study, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    local = tmp_path / "local"
    local.mkdir()
    monkeypatch.setattr(database, "_FALLBACK", local)
    table = mounts(tmp_path, {tmp_path: "nfs", local: "ext4"})
    assert Database.of(read_model(study.run, Run), study, table).url.startswith(f"sqlite:///{local}/lora-tuner-")
    table = mounts(tmp_path, {tmp_path: "nfs"})
    assert Database.of(read_model(study.run, Run), study, table).url.startswith(f"sqlite:///{tmp_path / 'state'}/")


def test_a_named_database_on_a_network_mount_is_refused(tmp_path):
    table = mounts(tmp_path, {Path("/mnt/c"): "9p"})
    for storage in ("sqlite:////mnt/c/study.db", "sqlite+pysqlite:////mnt/c/study.db"):
        with pytest.raises(SettingsError, match=r"--storage: .* lies on 9p.*local disk or a database server"):
            require_local(storage, table)
    for storage in (None, "sqlite:////srv/study.db", "postgresql://host/mnt/c", "sqlite://"):
        require_local(storage, table)


def test_the_file_of_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sqlite_file("sqlite:///study.db") == tmp_path / "study.db"
    assert sqlite_file("sqlite:////srv/study.db?timeout=10") == Path("/srv/study.db")
    assert sqlite_file("sqlite:///file:/srv/study.db?uri=true") == Path("/srv/study.db")
    assert sqlite_file("sqlite:///:memory:") is None
    assert sqlite_file("mysql://host/db") is None

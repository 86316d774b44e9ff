"""A study whose storage is a real PostgreSQL server, started here where its programs are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage

from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.search.space import parse_space
from shared.errors import ResourceError, SettingsError
from shared.files import read_model
from shared.schemas import Run
from tests.scenarios.invariants import violations
from tests.scenarios.quick_lab import PATIENCE_S, QuickLab

SPACE = parse_space('name = "line"\n[parameters.x]\ntype = "float"\nlow = 0.0\nhigh = 1.0\n', "test.toml")


class Server:
    """A cluster of its own in `folder`, reached by a socket there; the server refuses to be run by root."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self._user = "nobody" if os.getuid() == 0 else None
        if self._user is not None:
            shutil.chown(folder, self._user)
        self._run("initdb", "--auth=trust", "--username=study", "--no-sync", "--encoding=UTF8")
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://study@/postgres?host={self._folder}"

    def start(self) -> None:
        self._run(
            "pg_ctl", "--wait", "-l", self._folder / "log", "-o", f"-k {self._folder} -c listen_addresses=", "start"
        )

    def stop(self) -> None:
        self._run("pg_ctl", "--wait", "--mode=fast", "stop")

    def _run(self, program: str, *words: object) -> None:
        command = [str(self._programs / program), "--pgdata", str(self._folder / "data"), *map(str, words)]
        done = subprocess.run(
            command, user=self._user, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="no psycopg here")
    found = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if found is None:
        pytest.skip("no PostgreSQL server here (initdb)")
    with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as folder:
        server = Server(Path(found).resolve().parent, Path(folder))
        yield server
        server.stop()


class ServerLab(QuickLab):
    def __init__(self, folder: Path, url: str, study_name: str) -> None:
        super().__init__(folder)
        text = self.study_file.read_text()
        self.study_file.write_text(
            text.replace("[optimizer]", f'[optimizer]\nstorage = "{url}"\nstudy_name = "{study_name}"')
        )
        self._name, self._url = study_name, url

    def states(self) -> list[str]:
        storage = RDBStorage(self._url)
        trials = optuna.load_study(study_name=self._name, storage=storage).trials
        storage.engine.dispose()
        return [trial.state.name for trial in trials]


def opened(server: Server, name: str = "small") -> TuningStudy:
    return TuningStudy.open(name, server.url, SPACE, seed=1, folder_id="a", sampler="random")


def test_what_was_running_is_found_again_and_a_restarted_server_is_gone_on_with(server):
    study = opened(server)
    first, second = study.ask(), study.ask()
    study.report(first.number, 2, 0.5)
    study.report(first.number, 2, 0.25)  # a second value replaces the first
    study.tell_complete(first.number, 0.125, None)
    server.stop()
    with pytest.raises(ResourceError, match="database failed"):
        study.report(second.number, 2, 0.5)
    server.start()
    study.report(second.number, 2, 0.5)
    study.close()
    study = opened(server)
    assert study.running() == [second]
    (ended,) = study.ended()
    assert (ended.value, ended.curve) == (0.125, {2: 0.25})
    assert study.ask().number == 2
    study.close()


def test_a_server_that_is_not_there_is_one_error(server):
    with pytest.raises(SettingsError, match="--storage"):
        TuningStudy.open("s", "postgresql+psycopg://study@/none?host=/nonexistent", SPACE, seed=1, folder_id="a")


@pytest.mark.slow
def test_a_study_runs_is_killed_goes_on_and_keeps_its_time(server, tmp_path):
    with ServerLab(tmp_path, server.url, "killed") as lab:
        daemon = lab.optimizer("--n-trials", 3, hold=str(tmp_path / "go"))
        lab.wait_for_training(1, daemon)
        daemon.kill()
        lab.kill_training(1)
        assert lab.states() == ["RUNNING"]
        for place in ("optimizer.asked=kill@2", "optimizer.draw_stored=kill", "optimizer.told=kill@2"):
            daemon = lab.optimizer("--n-trials", 3, failpoints=place)
            assert daemon.wait(PATIENCE_S) in (0, -9), daemon.said
        daemon = lab.optimizer("--n-trials", 3)
        assert daemon.wait(PATIENCE_S) == 0, daemon.said
        assert violations(lab.study, finished=3) == []
        assert lab.states() == ["COMPLETE"] * 3
        assert not lab.study.database.exists()
        assert (lab.study.results.param_importances).exists()
        begin = time.monotonic()
        daemon = lab.optimizer("--n-trials", 50, "--timeout", 20, hold=str(tmp_path / "time"))
        lab.wait_for_training(4, daemon)
        time.sleep(max(0.0, begin + 20 - time.monotonic()))
        (tmp_path / "time").touch()
        assert daemon.wait(PATIENCE_S) == 0, daemon.said
        assert 4 <= len(lab.states()) < 50
        assert set(lab.states()) == {"COMPLETE"}, "the running trial came to its end"
        assert read_model(lab.study.run, Run).status == "stopped"
        asked = lab.ask("enqueue", "learning_rate=0.001")
        assert asked.returncode == 0, asked.stderr
        assert lab.states()[-1] == "WAITING"

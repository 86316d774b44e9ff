"""Trainings forked from a preloaded server: all that a program of their own has, without its imports."""

from __future__ import annotations

import logging
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest

from shared.gpu_lease import GpuLease
from shared.layout import TrialLayout
from shared.locks import FileLock
from shared.preloaded import Preload, Preloaded
from shared.supervised import SupervisedProcess, adopt, start_supervised
from tests.shared.process_trees import (  # noqa: F401  no_process_left is an autouse fixture
    PATIENCE_S,
    is_running,
    no_process_left,
    pid_in,
    start,
    wait_until,
)

HEAVY = """
import os, time
with open("imports.txt", "a") as file:
    file.write(f"{os.getpid()}\\n")
"""


class Trainings:
    """A folder of modules to train with, and the server that preloads one of them.

    Args:
        root: the folder.
        heavy: what the preloaded module does.
    """

    def __init__(self, root: Path, heavy: str = HEAVY) -> None:
        self.root = root
        (root / "heavy.py").write_text(heavy)
        self.server = Preloaded(Preload(("heavy",), {"FROM_PLAN": "1"}, root))

    def ready(self) -> Preloaded:
        wait_until(self.server.settled, "the imports")
        return self.server

    @property
    def server_pid(self) -> int:
        (pid,) = self.root.joinpath("imports.txt").read_text().split()
        return int(pid)

    def trial(self, number: int = 1) -> TrialLayout:
        folder = self.root / f"trial_{number:04d}"
        folder.mkdir(exist_ok=True)
        return TrialLayout(folder)

    def start(self, script: str, *words: str, number: int = 1, **options) -> SupervisedProcess:
        (self.root / f"training_{number}.py").write_text(textwrap.dedent(script))
        server = options.pop("preloaded", None) or self.ready()
        options = {"directory": self.trial(number).folder, "cwd": self.root, "preloaded": server} | options
        return start_supervised([sys.executable, "-m", f"training_{number}", *words], **options)

    def ended(self, script: str, *words: str, number: int = 1, **options):
        """Train to the end; return the record and the log."""
        trainer = self.start(script, *words, number=number, **options)
        assert trainer.wait(PATIENCE_S)
        return trainer.exit_record(), self.trial(number).training_log.read_text()


@pytest.fixture
def trainings(tmp_path):
    made = Trainings(tmp_path)
    yield made
    made.server.close()


@pytest.mark.parametrize(
    ("script", "status", "number", "said"),
    [
        pytest.param("print('done')", 0, None, "done\n", id="success"),
        pytest.param("import sys; print('no'); sys.exit(3)", 3, None, "no\n", id="an exit status"),
        pytest.param("import sys; sys.exit('why')", 1, None, "why\n", id="an exit text"),
        pytest.param("raise ValueError('why')", 1, None, "ValueError: why\n", id="an exception"),
        pytest.param("import os; os.kill(os.getpid(), 9)", None, signal.SIGKILL, "", id="SIGKILL"),
    ],
)
def test_the_record_and_the_log_tell_how_it_ended(trainings, script, status, number, said):
    record, log = trainings.ended(script)
    assert (record.exit_status, record.signal) == (status, number)
    assert log.endswith(said)
    assert record.command[1:] == ("-m", "training_1")


def test_two_trainings_import_once_and_run_as_a_program_would(trainings, tmp_path, monkeypatch):
    monkeypatch.setenv("OF_DAEMON", "yes")
    script = """
        import heavy, json, os, signal, sys
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        stop = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        known = [name for name in ("TOKEN", "OF_DAEMON", "FROM_PLAN") if name in os.environ]
        main = sys.modules["__main__"].__name__
        print(json.dumps([__name__, main, sys.argv[1:], os.getcwd(), known, sorted(blocked), stop]))
        print(os.getpgid(0) == os.getpid() != os.getsid(0))
    """
    for number in (1, 2):
        record, log = trainings.ended(script, "--config", "a b", number=number, env={"TOKEN": "s3cret"})
        assert record.exit_status == 0
        said = '["__main__", "__main__", ["--config", "a b"], "%s", ["TOKEN"], [], true]\nTrue\n'
        assert log == said % tmp_path
    assert trainings.server_pid != record.pid, "imported by the server alone"


def test_one_server_serves_all_cards_for_each_training_sees_its_own(trainings, tmp_path):
    """Two at the same time, of which each waits for the other."""
    script = """
        import heavy, os, time
        card = os.environ["CUDA_VISIBLE_DEVICES"]
        open(f"sees-{card}", "w").close()
        other = {"GPU-1": "GPU-2", "GPU-2": "GPU-1"}[card]
        while not os.path.exists(f"sees-{other}"):
            time.sleep(0.02)
        print(card)
    """
    both = [trainings.start(script, number=number, env={"CUDA_VISIBLE_DEVICES": f"GPU-{number}"}) for number in (1, 2)]
    for number, training in enumerate(both, 1):
        assert training.wait(PATIENCE_S)
        assert trainings.trial(number).training_log.read_text() == f"GPU-{number}\n"
    assert trainings.server_pid, "one import"


def test_what_is_loaded_by_the_call_is_there_in_every_training(tmp_path):
    trainings = Trainings(
        tmp_path, HEAVY + "kept = []\ndef load(argument):\n    kept.append((argument, os.getpid()))\n"
    )
    trainings.server = Preloaded(Preload(("heavy",), {}, tmp_path, ("heavy:load", "the model")))
    for number in (1, 2):
        _, log = trainings.ended("import heavy; print(*heavy.kept[0])", number=number)
        assert log == f"the model {trainings.server_pid}\n"
    trainings.server.close()


def test_sigterm_reaches_the_training_which_saves_and_ends_with_143(trainings):
    trainer = trainings.start("""
        import signal, sys, time
        def save(number, frame):
            open("saved", "w").close()
            sys.exit(143)
        signal.signal(signal.SIGTERM, save)
        open("up", "w").close()
        time.sleep(60)
    """)
    wait_until((trainings.root / "up").exists, "start")
    report = trainer.stop(term_timeout_s=PATIENCE_S, kill_timeout_s=PATIENCE_S)
    assert (report.terminated, report.killed, report.survivors) == ((trainer.supervisor.pid,), (), ())
    assert (trainings.root / "saved").exists()
    assert trainer.exit_record().exit_status == 143


def test_the_lock_and_the_lease_last_as_long_as_the_tree_and_no_longer(trainings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    lease = GpuLease("GPU-1", "exclusive trainer", inheritable=True).acquire()
    script = "import subprocess, sys; child = subprocess.Popen(['sleep', '60'], close_fds=False)\n"
    script += "with open('child', 'w') as file: file.write(f'{child.pid}\\n')\n"
    trainer = trainings.start(script, pass_fds=lease.filenos(), leftover_timeout_s=60)
    lease.release()
    child = pid_in(trainings.root / "child")
    lock = trainings.trial().trainer_lock
    assert FileLock.is_held(lock)
    os.kill(trainer.supervisor.pid, signal.SIGKILL)
    wait_until(lambda: not trainer.supervisor.is_alive, "the supervisor's end")
    assert trainer.is_alive, "the grandchild holds the lock"
    with pytest.raises(Exception, match="GPU-1 is in use"):
        GpuLease("GPU-1", "evaluator").acquire()
    record, _ = trainings.ended("pass", number=2)
    assert record.exit_status == 0, "another trial's training does not wait for it"
    os.kill(child, signal.SIGKILL)
    assert trainer.wait(PATIENCE_S)
    GpuLease("GPU-1", "evaluator").acquire().release()


def test_a_training_outlives_its_server_and_the_next_has_another(trainings, caplog):
    caplog.set_level(logging.INFO)
    trainer = trainings.start("import time\nopen('up', 'w').close()\ntime.sleep(60)")
    wait_until((trainings.root / "up").exists, "start")
    server = trainings.server_pid
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: not is_running(server), "the server's end")
    record, _ = trainings.ended("pass", number=2)
    assert record.exit_status == 0
    assert len((trainings.root / "imports.txt").read_text().split()) == 2, "another server"
    assert "the preloaded trainer process has ended; another is started" in caplog.text
    assert trainer.is_alive
    trainer.stop(term_timeout_s=PATIENCE_S, kill_timeout_s=PATIENCE_S)
    assert trainer.exit_record().signal == signal.SIGTERM


def test_a_server_that_dies_at_the_very_moment_is_done_without(trainings, caplog):
    server = trainings.ready()
    os.kill(trainings.server_pid, signal.SIGKILL)
    record, log = trainings.ended("print('trained')", preloaded=server)
    assert (record.exit_status, log) == (0, "trained\n")
    assert "does not answer; the training is started without it" in caplog.text


def test_a_server_that_stands_still_is_ended_and_done_without(trainings, monkeypatch):
    monkeypatch.setattr("shared.preloaded._FORK_PATIENCE_S", 0.2)
    server = trainings.ready()
    os.kill(trainings.server_pid, signal.SIGSTOP)
    record, log = trainings.ended("print('trained')", preloaded=server)
    assert (record.exit_status, log) == (0, "trained\n")
    assert not is_running(trainings.server_pid)


@pytest.mark.parametrize(
    ("heavy", "reason"),
    [
        pytest.param("import no_such_library", "No module named 'no_such_library'", id="a library is missing"),
        pytest.param("import os; os._exit(9)", "it ended", id="the process ends"),
        pytest.param(
            "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
            "RuntimeError: 2 threads live, of which a fork would have one",
            id="an import leaves a thread",
        ),
    ],
)
def test_what_cannot_be_imported_is_said_once_and_done_without(tmp_path, caplog, heavy, reason):
    trainings = Trainings(tmp_path, heavy)
    for number in (1, 2):
        assert trainings.ended("print('trained')", number=number)[1] == "trained\n"
    (said,) = [record for record in caplog.records if record.name == "shared.preloaded"]
    assert said.message == "trainer not preloaded; each training loads for itself"
    assert reason in said.fields["reason"]


def test_nobody_waits_for_ever_for_the_imports(tmp_path):
    seconds = iter([0.0, 1.0, 299.0, 301.0])
    (tmp_path / "heavy.py").write_text("import time; time.sleep(60)")
    server = Preloaded(Preload(("heavy",), {}, tmp_path), clock=lambda: next(seconds))
    assert [server.settled() for _ in range(3)] == [False, False, True]
    assert server.fork([], [sys.executable, "-m", "training"], []) is None


def test_kill_9_of_the_daemon_ends_the_server_and_leaves_the_training_to_be_adopted(tmp_path):
    (tmp_path / "heavy.py").write_text(HEAVY)
    (tmp_path / "training.py").write_text(
        "import os, time\nopen('pid', 'w').write(f'{os.getpid()}\\n')\ntime.sleep(60)\n"
    )
    folder = tmp_path / "trial_0001"
    folder.mkdir()
    daemon = start(
        """
        import sys, time
        from pathlib import Path
        from shared.preloaded import Preload, Preloaded
        from shared.supervised import start_supervised
        root = Path(sys.argv[1])
        server = Preloaded(Preload(("heavy",), {}, root))
        while not server.settled():
            time.sleep(0.05)
        command = [sys.executable, "-m", "training"]
        start_supervised(command, directory=root / "trial_0001", cwd=root, preloaded=server)
        time.sleep(60)
        """,
        tmp_path,
    )
    training = pid_in(tmp_path / "pid")
    server = int((tmp_path / "imports.txt").read_text())
    daemon.kill()
    daemon.communicate()
    wait_until(lambda: not is_running(server), "the server's end")
    time.sleep(0.2)
    assert is_running(training)
    adopted = adopt(folder)
    assert adopted.supervisor.is_alive
    adopted.stop(term_timeout_s=PATIENCE_S, kill_timeout_s=PATIENCE_S)
    assert adopted.exit_record().signal == signal.SIGTERM


def test_a_daemon_that_dies_during_the_imports_leaves_no_server(tmp_path):
    (tmp_path / "heavy.py").write_text(HEAVY + "time.sleep(60)\n")
    daemon = start(
        """
        import sys, time
        from pathlib import Path
        from shared.preloaded import Preload, Preloaded
        Preloaded(Preload(("heavy",), {}, Path(sys.argv[1]))).settled()
        time.sleep(60)
        """,
        tmp_path,
    )
    server = pid_in(tmp_path / "imports.txt")
    daemon.kill()
    daemon.communicate()
    wait_until(lambda: not is_running(server), "the server's end")

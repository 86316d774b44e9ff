"""Trainers under their supervisor: real trees, real signals, kill -9 at every place."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.bounded_log import KEPT_HEAD_BYTES, KEPT_TAIL_BYTES, MOST_BYTES
from shared.errors import AlreadyRunningError, DiskError, ResourceError
from shared.files import read_model
from shared.gpu_lease import GpuLease
from shared.layout import TrialLayout
from shared.locks import FileLock
from shared.process import ProcessIdentity, boot_id, lock_holders
from shared.schemas import TrainerExit
from shared.supervised import adopt, start_supervised
from tests.shared.process_trees import (  # noqa: F401  no_process_left is an autouse fixture
    PATIENCE_S,
    ROOT,
    is_running,
    no_process_left,
    pid_in,
    python,
    start,
    wait_until,
)


@pytest.fixture
def trial(tmp_path):
    folder = tmp_path / "trial_0005"
    folder.mkdir()
    return TrialLayout(folder)


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def ended(trial, argv, **options) -> TrainerExit | None:
    """Run `argv` under a supervisor to its end."""
    trainer = start_supervised(argv, directory=trial.folder, **options)
    assert trainer.wait(PATIENCE_S)
    return trainer.exit_record()


def supervise(trial, *options: str, argv: list[str]) -> subprocess.Popen:
    """Start the supervisor as a command, in a session it has to make itself."""
    command = [sys.executable, "-m", "shared.supervise", "--directory", str(trial.folder), *options, "--", *argv]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)


class TestEndings:
    @pytest.mark.parametrize(
        ("script", "status", "number"),
        [
            pytest.param("exit 0", 0, None, id="success"),
            pytest.param("exit 3", 3, None, id="an exit status"),
            pytest.param("kill -KILL $$", None, signal.SIGKILL, id="SIGKILL, as the kernel sends when memory is short"),
            pytest.param("kill -SEGV $$", None, signal.SIGSEGV, id="a crash"),
        ],
    )
    def test_the_record_tells_how_it_ended(self, trial, script, status, number):
        record = ended(trial, shell(f"ulimit -c 0; {script}"))
        assert (record.exit_status, record.signal) == (status, number)
        assert record.command == ("sh", "-c", f"ulimit -c 0; {script}")
        assert record.started <= record.ended
        assert record.started.utcoffset() is not None

    def test_the_record_tells_who_it_was_what_it_took_and_who_was_beside_it(self, trial, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        grow = python("held = bytearray(40 << 20); held[::4096] = b'x' * len(held[::4096])")
        with GpuLease("GPU-1", "evaluator"), GpuLease("GPU-2", "exclusive trainer"):
            record = ended(trial, grow)
        assert record.evaluators_on == ("GPU-1",)
        assert (record.oom_kills, record.boot_id) == (0, boot_id())
        assert 40 << 20 < record.peak_memory < 400 << 20
        uptime_ticks = float(Path("/proc/uptime").read_text().split()[0]) * os.sysconf("SC_CLK_TCK")
        assert 0 < record.start_ticks <= uptime_ticks
        assert ended(trial, grow).evaluators_on == ()

    @pytest.mark.parametrize(
        ("argv", "status", "reason"),
        [
            pytest.param(["no-such-trainer"], 127, "command not found", id="an unknown command"),
            pytest.param(["./train.sh"], 127, "command not found", id="a missing file"),
            pytest.param(["./data.txt"], 126, "Permission denied", id="a file that is no program"),
            pytest.param(["./broken"], 126, "Exec format error", id="a program of no known format"),
            pytest.param(["./script"], 126, "No such file or directory", id="a script without its interpreter"),
        ],
    )
    def test_a_command_that_cannot_start_is_recorded_and_explained(self, trial, argv, status, reason):
        (trial.folder / "data.txt").touch()
        for name, content in [("broken", b"\x00\x01"), ("script", b"#!/no/such/interpreter\n")]:
            (trial.folder / name).write_bytes(content)
            (trial.folder / name).chmod(0o755)
        assert ended(trial, argv).exit_status == status
        assert f"supervise: '{argv[0]}' cannot be started: {reason}" in trial.training_log.read_text()

    def test_a_missing_working_folder_is_recorded_and_explained(self, trial):
        assert ended(trial, ["true"], cwd=trial.folder / "typo").exit_status == 126
        assert "No such file or directory" in trial.training_log.read_text()
        assert "typo" in trial.training_log.read_text()

    def test_an_impossible_environment_is_recorded_and_explained(self, trial):
        assert ended(trial, ["/bin/true"], env={"A=B": "c"}).exit_status == 126
        assert "illegal environment variable name" in trial.training_log.read_text()

    def test_any_words_make_a_command(self, trial):
        words = ["", "--", "two words", "\udcff", "日本"]
        record = ended(trial, python("import sys; print(ascii(sys.argv[1:]))", *words))
        assert record.exit_status == 0
        assert trial.training_log.read_text().strip() == ascii(words)
        assert record.command[-5:] == ("''", "--", "two words", "\\udcff", "日本")


class TestSurroundings:
    def test_output_is_appended_to_the_log(self, trial):
        trial.training_log.write_text("the attempt before\n")
        ended(trial, shell("echo out; echo err >&2"))
        assert trial.training_log.read_text() == "the attempt before\nout\nerr\n"

    def test_a_flood_of_output_arrives_whole(self, trial):
        ended(trial, shell("head -c 30000000 /dev/zero | tr '\\0' x; echo end >&2"))
        assert trial.training_log.stat().st_size == 30_000_004

    def test_a_log_that_grows_too_large_keeps_its_ends_and_gives_the_disk_its_middle_back(self, trial):
        script = "echo begin; head -c 150000000 /dev/zero | tr '\\0' x; sleep 1; echo; echo end"
        ended(trial, shell(script))
        status = trial.training_log.stat()
        assert status.st_size == 150_000_011
        assert status.st_blocks * 512 <= MOST_BYTES
        with trial.training_log.open("rb") as file:
            assert file.read(KEPT_HEAD_BYTES) == b"begin\n" + b"x" * (KEPT_HEAD_BYTES - 6)
            file.seek(-KEPT_TAIL_BYTES, os.SEEK_END)
            assert file.read() == b"x" * (KEPT_TAIL_BYTES - 5) + b"\nend\n"

    def test_the_environment_is_exactly_the_given_one_and_in_no_argument(self, trial):
        name, secret = "TOKEN", "s3cret"
        trainer = start_supervised(
            shell("env > env.txt; sleep 60"), directory=trial.folder, env={"PATH": os.environ["PATH"], name: secret}
        )
        wait_until((trial.folder / "env.txt").exists, "start")
        supervisor = Path(f"/proc/{trainer.supervisor.pid}")
        assert secret not in (supervisor / "cmdline").read_text()
        trainer.stop(term_timeout_s=PATIENCE_S, kill_timeout_s=PATIENCE_S)
        variables = set((trial.folder / "env.txt").read_text().split("\n"))
        assert f"{name}={secret}" in variables
        assert not any(variable.startswith(("PYTHONPATH", "TEST_MARK")) for variable in variables)

    def test_the_command_runs_where_it_should_and_reads_nothing(self, trial, tmp_path):
        ended(trial, shell("pwd; cat"), cwd=tmp_path)
        assert trial.training_log.read_text() == f"{tmp_path}\n"

    def test_signals_start_with_their_defaults(self, trial):
        ended(trial, shell("grep -E 'Sig(Blk|Ign)' /proc/self/status"))
        _, blocked, _, ignored = trial.training_log.read_text().split()
        assert int(blocked, 16) == 0
        assert int(ignored, 16) & 0x7FFFFFFF == 0, "32 and 33 belong to the C library"

    def test_the_supervisor_is_light(self):
        script = "import sys, shared.supervise; print(sorted({'pydantic', 'psutil', 'asyncio'} & set(sys.modules)))"
        out, _ = start(script).communicate()
        assert out == "[]\n"


class TestLock:
    def test_it_is_held_from_the_start_and_names_the_supervisor(self, trial):
        trainer = start_supervised(shell("sleep 60"), directory=trial.folder)
        assert trainer.is_alive
        assert trainer.exit_record() is None
        wait_until(lambda: FileLock.signed_pid(trial.trainer_lock) == trainer.supervisor.pid, "the signature")
        with pytest.raises(AlreadyRunningError, match=f"held by pid {trainer.supervisor.pid}"):
            start_supervised(["true"], directory=trial.folder)
        trainer.stop(term_timeout_s=PATIENCE_S, kill_timeout_s=PATIENCE_S)
        assert not trainer.is_alive

    def test_a_daemonised_grandchild_holds_it(self, trial):
        trainer = start_supervised(
            shell("setsid sh -c 'sleep 60 & echo $! > orphan' & wait"), directory=trial.folder, leftover_timeout_s=60
        )
        orphan = pid_in(trial.folder / "orphan")
        wait_until(lambda: len(lock_holders(trial.trainer_lock)) == 2, "the end of all but supervisor and orphan")
        assert lock_holders(trial.trainer_lock) == {trainer.supervisor.pid, orphan}
        assert not trainer.wait(0.3)
        os.kill(orphan, signal.SIGKILL)
        assert trainer.wait(PATIENCE_S)
        assert trainer.exit_record().exit_status == 0

    def test_a_child_that_closes_every_other_descriptor_still_holds_it(self, trial):
        script = """
            import subprocess, sys
            child = subprocess.Popen(["sleep", "60"], close_fds=True)
            with open("child", "w") as file:
                file.write(f"{child.pid}\\n")
        """
        trainer = start_supervised(python(script), directory=trial.folder, leftover_timeout_s=60)
        child = pid_in(trial.folder / "child")
        trainer_pid = trainer.supervisor.pid
        os.kill(trainer_pid, signal.SIGKILL)
        wait_until(lambda: lock_holders(trial.trainer_lock) == {child}, "the lock held by the child alone")
        assert trainer.is_alive
        os.kill(child, signal.SIGKILL)
        assert trainer.wait(PATIENCE_S)

    def test_what_outlives_the_command_is_ended(self, trial):
        script = "trap '' TERM; setsid sleep 60 & sleep 60 & exit 0"
        record = ended(trial, shell(script), leftover_timeout_s=0.2)
        assert record.exit_status == 0

    def test_other_descriptors_last_as_long_as_the_tree(self, trial, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        lease = GpuLease("GPU-1", "exclusive trainer", inheritable=True).acquire()
        trainer = start_supervised(shell("sleep 60"), directory=trial.folder, pass_fds=lease.filenos())
        lease.release()
        with pytest.raises(ResourceError, match="GPU-1 is in use"):
            GpuLease("GPU-1", "evaluator").acquire()
        trainer.stop(term_timeout_s=PATIENCE_S, kill_timeout_s=PATIENCE_S)
        GpuLease("GPU-1", "evaluator").acquire().release()


class TestStop:
    def test_every_process_of_the_tree_gets_one_sigterm(self, trial):
        script = """
            import os, signal, sys, time
            from pathlib import Path
            def note(number, frame):
                Path(f"{os.getpid()}.got").write_text("x" + (Path(f"{os.getpid()}.got").read_text()))
                time.sleep(0.3)
                os._exit(0)
            signal.signal(signal.SIGTERM, note)
            child = os.fork()
            Path(f"{os.getpid()}.got").touch()
            time.sleep(60)
        """
        trainer = start_supervised(python(script), directory=trial.folder)
        wait_until(lambda: len(list(trial.folder.glob("*.got"))) == 2, "start")
        report = trainer.stop(term_timeout_s=PATIENCE_S, kill_timeout_s=PATIENCE_S)
        assert (report.terminated, report.killed, report.survivors) == ((trainer.supervisor.pid,), (), ())
        assert [path.read_text() for path in trial.folder.glob("*.got")] == ["x", "x"]
        assert trainer.exit_record().exit_status == 0

    def test_one_that_ignores_sigterm_is_killed_and_recorded(self, trial):
        trainer = start_supervised(shell("trap '' TERM; touch up; sleep 60 & wait; wait"), directory=trial.folder)
        wait_until((trial.folder / "up").exists, "start")
        report = trainer.stop(term_timeout_s=0.3, kill_timeout_s=PATIENCE_S)
        assert trainer.supervisor.pid not in report.killed
        assert len(report.killed) >= 1
        assert report.survivors == ()
        assert trainer.exit_record().signal == signal.SIGKILL

    def test_the_supervisor_kills_by_itself_when_nobody_follows_up(self, trial):
        trainer = start_supervised(
            shell("trap '' TERM; touch up; sleep 60"), directory=trial.folder, stop_timeout_s=0.3
        )
        wait_until((trial.folder / "up").exists, "start")
        os.kill(trainer.supervisor.pid, signal.SIGTERM)
        assert trainer.wait(PATIENCE_S)
        assert trainer.exit_record().signal == signal.SIGKILL

    @pytest.mark.parametrize(
        ("sent", "received"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGHUP", "SIGTERM")], ids=str
    )
    def test_signals_to_the_supervisor_reach_the_command(self, trial, sent, received):
        script = shell("trap 'exit 7' INT; trap 'exit 8' TERM; touch up; while :; do sleep 0.05; done")
        trainer = start_supervised(script, directory=trial.folder)
        wait_until((trial.folder / "up").exists, "start")
        os.kill(trainer.supervisor.pid, signal.Signals[sent])
        assert trainer.wait(PATIENCE_S)
        assert trainer.exit_record().exit_status == {"SIGINT": 7, "SIGTERM": 8}[received]

    def test_a_command_that_signals_its_own_group_does_not_reach_the_supervisor(self, trial):
        assert ended(trial, shell("kill -KILL 0")).signal == signal.SIGKILL


class TestKilledSupervisor:
    def test_the_trainer_lives_on_and_is_adopted_and_stopped(self, trial):
        first = start_supervised(shell("sleep 60 & echo $! > child; wait"), directory=trial.folder)
        child = pid_in(trial.folder / "child")
        os.kill(first.supervisor.pid, signal.SIGKILL)
        wait_until(lambda: not first.supervisor.is_alive, "the supervisor's end")
        assert first.is_alive, "the trainer itself holds the lock"
        with pytest.raises(AlreadyRunningError):
            start_supervised(["true"], directory=trial.folder)
        adopted = adopt(trial.folder)
        assert adopted.supervisor is None
        report = adopted.stop(term_timeout_s=PATIENCE_S, kill_timeout_s=PATIENCE_S)
        assert child in report.terminated
        assert report.survivors == ()
        assert not is_running(child)
        assert adopted.exit_record() is None, "nobody was there to write it"

    def test_an_earlier_record_does_not_pass_for_the_killed_run(self, trial):
        assert ended(trial, shell("exit 0")).exit_status == 0
        trainer = start_supervised(shell("echo $$ > pid; sleep 60"), directory=trial.folder)
        command = pid_in(trial.folder / "pid")
        os.kill(trainer.supervisor.pid, signal.SIGKILL)
        os.kill(command, signal.SIGKILL)
        trainer.stop(term_timeout_s=PATIENCE_S, kill_timeout_s=PATIENCE_S)
        assert trainer.exit_record() is None


class TestDaemon:
    DAEMON = """
        import sys, time
        from pathlib import Path
        from shared.supervised import start_supervised
        command = ["sh", "-c", "echo $$ > pid; exec sleep 60"]
        start_supervised(command, directory=Path(sys.argv[1]), parent_bound={bound})
        time.sleep(60)
    """

    def test_the_trainer_survives_the_daemon_and_is_adopted(self, trial):
        daemon = start(self.DAEMON.format(bound=False), trial.folder)
        command = pid_in(trial.folder / "pid")
        daemon.kill()
        daemon.communicate()
        adopted = adopt(trial.folder)
        assert is_running(command)
        assert adopted.supervisor.is_alive
        os.kill(command, signal.SIGTERM)
        assert adopted.wait(PATIENCE_S)
        assert adopted.exit_record().signal == signal.SIGTERM
        assert adopt(trial.folder) is None

    def test_a_parent_bound_trainer_ends_with_its_daemon(self, trial):
        daemon = start(self.DAEMON.format(bound=True), trial.folder)
        command = pid_in(trial.folder / "pid")
        daemon.kill()
        daemon.communicate()
        wait_until(lambda: not is_running(command), "the trainer's end")
        wait_until(lambda: not FileLock.is_held(trial.trainer_lock), "the supervisor's end")
        assert read_model(trial.trainer_exit, TrainerExit).signal == signal.SIGTERM

    def test_nothing_to_adopt_where_nothing_ran(self, trial):
        assert adopt(trial.folder) is None

    def test_a_folder_that_cannot_be_written_is_told(self, trial):
        trial.training_log.mkdir()
        with pytest.raises(ResourceError, match=r"training\.log: the log cannot be opened"):
            start_supervised(["true"], directory=trial.folder)
        assert not FileLock.is_held(trial.trainer_lock)

    def test_a_record_that_cannot_be_removed_starts_nothing(self, trial):
        trial.trainer_exit.mkdir()
        with pytest.raises(DiskError, match=r"trainer_exit\.json"):
            start_supervised(["touch", "never"], directory=trial.folder)
        assert not FileLock.is_held(trial.trainer_lock)
        assert not (trial.folder / "never").exists()


class TestCommandLine:
    def test_relative_paths_start_from_the_folder_and_the_status_is_the_commands(self, trial):
        options = ["--lock", "my.lock", "--exit-file", "my.json", "--log", "my.log"]
        process = supervise(trial, *options, argv=shell("echo hi; exit 5"))
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 5
        assert {path.name for path in trial.folder.iterdir()} == {"my.lock", "my.json", "my.log"}
        assert json.loads((trial.folder / "my.json").read_text())["exit_status"] == 5

    def test_of_two_for_one_folder_the_second_refuses_and_spoils_nothing(self, trial):
        first = supervise(trial, argv=shell("touch up; while [ ! -e over ]; do sleep 0.05; done"))
        wait_until((trial.folder / "up").exists, "start")
        second = supervise(trial, argv=shell("touch never"))
        _, message = second.communicate(timeout=PATIENCE_S)
        assert second.returncode == 2
        assert f"held by pid {first.pid}" in message
        (trial.folder / "over").touch()
        first.communicate(timeout=PATIENCE_S)
        assert (first.returncode, (trial.folder / "never").exists()) == (0, False)

    def test_a_parent_that_is_already_gone_starts_nothing(self, trial):
        process = supervise(trial, "--die-with-parent", "1", argv=shell("touch never"))
        _, message = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 2
        assert message == "supervise: the parent ended before the command was started\n"
        assert not (trial.folder / "never").exists()

    def test_a_job_of_a_shell_is_refused_with_the_remedy(self, trial):
        command = [sys.executable, "-m", "shared.supervise", "--directory", str(trial.folder), "--", "touch", "never"]
        process = subprocess.run(command, cwd=ROOT, process_group=0, capture_output=True, text=True, check=False)
        assert process.returncode == 2
        assert "setsid --wait python -m shared.supervise" in process.stderr
        assert not (trial.folder / "never").exists()

    @pytest.mark.parametrize("words", [[], ["--"], ["sleep", "1"]], ids=["nothing", "nothing behind --", "no --"])
    def test_a_missing_command_is_bad_usage(self, trial, words):
        command = [sys.executable, "-m", "shared.supervise", "--directory", str(trial.folder), *words]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert process.returncode == 2
        assert process.stderr.startswith("usage: python -m shared.supervise")


def test_a_record_that_cannot_be_written_is_written_as_soon_as_it_can(trial):
    blocker = trial.trainer_exit
    trainer = start_supervised(shell("while [ ! -e go ]; do sleep 0.02; done"), directory=trial.folder)
    wait_until(lambda: FileLock.signed_pid(trial.trainer_lock) == trainer.supervisor.pid, "the signature")
    time.sleep(0.1)
    blocker.mkdir()  # the rename over a folder fails, as on a full disk the write before it
    (trial.folder / "go").touch()
    assert not trainer.wait(0.7)
    blocker.rmdir()
    assert trainer.wait(PATIENCE_S)
    assert trainer.exit_record().exit_status == 0


def test_the_identity_of_the_supervisor_is_kept(trial):
    trainer = start_supervised(shell("sleep 60"), directory=trial.folder)
    assert trainer.supervisor == ProcessIdentity.of(trainer.supervisor.pid)
    wait_until(lambda: (found := adopt(trial.folder)) and found.supervisor == trainer.supervisor, "adoption")
    trainer.stop(term_timeout_s=PATIENCE_S, kill_timeout_s=PATIENCE_S)

"""Who a process is, and how a whole tree of them is ended."""

import dataclasses
import os
import signal
import subprocess
import threading
import time

import pytest

from shared.errors import ResourceError
from shared.locks import FileLock
from shared.process import ProcessIdentity, lock_holders, members, send_signal, spawn, stop
from tests.shared.process_trees import is_running, no_process_left, pid_in, python, start, wait_until  # noqa: F401

# Ends by SIGTERM only after it has noted it down, once per signal.
NOTES_TERM = """
    import signal, sys, time
    from pathlib import Path
    def note(*_):
        with open(sys.argv[1], "a") as notes:
            notes.write("TERM\\n")
        time.sleep(0.2)
        sys.exit(0)
    signal.signal(signal.SIGTERM, note)
    Path(sys.argv[1]).touch()
    time.sleep(60)
"""
IGNORES_TERM = """
    import os, signal, sys, time
    from pathlib import Path
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(sys.argv[1]).write_text(f"{os.getpid()}\\n")
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "note"


def stopped(leader, **options):
    return stop(leader, **({"term_timeout_s": 10, "kill_timeout_s": 10} | options))


class TestIdentity:
    def test_it_lives_and_ends_with_the_process(self):
        child = spawn(["sleep", "60"])
        identity = ProcessIdentity.of(child.pid)
        assert identity.is_alive
        assert identity.exists
        child.kill()
        wait_until(lambda: not identity.is_alive, "the end of the process")
        assert identity.exists, "a zombie keeps its pid"
        child.wait()
        assert not identity.exists
        assert ProcessIdentity.of(child.pid) is None

    @pytest.mark.parametrize("mark", [{"start_ticks": 1}, {"boot_id": "another boot"}], ids=repr)
    def test_the_same_pid_is_not_the_same_process(self, mark):
        assert ProcessIdentity.current().is_alive
        assert not dataclasses.replace(ProcessIdentity.current(), **mark).is_alive

    def test_any_name_of_a_command_can_be_read(self, path):
        path.symlink_to("/bin/sleep")
        odd = path.rename(path.with_name("a) S 1 (b\n"))
        child = spawn([str(odd), "60"])
        assert ProcessIdentity.of(child.pid).start_ticks >= ProcessIdentity.current().start_ticks
        child.kill()
        child.wait()


class TestSpawn:
    def test_the_child_leads_its_own_session(self):
        child = spawn(["sleep", "60"])
        assert os.getsid(child.pid) == child.pid
        child.kill()
        child.wait()

    def test_a_missing_command_is_told(self):
        with pytest.raises(ResourceError, match=r"'no-such-command' cannot be started .*install it or correct"):
            spawn(["no-such-command"])

    def test_another_thread_may_not_spawn(self):
        caught = []

        def try_it():
            with pytest.raises(RuntimeError, match="from the main thread") as error:
                spawn(["true"])
            caught.append(error)

        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
        assert caught

    def test_what_addresses_this_service_alone_is_not_passed_on(self, monkeypatch):
        monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
        monkeypatch.setenv("WATCHDOG_USEC", "1000")
        child = spawn(["env"], stdout=subprocess.PIPE)
        variables, _ = child.communicate()
        assert b"TEST_MARK" in variables
        assert b"NOTIFY_SOCKET" not in variables
        assert b"WATCHDOG_USEC" not in variables


class TestStop:
    def test_a_process_that_ends_by_itself_is_not_killed(self, path):
        child = spawn(python(NOTES_TERM, path))
        wait_until(path.exists, "start")
        report = stopped(ProcessIdentity.of(child.pid))
        assert (report.terminated, report.killed, report.survivors) == ((child.pid,), (), ())
        assert path.read_text() == "TERM\n", "one signal, not more"
        assert child.wait() == 0

    def test_one_that_ignores_it_is_killed_when_the_time_is_up(self, path):
        child = spawn(python(IGNORES_TERM, path))
        wait_until(path.exists, "start")
        report = stopped(ProcessIdentity.of(child.pid), term_timeout_s=0.3)
        assert (report.killed, report.survivors) == ((child.pid,), ())
        assert report.duration_s >= 0.3
        assert child.wait() == -signal.SIGKILL

    def test_grandchildren_in_other_groups_and_sessions_end_too(self, tmp_path):
        names = ["same_group", "own_group", "own_session"]
        script = """
            import os, subprocess, sys, time
            for name, option in [("same_group", {}), ("own_group", {"process_group": 0}),
                                 ("own_session", {"start_new_session": True})]:
                child = subprocess.Popen(["sleep", "60"], **option)
                with open(f"{sys.argv[1]}/{name}", "w") as file:
                    file.write(f"{child.pid}\\n")
            time.sleep(60)
        """
        child = spawn(python(script, tmp_path))
        pids = [pid_in(tmp_path / name) for name in names]
        report = stopped(ProcessIdentity.of(child.pid))
        assert sorted(report.terminated) == sorted([child.pid, *pids])
        assert not any(is_running(pid) for pid in pids)
        child.wait()

    def test_members_of_the_session_are_found_after_their_leader_died(self, path):
        child = spawn(["sh", "-c", f"sleep 60 & echo $! > {path}; kill -9 $$"])
        orphan = pid_in(path)
        leader = ProcessIdentity.of(child.pid)
        wait_until(lambda: not leader.is_alive, "the leader's end")
        assert stopped(leader).terminated == (orphan,)
        child.wait()

    def test_a_daemonised_grandchild_is_found_by_its_lock(self, path, tmp_path):
        lock = FileLock(tmp_path / "lock", inheritable=True).acquire()
        # Double fork: neither parent nor session leads to it.
        script = f"setsid sh -c 'sleep 60 & echo $! > {path}'"
        spawn(["sh", "-c", script], pass_fds=[lock.fileno()]).wait()
        lock.release()
        orphan = pid_in(path)
        assert lock_holders(lock.path) == {orphan}
        report = stopped(None, lock=lock.path)
        assert (report.terminated, report.survivors) == ((orphan,), ())
        assert not FileLock.is_held(lock.path)

    def test_a_stranger_with_the_same_pid_is_left_alone(self):
        stranger = spawn(["sleep", "60"])
        identity = ProcessIdentity.of(stranger.pid)
        recycled = dataclasses.replace(identity, start_ticks=identity.start_ticks - 1)
        report = stopped(recycled)
        assert (report.terminated, report.killed) == ((), ())
        assert send_signal([recycled], signal.SIGKILL) == []
        assert is_running(stranger.pid)
        stranger.kill()
        stranger.wait()

    def test_a_forwarding_leader_that_dies_without_forwarding_is_made_up_for(self, path):
        child = spawn(["sh", "-c", f"sleep 60 & echo $! > {path}; exec sleep 60"])
        orphan = pid_in(path)
        report = stopped(ProcessIdentity.of(child.pid), leader_forwards=True)
        assert (report.terminated, report.killed) == ((child.pid, orphan), ())
        child.wait()

    def test_a_forwarding_leader_that_hangs_is_killed_last(self, path):
        child = spawn(python(IGNORES_TERM, path))
        wait_until(path.exists, "start")
        options = {"leader_forwards": True, "term_timeout_s": 0.1, "kill_timeout_s": 0.5}
        report = stopped(ProcessIdentity.of(child.pid), **options)
        assert (report.killed, report.survivors) == ((child.pid,), ())
        child.wait()

    def test_of_a_process_long_gone_nothing_is_stopped(self):
        child = spawn(["true"])
        leader = ProcessIdentity.of(child.pid)
        child.wait()
        assert stopped(leader).terminated == ()

    def test_a_process_that_keeps_forking_does_not_outrun_it(self, path):
        script = """
            import os, signal, sys, time
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            output = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            end = time.monotonic() + 60
            while time.monotonic() < end:
                os.write(output, b".")
                if os.fork():
                    os._exit(0)
        """
        child = spawn(python(script, path))
        wait_until(path.exists, "start")
        report = stopped(ProcessIdentity.of(child.pid), term_timeout_s=0.1, kill_timeout_s=40)  # on a busy machine
        assert report.survivors == ()
        beats = path.stat().st_size
        time.sleep(0.5)
        assert path.stat().st_size == beats
        child.wait()

    def test_our_own_children_are_safe_while_we_hold_the_lock_ourselves(self, tmp_path):
        other = spawn(["sleep", "60"])
        with FileLock(tmp_path / "lock") as lock:
            assert lock_holders(lock.path) == {os.getpid()}
            assert members(None, lock=lock.path) == []
        other.kill()
        other.wait()

    def test_a_process_that_only_probes_the_lock_is_no_holder(self, tmp_path):
        lock = FileLock(tmp_path / "lock").acquire()
        with lock.path.open() as file:
            onlooker = subprocess.Popen(["sleep", "60"], stdin=file)
        assert lock_holders(lock.path) == {os.getpid()}
        onlooker.kill()
        onlooker.wait()
        lock.release()


class TestDieWithParent:
    CHILD = """
        import os, sys, time
        from pathlib import Path
        from shared.process import die_with_parent
        living = die_with_parent(int(sys.argv[2]))
        Path(sys.argv[1]).write_text(f"{os.getpid() if living else 0}\\n")
        time.sleep(60 if living else 0)
    """
    PARENT = """
        import os, subprocess, sys, time
        subprocess.Popen([*sys.argv[1:], str(os.getpid())])
        time.sleep(60)
    """

    def test_the_child_gets_sigterm_when_its_parent_is_killed(self, path):
        parent = start(self.PARENT, *python(self.CHILD, path))
        child = pid_in(path)
        assert is_running(child)
        parent.kill()
        parent.communicate()
        wait_until(lambda: not is_running(child), "the child's end")

    def test_a_parent_that_was_already_gone_is_noticed(self, path):
        no_longer_alive = spawn(["true"])
        no_longer_alive.wait()
        child = start(self.CHILD, path, no_longer_alive.pid)
        assert pid_in(path) == 0
        child.communicate()

"""One owner per lock file, as long as it lives and no longer."""

import fcntl
import os
import signal
import subprocess
import threading
import time

import pytest

from shared.errors import AlreadyRunningError, ResourceError
from shared.locks import FileLock
from tests.shared.process_trees import (
    PATIENCE_S,
    ROOT,
    no_process_left,  # noqa: F401  autouse
    python,
    start,
    strace_works,
    wait_until,
)

HOLD = """
    import sys, time
    from pathlib import Path
    from shared.locks import FileLock
    FileLock(Path(sys.argv[1])).acquire()
    print("held", flush=True)
    time.sleep(60)
"""
# Every line of stdin is one race: all racers have the next lock file's name at the same moment.
RACE = """
    import sys
    from pathlib import Path
    from shared.locks import FileLock
    print("ready", flush=True)
    for name in sys.stdin:
        lock = FileLock(Path(name.strip()))
        print("won" if lock.try_acquire() else "lost", flush=True)
        sys.stdin.readline()
        lock.release()
        print("released", flush=True)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "optimizer.lock"


@pytest.fixture
def holder(path):
    process = start(HOLD, path)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_lives_and_dies_with_its_process(path, holder):
    assert FileLock.is_held(path)
    assert not FileLock(path).try_acquire()
    holder.kill()
    holder.wait()
    assert not FileLock.is_held(path)
    assert path.exists(), "a lock file is never removed"
    with FileLock(path) as lock:
        assert lock.held


def test_the_refusal_names_the_holder_and_the_remedy(path, holder):
    with pytest.raises(AlreadyRunningError) as caught:
        FileLock(path).acquire()
    host = os.uname().nodename
    assert f"{path} is held by pid {holder.pid} on {host} since 20" in str(caught.value)
    assert "stop it first" in str(caught.value)
    assert FileLock.signed_pid(path) == holder.pid


def test_a_stopped_holder_is_still_the_holder(path, holder):
    holder.send_signal(signal.SIGSTOP)
    assert FileLock.is_held(path)
    assert not FileLock(path).try_acquire()


@pytest.mark.parametrize("text", ["", "\n", "what?", "1 2 3 4", "\xff"], ids=repr)
def test_text_that_tells_no_holder_harms_nothing(path, text):
    path.write_text(text, encoding="latin-1")
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(AlreadyRunningError, match="held by an unknown process"):
        FileLock(path).acquire()
    os.close(fd)
    FileLock(path).acquire().release()


def test_a_missing_file_is_not_held_and_probing_does_not_make_it(path):
    assert not FileLock.is_held(path)
    assert not path.exists()


def test_of_two_daemons_exactly_one_wins_each_of_ten_races(tmp_path):
    racers = [start(RACE, stdin=subprocess.PIPE) for _ in range(2)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2

    def tell(line: str) -> list[str]:
        for racer in racers:
            racer.stdin.write(line)
            racer.stdin.flush()
        return sorted(racer.stdout.readline().strip() for racer in racers)

    for number in range(10):
        assert tell(f"{tmp_path / str(number % 5)}\n") == ["lost", "won"], f"race {number}"
        assert tell("end\n") == ["released", "released"]
    for racer in racers:
        racer.communicate(timeout=PATIENCE_S)
        assert racer.returncode == 0


def test_probes_neither_keep_an_owner_out_nor_take_each_other_for_one(path):
    path.touch()
    taken_for_owner: list[bool] = []
    over = threading.Event()

    def probe() -> None:
        while not over.is_set():
            taken_for_owner.append(FileLock.is_held(path))

    threads = [threading.Thread(target=probe) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(taken_for_owner) > 300, "300 probes")
        assert not any(taken_for_owner)
        for _ in range(30):
            lock = FileLock(path)
            assert lock.try_acquire()
            lock.release()
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_waiting_ends_when_the_holder_ends(path, holder):
    threading.Timer(0.3, holder.kill).start()
    assert FileLock(path).try_acquire(timeout_s=10)


def test_waiting_ends_when_the_time_is_up(path, holder):
    begin = time.monotonic()
    assert not FileLock(path).try_acquire(timeout_s=0.3)
    assert time.monotonic() - begin >= 0.3


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        pytest.param(True, True, True, id="shared holders stand together"),
        pytest.param(True, False, False, id="an exclusive one waits for a shared one"),
        pytest.param(False, True, False, id="a shared one waits for an exclusive one"),
        pytest.param(False, False, False, id="exclusive ones stand alone"),
    ],
)
def test_modes(path, first, second, together):
    with FileLock(path, shared=first):
        lock = FileLock(path, shared=second)
        assert lock.try_acquire() is together
        lock.release()


def test_a_command_we_start_does_not_inherit_an_ordinary_lock(path):
    lock = FileLock(path).acquire()
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    lock.release()
    assert not FileLock.is_held(path)
    child.kill()
    child.wait()


def test_an_inheritable_lock_lasts_until_the_last_of_the_tree_ends(path):
    lock = FileLock(path, inheritable=True).acquire()
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    lock.release()
    assert FileLock.is_held(path)
    child.kill()
    child.wait()
    assert not FileLock.is_held(path)


def test_releasing_frees_the_lock_in_spite_of_a_forked_copy(path):
    lock = FileLock(path).acquire()
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    lock.release()
    assert not FileLock.is_held(path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_an_inherited_lock_is_taken_over_from_its_descriptor(path):
    script = """
        import sys
        from pathlib import Path
        from shared.locks import FileLock
        lock = FileLock.from_fd(Path(sys.argv[1]), int(sys.argv[2]))
        print(lock.held, flush=True)
        sys.stdin.read()
    """
    lock = FileLock(path, inheritable=True).acquire()
    child = start(script, path, lock.fileno(), pass_fds=[lock.fileno()], stdin=subprocess.PIPE)
    assert child.stdout.readline() == "True\n"
    lock.release()
    assert FileLock.is_held(path)
    assert FileLock.signed_pid(path) == child.pid
    child.communicate()
    assert not FileLock.is_held(path)


def test_a_descriptor_of_another_file_is_no_lock(path, tmp_path):
    path.touch()
    with (tmp_path / "other").open("w") as other, pytest.raises(AlreadyRunningError):
        FileLock.from_fd(path, other.fileno())


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ResourceError, match=r"typo/optimizer.lock: .*No such file.*make its folder exist"):
        FileLock(tmp_path / "typo" / "optimizer.lock").acquire()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_disk_does_not_keep_an_owner_out(path):
    path.symlink_to("/dev/full")
    with FileLock(path) as lock:
        assert lock.held


@pytest.mark.skipif(not strace_works(), reason="strace is missing or may not trace")
@pytest.mark.parametrize("call", ["FileLock.is_held(path)", "FileLock(path).acquire()"])
def test_a_file_system_without_flock_is_told_clearly(path, call):
    path.touch()
    script = (
        f"import sys; from pathlib import Path; from shared.locks import FileLock; path = Path(sys.argv[1]); {call}"
    )
    without_flock = ["strace", "-f", "--seccomp-bpf", "-o", "/dev/null", "-e", "inject=flock:error=ENOLCK"]
    traced = subprocess.run(
        [*without_flock, *python(script, path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "has no flock (No locks available); put the folder on a local disk" in traced.stderr.splitlines()[-1]

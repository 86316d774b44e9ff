"""Durable writing: old content or new, never a part, whatever fails."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shared import files
from shared.errors import DiskError
from shared.files import sweep_temp_files, write_bytes, write_text
from shared.process import ProcessIdentity
from tests.shared.process_trees import strace_works

ROOT = Path(__file__).parent.parent.parent
OLD, NEW = b"old content\n", b"new content\n" * 2000


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "state.json"
    path.write_bytes(OLD)
    return path


def start(script: str, *arguments: object, before: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start Python on `script` with the project importable."""
    command = [*before, sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}  # no writes but ours
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def fail_once(monkeypatch, name: str, code: int, *, at_call: int = 1) -> None:
    """Make os.<name> raise at its `at_call`-th call and work otherwise."""
    real, calls = getattr(os, name), iter(range(1, 1_000_000))

    def call(*arguments, **options):
        if next(calls) == at_call:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(files.os, name, call)


def test_content_is_replaced_and_nothing_else_is_left(path):
    write_bytes(path, NEW)
    assert path.read_bytes() == NEW
    assert list(path.parent.iterdir()) == [path]


def test_text_is_written_as_utf_8(path):
    write_text(path, "明るさ\n")
    assert path.read_bytes() == "明るさ\n".encode()


def test_the_order_is_write_sync_rename_sync(path, monkeypatch):
    calls = []

    def record(name):
        real = getattr(os, name)

        def call(*arguments, **options):
            target = Path(f"/proc/self/fd/{arguments[0]}").resolve().name if name == "fsync" else ""
            calls.append(f"{name} {'folder' if target == path.parent.name else 'file'}" if target else name)
            return real(*arguments, **options)

        monkeypatch.setattr(files.os, name, call)

    for name in ("write", "fsync", "replace"):
        record(name)
    write_bytes(path, NEW)
    assert calls == ["write", "fsync file", "replace", "fsync folder"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_the_mode_follows_the_umask(path, umask, mode):
    previous = os.umask(umask)
    try:
        write_bytes(path, NEW)
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == mode


def test_short_writes_are_continued(path, monkeypatch):
    real = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, content: real(descriptor, content[:1000]))
    write_bytes(path, NEW)
    assert path.read_bytes() == NEW


@pytest.mark.parametrize(
    ("name", "code"),
    [
        pytest.param("open", errno.EMFILE, id="no file can be opened"),
        pytest.param("write", errno.ENOSPC, id="the disk is full"),
        pytest.param("fsync", errno.EIO, id="the disk fails when synced"),
        pytest.param("close", errno.EDQUOT, id="the quota shows at close"),
        pytest.param("replace", errno.EROFS, id="the file system turned read-only"),
    ],
)
def test_a_failure_keeps_the_old_content_and_the_next_call_writes_everything(path, monkeypatch, name, code):
    fail_once(monkeypatch, name, code)
    with pytest.raises(DiskError) as caught:
        write_bytes(path, NEW)
    assert caught.value.errno == code
    assert str(path) in str(caught.value)
    assert path.read_bytes() == OLD
    assert list(path.parent.iterdir()) == [path]
    write_bytes(path, NEW)
    assert path.read_bytes() == NEW
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_sync_of_the_folder_is_told_and_the_file_is_whole(path, monkeypatch):
    fail_once(monkeypatch, "fsync", errno.EIO, at_call=2)
    with pytest.raises(DiskError):
        write_bytes(path, NEW)
    assert path.read_bytes() == NEW
    assert list(path.parent.iterdir()) == [path]


def test_a_mount_that_cannot_sync_folders_is_no_failure(path, monkeypatch):
    fail_once(monkeypatch, "fsync", errno.EINVAL, at_call=2)
    write_bytes(path, NEW)
    assert path.read_bytes() == NEW


def test_a_missing_folder_is_a_disk_error(tmp_path):
    with pytest.raises(DiskError, match="No such file or directory"):
        write_bytes(tmp_path / "gone" / "state.json", NEW)


@pytest.fixture
def full_disk(tmp_path):
    """A real file system of 64 KiB; returns a state file on it once nothing more fits."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    if mounted:
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
        mounted = mount.returncode == 0
    if not mounted:
        pytest.skip("a tiny tmpfs needs root and mount")
    try:
        path = folder / "state.json"
        path.write_bytes(OLD)
        with pytest.raises(OSError, match="No space left"), (folder / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        yield path
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_real_full_disk_keeps_the_old_content(full_disk):
    with pytest.raises(DiskError, match="No space left on device"):
        write_bytes(full_disk, NEW)
    assert full_disk.read_bytes() == OLD
    assert sorted(entry.name for entry in full_disk.parent.iterdir()) == ["filler", "state.json"]
    (full_disk.parent / "filler").unlink()
    write_bytes(full_disk, NEW)
    assert full_disk.read_bytes() == NEW


def test_a_real_full_disk_cuts_no_line_in_half(full_disk):
    lines = full_disk.with_name("events.jsonl")
    (full_disk.parent / "filler").unlink()
    files.append_line(lines, {"n": 1})
    before = lines.read_bytes()
    with pytest.raises(OSError, match="No space left"), (full_disk.parent / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    with pytest.raises(DiskError, match="No space left on device"):
        files.append_line(lines, {"n": 2, "text": "x" * 8192})
    assert lines.read_bytes() == before


def test_a_real_file_size_limit_keeps_the_old_content(path):
    limited = """
        import resource, sys
        from pathlib import Path
        from shared.errors import DiskError
        from shared.files import write_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_bytes(Path(sys.argv[1]), bytes(5000))
        except DiskError as error:
            print(error)
    """
    assert "File too large" in output(start(limited, path))
    assert path.read_bytes() == OLD
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(not strace_works(), reason="strace is missing or may not trace")
@pytest.mark.parametrize(
    ("calls", "error"), [("fsync", "EIO"), ("write", "ENOSPC"), ("?rename,renameat,renameat2", "EIO")]
)
def test_an_error_from_the_kernel_keeps_the_old_content_and_the_retry_writes_everything(path, calls, error):
    retried = """
        import sys
        from pathlib import Path
        from shared.errors import DiskError
        from shared.files import write_bytes
        path, content = Path(sys.argv[1]), b"new content\\n" * 2000
        try:
            write_bytes(path, content)
        except DiskError as error:
            print(error.errno, path.read_bytes(), [entry.name for entry in path.parent.iterdir()])
        write_bytes(path, content)
    """
    inject = ("strace", "-qq", "-o", "/dev/null", "-e", f"inject={calls}:error={error}:when=1")
    told = output(start(retried, path, before=inject))
    assert told.strip() == f"{getattr(errno, error)} {OLD!r} ['state.json']"
    assert path.read_bytes() == NEW
    assert list(path.parent.iterdir()) == [path]


HANGING_WRITER = """
    import os, sys, time
    from pathlib import Path
    from shared import files
    files.os.fsync = lambda descriptor: (print("writing", flush=True), time.sleep(600))
    files.write_bytes(Path(sys.argv[1]), b"never finished")
"""


def test_the_sweep_takes_what_a_killed_writer_left_and_nothing_of_a_living_one(path):
    writer = start(HANGING_WRITER, path)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    (temporary,) = path.parent.glob(".state.json.tmp-*")
    try:
        assert sweep_temp_files(path.parent) == []
    finally:
        writer.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)  # dead, but still a zombie
    assert sweep_temp_files(path.parent) == [temporary]
    writer.communicate()
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == OLD


def test_a_recycled_process_id_protects_nothing(tmp_path):
    me = ProcessIdentity.current()
    mine = tmp_path / f".state.json.tmp-{me.pid}-{me.start_ticks}-0123abcd"
    other = tmp_path / f".state.json.tmp-{me.pid}-{me.start_ticks + 1}-0123abcd"
    mine.touch()
    other.touch()
    assert sweep_temp_files(tmp_path) == [other]
    assert mine.exists()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("state.json", id="a state file"),
        pytest.param(".tmp1a2b3c", id="a temporary file of the safetensors library"),
        pytest.param(".state.json.tmp-12", id="somebody else's temporary file"),
        pytest.param("state.json.tmp-1-1-0123abcd", id="no hidden file"),
        pytest.param(".state.json.tmp-1-1-0123abcd.bak", id="a copy of one of ours"),
    ],
)
def test_the_sweep_leaves_other_files_alone(tmp_path, name):
    (tmp_path / name).touch()
    assert sweep_temp_files(tmp_path) == []
    assert (tmp_path / name).exists()


def test_the_sweep_of_a_missing_folder_finds_nothing(tmp_path):
    assert sweep_temp_files(tmp_path / "gone") == []


def test_kill_9_at_random_moments_never_leaves_an_unreadable_file():
    command = [sys.executable, "-m", "benchmarks.reliability.kill9_state_file", "--kills", "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("kills=60 unreadable=0 lost=0 temporary_files=")
    assert " after_sweep=0 " in done.stdout

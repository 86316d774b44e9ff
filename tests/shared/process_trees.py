"""Real process trees for tests, and the proof that none of them is left."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0  # a busy machine may take long, a working one never does


def python(script: str, *arguments: object) -> list[str]:
    """Return the command that runs `script`."""
    return [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]


def start(script: str, *arguments: object, **options) -> subprocess.Popen:
    """Start Python on `script` with the project importable and its output in pipes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(python(script, *arguments), env=environment, **pipes)


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until `condition` holds, or fail saying that `what` did not happen."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {PATIENCE_S} s: {what}"
        time.sleep(0.01)


def strace_works() -> bool:
    """Whether strace is there and may trace."""
    return bool(shutil.which("strace")) and subprocess.run(["strace", "true"], capture_output=True).returncode == 0


def is_running(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pid_in(path: Path) -> int:
    """Wait for a process to write its pid, and a line feed, to `path`."""
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"), f"a pid in {path.name}")
    return int(path.read_text())


@pytest.fixture(autouse=True)
def no_process_left(monkeypatch):
    """Mark whatever the test starts, and fail, after ending it, when something outlives the test."""
    mark = f"TEST_MARK={secrets.token_hex(8)}"
    monkeypatch.setenv(*mark.split("="))
    yield
    deadline = time.monotonic() + 10
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"left running: {left}"


def _marked(mark: str) -> dict[int, str]:
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found

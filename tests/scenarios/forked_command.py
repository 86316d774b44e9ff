"""Runs `python -m MODULE ...` as a fork of a process that has imported what it needs: the command itself, but sooner.

python -m tests.scenarios.forked_command        serves requests on stdin, one JSON object a line
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.scenarios.bad_input import ROOT

IMPORTS = (
    "optimizer_daemon.daemon",
    "optimizer_daemon.check",
    "optimizer_daemon.status",
    "optimizer_daemon.trainers.command",
    "optimizer_daemon.trainers.native",
    "evaluator_daemon.manager",
    "evaluator_daemon.settings",
    "evaluator_daemon.verbs.evaluate",
    "evaluator_daemon.verbs.compare",
)


class ForkedCommands:
    """A server, which runs one command at a time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.scenarios.forked_command"],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run `python -m MODULE ...` to its end."""
        assert list(command[:2]) == [sys.executable, "-m"], command
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            asked = {"command": list(command[2:]), "environment": dict(environment), "out": str(out), "err": str(err)}
            self._server.stdin.write(json.dumps(asked) + "\n")
            self._server.stdin.flush()
            code = json.loads(self._server.stdout.readline())
            return subprocess.CompletedProcess(list(command), code, out.read_text(), err.read_text())

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()


def serve() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            become(json.loads(line))
            return
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(asked: dict) -> None:
    for descriptor, file, flags in ((0, os.devnull, os.O_RDONLY), (1, asked["out"], os.O_WRONLY | os.O_CREAT),
                                    (2, asked["err"], os.O_WRONLY | os.O_CREAT)):  # fmt: skip
        opened = os.open(file, flags, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(asked["environment"])
    module, *arguments = asked["command"]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve()

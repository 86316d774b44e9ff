"""A process that has imported what a trainer needs, and starts trainers as copies of itself.

    python -m shared.preload --socket-fd 5 --parent 1234 --import optimizer_daemon.lora_training.train

Each request forks a supervisor that is all that `python -m shared.supervise` is, and whose command, `python -m MODULE
...`, runs in a fork of its own: neither loads anything again, and all share the memory of what is loaded. Nothing here
may keep a thread or touch a GPU, for neither survives a fork.

This process keeps no state. It ends with the daemon that started it; what it has forked leads its own session and lives
on. shared.preloaded is the daemon's side.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from shared import supervise
from shared.process import die_with_parent

READY = b"ready"
MOST_BYTES = 1 << 16  # of a message
MOST_DESCRIPTORS = 64


def main(arguments: Sequence[str]) -> int:
    """Serve until the daemon closes its end."""
    parser = argparse.ArgumentParser(prog="python -m shared.preload", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--socket-fd", type=int, required=True, help="one end of the daemon's socket pair")
    parser.add_argument("--parent", type=int, required=True, help="the daemon's pid")
    parser.add_argument("--import", dest="modules", nargs="+", required=True, help="modules")
    parser.add_argument("--call", nargs=2, metavar=("MODULE:NAME", "ARGUMENT"), help="a function to call after that")
    options = parser.parse_args(arguments)
    requests = socket.socket(fileno=options.socket_fd)
    if not die_with_parent(options.parent):
        return 0
    try:
        _prepare(options.modules, options.call)
    except Exception as error:  # noqa: BLE001  any library may fail in any way; a training shows it in full
        requests.send(f"{type(error).__name__}: {error}".encode()[:MOST_BYTES])
        return 1
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a supervisor; its exit file says all
    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, all that is shared
    requests.send(READY)
    words = _serve(requests)
    if words is None:
        return 0
    requests.close()
    status = supervise.main(words, _fork)
    sys.stderr.flush()
    os._exit(status)  # to take apart all that was imported would keep the lock for half a second more


def _prepare(modules: Sequence[str], call: Sequence[str] | None) -> None:
    for module in modules:
        importlib.import_module(module)
    if call:
        target, argument = call
        module, _, name = target.partition(":")
        getattr(importlib.import_module(module), name)(argument)
    if (threads := len(list(Path("/proc/self/task").iterdir()))) > 1:
        raise RuntimeError(f"{threads} threads live, of which a fork would have one")


def _serve(requests: socket.socket) -> list[str] | None:
    """Fork once for each request; return None here at the end, and the supervisor's words in each fork."""
    while True:
        content, descriptors, _, _ = socket.recv_fds(requests, MOST_BYTES, MOST_DESCRIPTORS)
        if not content:
            return None
        pid = os.fork()
        if pid == 0:
            log, lock, environment, *_ = descriptors
            for descriptor in descriptors[1:]:
                os.set_inheritable(descriptor, True)  # as Popen's pass_fds: what the training starts keeps them, too
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            words: list[str] = json.loads(content)
            return ["--lock-fd", str(lock), "--env-fd", str(environment), *words]
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(str(pid).encode())


def _fork(argv: Sequence[str], env: Mapping[str, str], lock_fd: int, log_fd: int) -> int:
    """Start `python -m MODULE ...` as `supervise.spawn_program` does, in a copy of this process."""
    process = multiprocessing.get_context("fork").Process(target=_be_command, args=(argv, env, lock_fd, log_fd))
    process.start()
    assert process.pid is not None
    return process.pid


def _be_command(argv: Sequence[str], env: Mapping[str, str], lock_fd: int, log_fd: int) -> None:
    os.setpgid(0, 0)
    for source, target in ((lock_fd, 0), (log_fd, 1), (log_fd, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(env)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _, _, module, *arguments = argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

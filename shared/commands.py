"""The outermost layer of every command: errors become one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TextIO

from shared.errors import LabError, Stopped, exit_code


def run_command(main: Callable[[], int | None]) -> int:
    """Run `main` and return the process's exit code; wrap it as `sys.exit(run_command(main))`.

    A LabError is one line "error: ..." on stderr; anything else that escapes is a bug and shows its traceback. A reader
    that closed our stdout, such as `head`, ends us silently with 141, as SIGPIPE ends other tools. A terminal that was
    closed changes no exit code.
    """
    try:
        return _run(main)
    finally:
        for stream in (sys.stdout, sys.stderr):
            _flush_or_silence(stream)  # else the interpreter's own flush would make it exit status 120


def _run(main: Callable[[], int | None]) -> int:
    try:
        code = main() or 0
        sys.stdout.flush()  # while a closed pipe can still be handled
    except Stopped as stop:
        _complain(str(stop))
        return exit_code(stop)
    except LabError as error:
        _complain(f"error: {' '.join(str(error).split())}")
        return exit_code(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        if not _stdout_is_closed():
            traceback.print_exc()
            return 1
        return 128 + signal.SIGPIPE
    except Exception as error:  # noqa: BLE001  the outermost layer: it is shown in full and fails the command
        traceback.print_exception(error)
        return exit_code(error)
    return code


def _complain(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any longer
        print(line, file=sys.stderr)


def _flush_or_silence(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _stdout_is_closed() -> bool:
    """Whether nobody reads our stdout; if so it is pointed at nothing, for the interpreter flushes it once more."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    closed = bool(poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed

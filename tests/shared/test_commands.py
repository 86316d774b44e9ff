"""How commands end: one line and an exit code, in a process of their own."""

import os
import signal
import subprocess

import pytest

from tests.shared.process_trees import PATIENCE_S, no_process_left, start  # noqa: F401  autouse

COMMAND = """
    import sys, time
    from pathlib import Path
    from shared.commands import run_command
    from shared.errors import *
    def main():
        BODY
    sys.exit(run_command(main))
"""


def outcome(body: str, **options) -> tuple[int, str, str]:
    process = start(COMMAND.replace("BODY", body), **options)
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        pytest.param("return None", 0, "", id="nothing to say"),
        pytest.param("return 3", 3, "", id="its own status"),
        pytest.param(
            "raise SettingsError('--n-trials', -1, 'give 1 or more')",
            2,
            "error: --n-trials: -1 will not do; give 1 or more\n",
            id="bad input",
        ),
        pytest.param(
            "raise UnreadableFileError(Path('run.json'), 'not JSON')", 3, "error: run.json: not JSON\n", id="contract"
        ),
        pytest.param("raise ResourceError('no GPU')", 4, "error: no GPU\n", id="resource"),
        pytest.param("raise UserError('two\\n  lines')", 2, "error: two lines\n", id="always one line"),
        pytest.param("raise Stopped(15)", 143, "stopped by signal 15\n", id="an orderly stop is no error"),
        pytest.param("sys.exit(5)", 5, "", id="an exit of its own"),
    ],
)
def test_how_a_command_ends(body, status, told):
    assert outcome(body) == (status, "", told)


def test_a_bug_shows_its_traceback():
    status, _, told = outcome("{}['missing']")
    assert status == 1
    assert told.startswith("Traceback (most recent call last):")
    assert told.endswith("KeyError: 'missing'\n")


def test_a_keyboard_interrupt_is_silent():
    process = start(COMMAND.replace("BODY", "print('up', flush=True); time.sleep(60)"))
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=PATIENCE_S) == ("", "")
    assert process.returncode == 130


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("print('x')", id="little output, flushed at the end"),
        pytest.param("for _ in range(100_000): print('x' * 100)", id="much output"),
        pytest.param("print('x' * 10_000_000)", id="one large write"),
    ],
)
def test_a_reader_that_went_away_is_no_error(body):
    reader, writer = os.pipe()
    os.close(reader)
    assert outcome(body, stdout=writer)[::2] == (141, "")
    os.close(writer)


def test_a_broken_pipe_elsewhere_is_a_bug():
    status, _, told = outcome("raise BrokenPipeError('a socket')")
    assert status == 1
    assert told.endswith("BrokenPipeError: a socket\n")


def test_the_pipe_of_a_living_reader_gets_everything():
    assert outcome("print('x' * 200_000)", stdout=subprocess.PIPE)[:2] == (0, "x" * 200_000 + "\n")

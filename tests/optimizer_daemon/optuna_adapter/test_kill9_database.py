"""kill -9 at random moments of ask, report and tell: the SQLite study opens every time, sound and complete."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_the_study_opens_after_every_kill_and_holds_what_was_acknowledged(kills):
    command = [sys.executable, "-m", "benchmarks.reliability.kill9_database", "--kills", str(kills)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr
    said = dict(word.split("=") for word in result.stdout.split())
    assert (said["kills"], said["complaints"]) == (str(kills), "0")
    assert int(said["trials"]) > 1, "they were killed at work"

"""The short form of `python -m tests.scenarios.optimizer_kills`, whose long form docs/reliability.md quotes."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.scenarios.lab import Lab
from tests.scenarios.optimizer_kills import kill
from tests.scenarios.quick_lab import QuickLab


def test_three_kills_of_the_optimizer_daemon_leave_a_whole_study(tmp_path: Path):
    said: list[str] = []
    with QuickLab(tmp_path) as lab:
        assert kill(lab, 3, 4, Random(1), said.append) == [], said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_of_the_optimizer_daemon_over_real_trainings(tmp_path: Path):
    said: list[str] = []
    with Lab(tmp_path) as lab:
        assert kill(lab, 20, 12, Random(0), said.append) == [], said

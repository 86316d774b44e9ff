"""The short form of `python -m tests.scenarios.soak`, whose long form docs/reliability.md quotes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenarios.soak import soak


@pytest.mark.timeout(1800)
def test_kills_at_random_break_no_promise(tmp_path: Path):
    said: list[str] = []
    assert soak(tmp_path, kills=2, studies=1, seed=7, say=said.append) == [], said

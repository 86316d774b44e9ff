"""The short form of `python -m tests.scenarios.kills`, whose long form docs/reliability.md quotes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenarios.kills import kill


@pytest.mark.timeout(900)
def test_a_few_kills_of_each_victim_break_no_promise(tmp_path: Path):
    said: list[str] = []
    ledger = kill(tmp_path, manager=3, writers=2, evaluators=2, seed=1, say=said.append)
    assert ledger.complaints == [], said
    assert ledger.kills == {"manager": 3, "writer": 2, "evaluator": 2}
    assert ledger.recorded > 0

"""The short form of `python -m tests.scenarios.kills`, whose long form docs/reliability.md quotes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenarios.kills import kill


@pytest.mark.timeout(900)
def test_a_few_kills_of_each_victim_break_no_promise(tmp_path: Path):
    said: list[str] = []
    ledger = kill(tmp_path, manager=5, writers=3, evaluators=3, seed=1, say=said.append)
    assert ledger.complaints == [], said
    assert ledger.kills == {"manager": 5, "writer": 3, "evaluator": 3}
    assert ledger.recorded > 0

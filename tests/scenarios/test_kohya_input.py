"""Every kind of input that a start of the kohya trainer refuses: one line, with the value and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenarios.bad_input import Case, World
from tests.scenarios.kohya_cases import KOHYA, refusal
from tests.scenarios.test_input_errors import documented


@pytest.mark.parametrize("case", KOHYA, ids=lambda case: case.sentence)
def test_bad_input_is_refused_before_anything_is_written(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SD_SCRIPTS_DIR", raising=False)
    world = World(tmp_path, None)
    line = refusal(case.spoil(world))
    for said in case.says:
        assert said in line
    assert documented(line), f"docs/troubleshooting.md lacks: {line}"
    assert not world.study.exists()

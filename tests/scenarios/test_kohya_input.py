"""Every kind of input that a start of the kohya trainer refuses: one line, with the value and the remedy."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from optimizer_daemon.search.load import load_space
from optimizer_daemon.settings import OptimizerSettings, load_optimizer_settings
from optimizer_daemon.start_checks import check_inputs
from optimizer_daemon.trainers import TRAINERS
from shared.errors import UserError
from shared.layout import StudyLayout
from shared.settings import add_settings_flags
from tests.scenarios.bad_input import Case, World
from tests.scenarios.kohya_cases import KOHYA
from tests.scenarios.test_input_errors import documented


@pytest.mark.parametrize("case", KOHYA, ids=lambda case: case.sentence)
def test_bad_input_is_refused_before_anything_is_written(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SD_SCRIPTS_DIR", raising=False)
    world = World(tmp_path, None)
    words = case.spoil(world)
    parser = argparse.ArgumentParser()
    add_settings_flags(parser, OptimizerSettings)
    settings = load_optimizer_settings(parser.parse_args(words[words.index("run") + 1 :]))
    trainer = TRAINERS.load(settings.trainer_name)
    with pytest.raises(UserError) as refused:
        check_inputs(settings, StudyLayout(world.study), load_space(settings.search_space), trainer, {})
    line = f"error: {' '.join(str(refused.value).split())}"
    for said in case.says:
        assert said in line
    assert documented(line), f"docs/troubleshooting.md lacks: {line}"
    assert not world.study.exists()

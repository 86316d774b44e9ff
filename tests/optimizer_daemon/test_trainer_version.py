"""A program that trains and is updated between two starts of a study."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

import pytest

from optimizer_daemon.study_file import find_run
from shared.files import write_model
from shared.logs import LineFormatter
from shared.schemas import Run
from tests.optimizer_daemon.trainers.bench import Bench


def test_another_version_is_recorded_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)

    def started(version: str | None) -> Run:
        caplog.clear()
        run = find_run(bench.settings, bench.study, datetime.now().astimezone(), trainer_version=version)
        write_model(bench.study.run, run)
        return run

    with Bench(tmp_path) as bench:
        bench.trial.folder.rmdir()  # a first start finds no trials
        assert started("v0.9.1").trainer.version == "v0.9.1"
        assert started("v0.9.1").trainer.version == "v0.9.1"
        assert caplog.records == []
        assert started("v0.9.1-3-gabcdef-dirty").trainer.version == "v0.9.1-3-gabcdef-dirty"
        [record] = caplog.records
        assert (
            LineFormatter()
            .format(record)
            .endswith("trials before and after may not be comparable before=v0.9.1 now=v0.9.1-3-gabcdef-dirty")
        )
        assert started(None).trainer.version == "v0.9.1-3-gabcdef-dirty"
        assert caplog.records == []

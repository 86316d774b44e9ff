"""The benchmark of a long study's waiting times, on a short one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.search import speed


def test_every_figure_is_measured(tmp_path: Path, monkeypatch):
    file = tmp_path / "speed.json"
    words = ["--trials", "12", "--folders", "5", "--samplers", "random", "--repeats", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["speed", *words])
    assert speed.main() == 0
    found = json.loads(file.read_text())
    assert set(found["asks"]) == {"random"}
    figures = [found["asks"]["random"]["trial"], found["books"]["5"], found["status"]["5"]]
    assert all(figure["wall_s"] > 0 for figure in figures)

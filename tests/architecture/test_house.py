"""Rules of the tree that no single module can keep."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_import_contracts_hold():
    command = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_file_format_docs_are_current():
    subprocess.run([sys.executable, "-m", "shared.format_docs", "--check"], cwd=ROOT, check=True)


@pytest.mark.parametrize("unit", sorted((ROOT / "systemd").glob("*.service")), ids=lambda path: path.name)
def test_unit_starts_an_installed_command_and_is_notified(unit: Path):
    text = unit.read_text()
    assert re.search(r"^Type=notify$", text, re.M)
    assert re.search(r"^TimeoutStartSec=infinity$", text, re.M)  # ready comes after the start checks, however long
    commands = re.search(r"\[project.scripts\]\n((?:.+\n)+)", (ROOT / "pyproject.toml").read_text())
    assert commands
    started = re.search(r"^ExecStart=\S*/(\S+) ", text, re.M)
    assert started
    assert f"{started[1]} =" in commands[1]


def test_readme_names_the_test_command_that_ci_runs():
    assert "scripts/test" in (ROOT / "README.md").read_text()
    assert "scripts/test" in (ROOT / ".ci/run").read_text()


def test_the_walk_of_the_architecture_document_names_at_most_ten_functions_that_exist():
    text = (ROOT / "docs/architecture.md").read_text()
    walk = re.findall(r"^\| \d+ \| `([\w.]+):([\w.]+)` \|", text, re.M)
    assert 5 <= len(walk) <= 10
    for module, path in walk:
        found = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        assert callable(found)

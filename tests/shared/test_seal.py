"""Accepting a file that a person edited."""

import json
import runpy
from pathlib import Path

import pytest

from shared.files import parse_model, read_model, write_model
from shared.schemas import Answer, OptimizerRequest, TrialState
from shared.seal import document_at, main

MAKE_GOLDEN = Path(__file__).parent.parent / "data" / "formats" / "make_golden.py"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "trial_0005" / "trial_state.json"
    path.parent.mkdir()
    write_model(path, runpy.run_path(str(MAKE_GOLDEN))["documents"]()["trial_state"])
    return path


def edit(path: Path, **changes: object) -> None:
    """Change fields as a person with another editor would: other indent, no care for the checksum."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes, indent=8), encoding="utf-8")


def test_a_valid_edit_is_accepted(path, capsys):
    edit(path, reason="kept by Anna")
    assert main([str(path)]) == 0
    assert read_model(path, TrialState).reason == "kept by Anna"
    assert capsys.readouterr().out == f"{path}: accepted\n"


def test_an_invalid_edit_is_refused_and_stays_as_it_is(path, capsys):
    edit(path, attempt="twice")
    before = path.read_bytes()
    assert main([str(path)]) == 3
    assert "attempt: 'twice' will not do" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_relative_path_is_enough(path, monkeypatch):
    edit(path, reason="kept by Anna")
    monkeypatch.chdir(path.parent)
    assert main(["trial_state.json"]) == 0
    assert parse_model(path.read_bytes(), path, TrialState).reason == "kept by Anna"


def test_a_missing_file_is_bad_input(path, capsys):
    path.unlink()
    assert main([str(path)]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_file_outside_the_contract_is_bad_input(tmp_path, capsys):
    assert main([str(tmp_path / "notes.json")]) == 2
    assert "docs/file_formats.md" in capsys.readouterr().err


def test_an_answer_is_not_taken_for_a_request():
    assert document_at(Path("study/requests/optimizer/7c1e.done.json")).model is Answer
    assert document_at(Path("study/requests/optimizer/7c1e.json")).model is OptimizerRequest

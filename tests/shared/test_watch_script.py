"""watch_realtime_evaluation.sh, run by bash: with and without a terminal, moved, without its interpreter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.layout import StudyLayout
from shared.watch_script import write_watch_script
from tests.evaluator_daemon.terminals import PATIENCE_S, Terminal
from tests.evaluator_daemon.watched_study import write_run, write_trial

ENVIRONMENT = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"}


@pytest.fixture
def study(tmp_path) -> StudyLayout:
    study = StudyLayout(tmp_path / "it's a study")
    write_run(study)
    write_trial(study, 1, "complete", [0.5, 0.42, 0.31, 0.33])
    write_watch_script(study)
    return study


def bash(script: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the script from a folder that has modules of the program's names."""
    for name in ("shared", "evaluator_daemon"):
        (cwd / name).mkdir()
        (cwd / name / "__init__.py").write_text("raise SystemExit('the wrong module')")
    return subprocess.run(
        ["bash", script, *words], cwd=cwd, env={n: v for n, v in ENVIRONMENT.items() if n != "PYTHONPATH"},
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=PATIENCE_S,
    )  # fmt: skip


def test_without_a_terminal_it_prints_plain_text_once_from_wherever_it_is_called(study, tmp_path):
    done = bash(study.watch_script, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "lora_trial_1-000006.safetensors" in done.stdout
    assert "\x1b" not in done.stdout


def test_on_a_terminal_it_is_the_live_view_and_the_number_is_its_interval(study, tmp_path):
    command = ["bash", study.watch_script, "0.2"]
    with Terminal(command, ENVIRONMENT, tmp_path / "said") as terminal:
        assert "\x1b[?1049h" in terminal.wait_for("lora_trial_1-000006.safetensors")
        write_trial(study, 2, "complete", [0.5, 0.42, 0.31, 0.1234])
        terminal.wait_for("0.1234")
        terminal.press(b"\x03")
        assert terminal.wait() == 130
        assert terminal.after == terminal.before
        assert terminal.said == ""


def test_a_moved_folder_shows_itself_and_a_link_to_the_script_its_study(study, tmp_path):
    moved = StudyLayout(tmp_path / "moved")
    shutil.copytree(study.root, moved.root)
    shutil.rmtree(study.root)
    link = tmp_path / "watch"
    link.symlink_to(moved.watch_script)
    done = bash(link, cwd=tmp_path)
    assert done.returncode == 0
    assert str(moved.root) in done.stdout.splitlines()[0]


def test_an_interpreter_that_has_gone_is_one_clear_line(study, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "old env" / "python"))
    write_watch_script(study)
    done = bash(study.watch_script, cwd=tmp_path)
    assert done.returncode == 4
    assert done.stderr == (
        f"error: {tmp_path}/old env/python, which wrote this script, is gone; run optimizer-daemon on {study.root} "
        f"again, or evaluator-daemon watch --optimization-dir {study.root}\n"
    )


def test_a_number_that_is_none_is_bad_input(study, tmp_path):
    done = bash(study.watch_script, "-1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --interval: -1.0 will not do; ")


def test_the_optimizer_renews_it_and_the_manager_leaves_it_as_it_is(study):
    whole = study.watch_script.read_text()
    assert f"python={sys.executable}\n" in whole
    study.watch_script.write_text("mine")
    write_watch_script(study, only_if_absent=True)
    assert study.watch_script.read_text() == "mine"
    write_watch_script(study)
    assert study.watch_script.read_text() == whole
    study.watch_script.unlink()
    write_watch_script(study, only_if_absent=True)
    assert study.watch_script.read_text() == whole

"""`evaluator-daemon watch` as people and programs meet it: on a terminal, through a pipe, at any size."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from evaluator_daemon.monitor import ASCII, BLOCKS, marks_for, plain_text, screen
from evaluator_daemon.snapshot import StudyReader
from shared.layout import StudyLayout
from shared.locks import FileLock
from tests.evaluator_daemon.terminals import PATIENCE_S, Terminal
from tests.evaluator_daemon.watched_study import (
    NOW,
    file,
    quarantined,
    record,
    write_bar,
    write_records,
    write_run,
    write_scores,
    write_trial,
)

ROOT = Path(__file__).resolve().parents[2]
SECOND_SCREEN, FIRST_SCREEN, SHOW_CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


def environment(**more: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    return {**known, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "PYTHONUTF8": "1", **more}


def command(study: StudyLayout, *flags: str) -> list[str]:
    return [sys.executable, "-m", "evaluator_daemon.cli", "watch", "--optimization-dir", str(study.root), *flags]


def piped(study: StudyLayout, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(study, *flags), env=environment(**variables), capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL, timeout=PATIENCE_S,
    )  # fmt: skip


@pytest.fixture
def study(tmp_path) -> StudyLayout:
    """One trial trains, one is complete, one checkpoint is quarantined, one trial failed."""
    study = StudyLayout(tmp_path / "study")
    write_run(study)
    write_trial(study, 1, "complete", [0.5, 0.42, 0.31, 0.33])
    write_trial(study, 2, "failed", reason="no memory \x1b[2J[bold]left")
    trial = write_trial(study, 3, "training", [0.41, 0.27], waiting=1)
    write_bar(trial, 40, 64)
    write_records(trial, *(record(file(trial, n).stem) for n in (0, 1)), quarantined(file(trial, 2).stem, "NaN"))
    return study


# ------------------------------------------------------------------------------------------------------ on a terminal


def test_on_a_terminal_it_draws_draws_again_and_leaves_everything_as_it_was(study, tmp_path):
    with Terminal(command(study, "--interval", "0.2"), environment(), tmp_path / "said") as terminal:
        first = terminal.wait_for("the best,")
        assert SECOND_SCREEN in first
        assert "lora_trial_3-000004.safetensors" in first
        assert "3 more trials" not in first
        write_scores(study.trial(3), [0.41, 0.2222])
        terminal.wait_for("0.2222")
        terminal.press(b"typed\n")
        terminal.resize(70, 11)
        small = terminal.wait_for("more trials are not shown")
        assert "typed" not in small
        terminal.press(b"\x03")
        assert terminal.wait() == 130
        assert FIRST_SCREEN in terminal.shown
        assert SHOW_CURSOR in terminal.shown
        assert "\x1b" not in terminal.shown.rpartition(FIRST_SCREEN)[2].replace(SHOW_CURSOR, "")
        assert terminal.after == terminal.before
        assert terminal.said == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_other_signals_leave_the_terminal_whole_too(study, tmp_path, number, code):
    with Terminal(command(study), environment(), tmp_path / "said") as terminal:
        terminal.wait_for("the best,")
        terminal.process.send_signal(number)
        assert terminal.wait() == code
        assert FIRST_SCREEN in terminal.shown
        assert terminal.after == terminal.before


def test_a_window_that_is_closed_ends_it_without_a_word(study, tmp_path):
    with Terminal(command(study, "--interval", "0.2"), environment(), tmp_path / "said") as terminal:
        terminal.wait_for("the best,")
        terminal.hang_up()
        assert terminal.process.wait(PATIENCE_S) == 143
        assert terminal.said == ""


def test_a_dumb_terminal_gets_plain_text(study, tmp_path):
    with Terminal(command(study), environment(TERM="dumb"), tmp_path / "said") as terminal:
        assert terminal.wait() == 0
        assert "\x1b" not in terminal.shown
        assert "lora_trial_3-000004.safetensors" in terminal.shown


# ------------------------------------------------------------------------------------------------------ through a pipe


def test_a_pipe_gets_plain_text_once(study):
    done = piped(study)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("pixar  ")
    assert "study running  optimizer not running  evaluator not running  1 of 20 trials finished, 1 failed" in lines[1]
    assert lines[2] == "queue  0 checkpoints unscored"
    assert lines[3] == (
        "best   combined_score, lower is better: 0.2700  trial_0003 epoch 4  lora_trial_3-000004.safetensors  "
        "best final 0.3300 trial_0001"
    )
    assert lines[4].startswith("1 quarantined  ")
    assert lines[4].endswith("trial_0003 lora_trial_3-000006: not_finite: NaN")
    assert [line.split()[:2] for line in lines[7:10]] == [["3", "not"], ["1", "complete"], ["2", "failed"]]
    assert "█▅◆▁" in lines[8]
    assert "low is good; ◆ the best" in lines[-1]


def test_a_pipe_gets_block_after_block_when_an_interval_is_asked_for(study):
    with subprocess.Popen(
        command(study, "--interval", "0.1"), env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        titles = 0
        while titles < 3:
            line = process.stdout.readline()
            assert line, "it ended by itself"
            assert "\x1b" not in line
            titles += line.startswith("pixar  ")
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(PATIENCE_S) == 130


def test_once_is_plain_on_a_terminal_too(study, tmp_path):
    with Terminal(command(study, "--once"), environment(), tmp_path / "said") as terminal:
        assert terminal.wait() == 0
        assert "\x1b" not in terminal.shown


def test_json_is_one_document(study):
    shown = json.loads(piped(study, "--json").stdout)
    assert shown["best"] == {
        "trial": "trial_0003", "checkpoint": "lora_trial_3-000004.safetensors", "epoch": 4, "score": 0.27,
        "file_exists": True, "final": False,
    }  # fmt: skip
    assert [trial["number"] for trial in shown["trials"]] == [3, 1, 2]


def test_an_encoding_without_blocks_gets_letters(study):
    done = piped(study, PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "@=*_" in done.stdout
    assert marks_for(io.TextIOWrapper(io.BytesIO(), "ascii")) == ASCII
    assert marks_for(io.TextIOWrapper(io.BytesIO(), "utf-8")) == BLOCKS


def test_a_folder_without_a_study_yet_says_that_it_waits(tmp_path):
    study = StudyLayout(tmp_path)
    done = piped(study)
    assert done.returncode == 0
    assert "waiting for run.json" in done.stdout
    assert "no trial has begun yet" in done.stdout
    assert list(tmp_path.iterdir()) == [], "whoever only looks changes nothing"


# ---------------------------------------------------------------------------------------------------------- at any size


@pytest.fixture(scope="module")
def long_study(tmp_path_factory):
    """300 trials, and more to say than a line holds."""
    study = StudyLayout(tmp_path_factory.mktemp("long") / "study")
    write_run(study, n_trials=400)
    for number in range(1, 301):
        state = "failed" if number % 7 == 0 else "complete"
        scores = [0.5, 0.4, 0.3, number / 1000]
        write_trial(study, number, state, scores, reason="word " * 100 if state == "failed" else None)
    (study.trial(5).params).write_text("half")
    (study.trial(6).params).write_text("half")
    (study.trial(8).params).write_text("half")
    return StudyReader(study, nvidia_smi=("/nonexistent",)).look(NOW)


def drawn(overview, columns, lines):
    console = Console(file=io.StringIO(), width=columns, height=lines, force_terminal=True, color_system=None)
    return [
        "".join(segment.text for segment in line).rstrip()
        for line in console.render_lines(screen(overview, console), pad=False)
    ]


@pytest.mark.parametrize("lines", [8, 12, 24, 50, 200, 400])
@pytest.mark.parametrize("columns", [40, 80, 110, 200])
def test_300_trials_stay_within_the_window_and_say_how_many_are_not_shown(long_study, columns, lines):
    shown = drawn(long_study, columns, lines)
    assert max(len(line) for line in shown) <= columns
    rows = [line for line in shown if re.match(r" *[0-9]+  (complete|failed)", line)]
    hidden = [line for line in shown if line.endswith("more trials are not shown")]
    if lines >= 12:
        assert len(shown) <= lines
    if lines == 400:
        assert (len(rows), hidden) == (300, [])
    elif rows:
        assert hidden == [f"{300 - len(rows)} more trials are not shown"]
        assert len(shown) >= lines - 1, "no room is given away"


def test_plain_text_holds_the_whole_error_every_unreadable_file_and_a_bounded_number_of_trials(long_study):
    text = plain_text(long_study)
    assert " ".join(["word"] * 100) in text
    assert len([line for line in text.splitlines() if line.startswith("unreadable  ")]) == 3
    assert "260 more trials are not shown" in text


def test_what_files_say_moves_no_cursor(study):
    text = plain_text(StudyReader(study, nvidia_smi=("/nonexistent",)).look(NOW))
    assert "trial_0002: failed: no memory [2J[bold]left" in text
    assert "\x1b" not in text


def test_a_training_shows_its_speed_and_the_time_left(study):
    with FileLock(study.trial(3).trainer_lock):
        text = plain_text(StudyReader(study, nvidia_smi=("/nonexistent",)).look(NOW))
    (row,) = [line for line in text.splitlines() if " training " in line]
    words = "3 training 6/8 2/4 █◆ 0.2700 @4 ok 23.5 5:28 dim 64 alpha 32 lr 0.0001"
    assert " ".join(row.split()) == words

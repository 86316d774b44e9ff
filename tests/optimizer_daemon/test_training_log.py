"""Following a log that somebody else writes."""

from __future__ import annotations

import pytest

from optimizer_daemon.training_log import TrainingLog, last_lines


def test_lines_come_once_whole_and_a_redrawn_bar_counts_as_lines(tmp_path):
    path = tmp_path / "training.log"
    log = TrainingLog(path)
    assert log.new_lines() == []
    with path.open("a") as file:
        file.write("start\nsteps: 1\rsteps: 2\rsteps")
        file.flush()
        assert log.new_lines() == ["start", "steps: 1", "steps: 2"]
        file.write(": 3\r\n\n")
        file.flush()
        assert log.new_lines() == ["steps: 3"]
        assert log.new_lines() == []


def test_a_log_that_was_replaced_is_read_from_its_start(tmp_path):
    path = tmp_path / "training.log"
    path.write_text("one\ntwo\nthree\n")
    log = TrainingLog(path)
    assert log.new_lines() == ["one", "two", "three"]
    path.write_text("new\n")
    assert log.new_lines() == ["new"]


def test_an_earlier_attempt_s_lines_are_skipped_and_a_long_log_is_taken_up_near_its_end(tmp_path):
    path = tmp_path / "training.log"
    path.write_text("old\n" * 100_000)
    followed = TrainingLog(path)
    assert 0 < len(followed.new_lines()) < 20_000
    skipping = TrainingLog(path)
    skipping.skip_to_end()
    with path.open("a") as file:
        file.write("new\n")
    assert skipping.new_lines() == ["new"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a\nb\n\nc\n", ["b", "c"], id="empty lines do not count"),
        pytest.param("a\n10 %\r20 %\r30 %\nerror\n", ["30 %", "error"], id="of a bar only what it showed last"),
        pytest.param("", [], id="an empty log"),
    ],
)
def test_the_last_lines(tmp_path, text, expected):
    path = tmp_path / "training.log"
    path.write_text(text)
    assert last_lines(path, 2) == expected
    assert last_lines(tmp_path / "missing", 2) == []

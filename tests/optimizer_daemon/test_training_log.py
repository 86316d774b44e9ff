"""Following a log that somebody else writes."""

from __future__ import annotations

import os
import tracemalloc

import pytest

from optimizer_daemon.training_log import LONGEST_LINE_BYTES, MOST_BYTES, SHOWN_CHARACTERS, TrainingLog


def test_lines_come_once_whole_and_a_redrawn_bar_counts_as_lines(tmp_path):
    path = tmp_path / "training.log"
    log = TrainingLog(path)
    assert list(log.new_lines()) == []
    with path.open("a") as file:
        file.write("start\nsteps: 1\rsteps: 2\rsteps")
        file.flush()
        assert list(log.new_lines()) == ["start", "steps: 1", "steps: 2"]
        assert log.unfinished == "steps"
        file.write(": 3\r\n\n")
        file.flush()
        assert list(log.new_lines()) == ["steps: 3"]
        assert (list(log.new_lines()), log.unfinished) == ([], "")


def test_a_log_that_was_replaced_is_read_from_its_start(tmp_path):
    path = tmp_path / "training.log"
    path.write_text("one\ntwo\nthree\n")
    log = TrainingLog(path)
    assert list(log.new_lines()) == ["one", "two", "three"]
    path.write_text("new\n")
    assert list(log.new_lines()) == ["new"]


def test_an_earlier_attempt_s_lines_are_skipped_and_a_long_log_is_taken_up_near_its_end(tmp_path):
    path = tmp_path / "training.log"
    path.write_text("old\n" * 100_000)
    followed = TrainingLog(path)
    assert 0 < len(list(followed.new_lines())) < 20_000
    skipping = TrainingLog(path)
    skipping.skip_to_end()
    assert skipping.last_lines(5) == []
    with path.open("a") as file:
        file.write("new\n")
    assert list(skipping.new_lines()) == ["new"]
    assert skipping.last_lines(5) == ["new"]


def test_of_a_flood_only_the_end_is_read_and_never_much_of_it_kept(tmp_path):
    path = tmp_path / "training.log"
    log = TrainingLog(path)
    assert list(log.new_lines()) == []
    path.write_bytes(b"")
    list(log.new_lines())
    line = b"DEBUG " + b"x" * 93 + b"\n"
    path.write_bytes(line * 400_000 + b"steps: 7\n")
    tracemalloc.start()
    try:
        count, last = 0, ""
        for text in log.new_lines():
            count, last = count + 1, text
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert last == "steps: 7"
    assert MOST_BYTES // len(line) - 2 < count <= MOST_BYTES // len(line) + 2
    assert peak < 4 * 2**20


def test_of_an_endless_line_only_the_end_is_kept(tmp_path):
    path = tmp_path / "training.log"
    log = TrainingLog(path)
    path.write_bytes(b"x" * (MOST_BYTES // 2))
    log.skip_to_end()
    for _ in range(3):
        with path.open("ab") as file:
            file.write(b"y" * (MOST_BYTES // 2))
        assert list(log.new_lines()) == []
    with path.open("ab") as file:
        file.write(b"z\nnext\n")
    lines = list(log.new_lines())
    assert len(lines[0]) == LONGEST_LINE_BYTES + 1
    assert lines[1] == "next"
    shown, following = log.last_lines(2)
    assert (len(shown), shown[-2:], following) == (SHOWN_CHARACTERS + len(" ... "), "yz", "next")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a\nb\n\nc\n", ["b", "c"], id="empty lines do not count"),
        pytest.param("a\n10 %\r20 %\r30 %\nerror\n", ["30 %", "error"], id="of a bar only what it showed last"),
        pytest.param("a\n10 %\r20 %\r", ["a", "20 %"], id="a bar that ends by going back to its start"),
        pytest.param("\x1b[31mred\x1b[0m\x07\nb\0\0\n", ["red", "b"], id="neither colours nor bells nor zeros"),
        pytest.param("caf\xe9\n", ["caf\ufffd"], id="bytes that are no UTF-8"),
        pytest.param("", [], id="an empty log"),
    ],
)
def test_the_last_lines(tmp_path, text, expected):
    path = tmp_path / "training.log"
    path.write_bytes(text.encode("latin-1"))
    assert TrainingLog(path).last_lines(2) == expected
    assert TrainingLog(tmp_path / "missing").last_lines(2) == []


def test_the_last_lines_of_a_log_with_a_hole_are_what_stands_behind_it(tmp_path):
    path = tmp_path / "training.log"
    path.write_bytes(b"begin\n")
    os.truncate(path, 2**33)  # 8 GiB of nothing
    with path.open("ab") as file:
        file.write(b"end\n")
    assert TrainingLog(path).last_lines(2) == ["end"]

"""Append-only files: a torn last line costs that line and nothing else."""

import errno
import os
from pathlib import Path

import pytest

from shared import files
from shared.errors import DiskError, UnreadableFileError
from shared.files import append_line, read_lines


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


def test_records_come_back_in_order(path):
    records = [{"n": 1}, {"n": 2, "text": "line\nfeed, 明るさ"}, {"n": 3}]
    for record in records:
        append_line(path, record)
    assert read_lines(path) == (records, b"")
    assert path.read_bytes().count(b"\n") == 3


def test_a_missing_file_has_no_lines(path):
    assert read_lines(path) == ([], b"")


def test_one_line_is_one_write_and_one_sync(path, monkeypatch):
    append_line(path, {"n": 1})
    calls = []
    for name in ("write", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(
            files.os, name, lambda *arguments, name=name, real=real: calls.append(name) or real(*arguments)
        )
    append_line(path, {"n": 2})
    assert calls == ["write", "fsync"]


SECOND = b'{"n": 2, "text": "abc"}\n'


@pytest.mark.parametrize("length", range(1, len(SECOND)))
def test_a_line_torn_anywhere_is_reported_and_does_not_merge_with_the_next(path, length):
    append_line(path, {"n": 1})
    with path.open("ab") as file:
        file.write(SECOND[:length])
    assert read_lines(path) == ([{"n": 1}], SECOND[:length])
    append_line(path, {"n": 3})
    assert read_lines(path) == ([{"n": 1}, {"n": 3}], b"")


def test_a_file_that_is_nothing_but_a_long_torn_line_starts_anew(path):
    path.write_bytes(b"x" * 200_000)
    append_line(path, {"n": 1})
    assert read_lines(path) == ([{"n": 1}], b"")


def test_a_torn_line_behind_a_long_file_is_cut_where_it_begins(path):
    for n in range(3):
        append_line(path, {"n": n, "text": "x" * 100_000})
    with path.open("ab") as file:
        file.write(b"y" * 150_000)
    append_line(path, {"n": 3})
    assert [record["n"] for record in read_lines(path).records] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("damaged", "expected"),
    [
        pytest.param(b'{"n": 1}\n{"n" 2}\n{"n": 3}\n', "line 2: not JSON", id="in the middle"),
        pytest.param(b'{"n": 1}\n{"n" 2}\n', "line 2: not JSON", id="at the end, but whole"),
        pytest.param(b'{"n": 1}\n\n{"n": 3}\n', "line 2: not JSON", id="an empty line"),
        pytest.param(b'{"n": 1}\n[2]\n', "line 2: holds [2] where a JSON object", id="no object"),
        pytest.param(b'{"n": 1, "n": 2}\n', "line 1: the key 'n' occurs twice", id="a key twice"),
    ],
)
def test_a_damaged_line_is_refused_by_number(path, damaged, expected):
    path.write_bytes(damaged)
    with pytest.raises(UnreadableFileError) as caught:
        read_lines(path)
    assert caught.value.reason.startswith(expected)


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_a_failed_append_leaves_the_file_as_it_was(path, monkeypatch, name):
    append_line(path, {"n": 1})
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, name, fail)
        with pytest.raises(DiskError):
            append_line(path, {"n": 2})
    assert path.read_bytes() == before
    append_line(path, {"n": 2})
    assert read_lines(path) == ([{"n": 1}, {"n": 2}], b"")


def test_a_half_written_line_is_taken_back(path, monkeypatch):
    append_line(path, {"n": 1})
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", lambda descriptor, line: real(descriptor, line[:4]))
        with pytest.raises(DiskError, match="No space left"):
            append_line(path, {"n": 2})
    assert read_lines(path) == ([{"n": 1}], b"")


def test_what_is_no_json_is_not_appended(path):
    append_line(path, {"n": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_line(path, {"n": float("nan")})
    with pytest.raises(TypeError):
        append_line(path, {"n": Path("x")})
    assert read_lines(path) == ([{"n": 1}], b"")

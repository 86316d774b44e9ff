"""Logs that people tail."""

import logging
import os
import re
import time
from datetime import datetime

import pytest

from shared.errors import SettingsError
from shared.logs import log_change, set_up_logs, tear_down_logs

log = logging.getLogger("shared.some_module")
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "optimization.log"


@pytest.fixture(autouse=True)
def untouched_logging():
    root = logging.getLogger()
    before = (root.level, log.parent.level)
    yield
    tear_down_logs()
    root.setLevel(before[0])
    logging.getLogger("shared").setLevel(logging.NOTSET)


@pytest.fixture
def time_zone(monkeypatch):
    def to(name):
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield to
    monkeypatch.undo()
    time.tzset()


def lines(file):
    """The log without its times."""
    return [re.sub(f"^{STAMP} ", "", line) for line in file.read_text().splitlines()]


def test_one_line_per_change_in_the_file_and_on_stderr(file, capsys):
    set_up_logs(file)
    log_change(log, "trial started", trial=5, learning_rate=1e-4, torch_optim="AdamW8bit")
    assert lines(file) == ["INFO trial started trial=5 learning_rate=0.0001 torch_optim=AdamW8bit"]
    assert capsys.readouterr() == ("", file.read_text())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0.1 + 0.2, "0.3"),
        (1.5e-7, "1.5e-07"),
        (None, "None"),
        (True, "True"),
        ("cosine", "cosine"),
        ("日本", "日本"),
        ("", '""'),
        ("two words", '"two words"'),
        ("日 本", '"日 本"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("a=b", '"a=b"'),
        ("line\nline", '"line\\nline"'),
        ("\x1b[31mred", '"\\u001b[31mred"'),
    ],
    ids=repr,
)
def test_fields_can_be_told_apart(file, value, text):
    set_up_logs(file)
    log_change(log, "change", value=value, after=1)
    assert lines(file) == [f"INFO change value={text} after=1"]


@pytest.mark.parametrize("message", ["two\nlines", "two\rlines", "\x1b[2Jcleared", "separated\u2028lines"], ids=repr)
def test_a_message_cannot_break_its_line(file, message):
    set_up_logs(file)
    log.warning("%s", message)
    (line,) = file.read_text(encoding="utf-8").split("\n")[:-1]
    assert line.isprintable()


@pytest.mark.parametrize(
    ("zone", "offset"), [("Asia/Shanghai", "+08:00"), ("America/St_Johns", "-03:30"), ("UTC", "+00:00")]
)
def test_times_are_local_with_their_offset(file, time_zone, zone, offset):
    time_zone({"Asia/Shanghai": "CST-8", "America/St_Johns": "NST3:30", "UTC": "UTC0"}[zone])
    set_up_logs(file)
    log.info("now")
    stamp = file.read_text().split()[0]
    assert stamp.endswith(offset)
    assert abs(datetime.fromisoformat(stamp).timestamp() - time.time()) < 60


@pytest.mark.parametrize(
    ("level", "kept"),
    [
        ("debug", ["DEBUG ours", "INFO ours", "WARNING ours", "ERROR ours", "WARNING theirs"]),
        ("info", ["INFO ours", "WARNING ours", "ERROR ours", "WARNING theirs"]),
        ("WARNING", ["WARNING ours", "ERROR ours", "WARNING theirs"]),
        ("error", ["ERROR ours", "WARNING theirs"]),
    ],
)
def test_levels(file, level, kept):
    set_up_logs(file, level=level)
    for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        log.log(number, "ours")
    logging.getLogger("some_library").info("theirs")
    logging.getLogger("some_library").warning("theirs")
    assert lines(file) == kept


def test_an_unknown_level_is_told(file):
    with pytest.raises(SettingsError, match="--log-level: 'loud' will not do; choose one of debug, info"):
        set_up_logs(file, level="loud")
    assert not file.exists()


def test_a_log_that_cannot_be_opened_is_told_and_leaves_the_old_one(file, tmp_path):
    set_up_logs(file)
    with pytest.raises(SettingsError, match=r"log file: .*typo.*make its folder exist"):
        set_up_logs(tmp_path / "typo" / "x.log")
    log.info("still here")
    assert lines(file) == ["INFO still here"]


def test_setting_up_again_doubles_no_line_and_loses_none(file, capsys):
    for number in range(3):
        set_up_logs(file)
        log.info("set up %d", number)
    assert lines(file) == ["INFO set up 0", "INFO set up 1", "INFO set up 2"]
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_second_file_takes_over_from_the_first(file, tmp_path):
    set_up_logs(file)
    set_up_logs(tmp_path / "other.log", to_stderr=False)
    log.info("there")
    assert file.read_text() == ""
    assert lines(tmp_path / "other.log") == ["INFO there"]


@pytest.mark.parametrize("gone", ["moved", "deleted"])
def test_the_log_follows_its_name(file, gone):
    set_up_logs(file)
    log.info("before")
    if gone == "moved":
        file.rename(file.with_suffix(".old"))
    else:
        file.unlink()
    log.info("after")
    assert lines(file) == ["INFO after"]


def test_a_long_log_is_rotated(file, monkeypatch):
    monkeypatch.setattr("shared.logs._MAX_BYTES", 300)
    set_up_logs(file, to_stderr=False)
    for number in range(40):
        log.info("line %d", number)
    kept = [file, *(file.with_name(f"{file.name}.{number}") for number in range(1, 6))]
    assert sorted(file.parent.iterdir()) == sorted(kept)
    assert all(path.stat().st_size <= 300 for path in kept)
    assert lines(file)[-1] == "INFO line 39"


def test_a_full_disk_is_told_once(file, capsys):
    file.symlink_to("/dev/full")
    set_up_logs(file, to_stderr=False)
    for _ in range(3):
        log.info("lost")
    assert capsys.readouterr().err == f"{file}: log lines are being lost (No space left on device)\n"
    handler = logging.getLogger().handlers[-1]
    file.unlink()  # room again
    log.info("found")
    assert lines(file)[-1] == "INFO found"
    assert handler in logging.getLogger().handlers


def test_a_wrong_format_string_is_shown_as_the_bug_it_is(file, capsys):
    set_up_logs(file, to_stderr=False)
    (handler,) = [
        handler for handler in logging.getLogger().handlers if getattr(handler, "baseFilename", "") == str(file)
    ]
    handler.handle(log.makeRecord(log.name, logging.INFO, __file__, 1, "%d", ("no number",), None))
    assert "TypeError" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(file):
    set_up_logs(file, to_stderr=False)
    try:
        {}[5]
    except KeyError:
        log.exception("tick failed")
    text = file.read_text()
    assert re.match(rf"{STAMP} ERROR tick failed\nTraceback", text)
    assert text.endswith("KeyError: 5\n")


def test_the_line_names_no_place_in_the_code_but_the_record_does(file, caplog):
    set_up_logs(file, to_stderr=False)
    with caplog.at_level(logging.INFO, logger="shared"):
        log_change(log, "here")
    assert caplog.records[0].filename == os.path.basename(__file__)  # noqa: PTH119

"""Logs as people tail them: one line per change, with fields.

    2025-11-15T10:23:45+08:00 INFO trial started trial=5 learning_rate=0.0001 torch_optim=AdamW8bit

Times are local with their offset. Only our own packages log below WARNING; other libraries must have something to say.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TextIO

from shared.errors import SettingsError

OUR_PACKAGES = ("shared", "optimizer_daemon", "evaluator_daemon")
LEVELS = ("debug", "info", "warning", "error")

_MAX_BYTES = 10 * 1024 * 1024
_KEPT_FILES = 5
_FIELDS = "fields"


def set_up_logs(file: Path | None, *, level: str = "info", to_stderr: bool = True) -> None:
    """Send every log line to `file` and to stderr; a repeated call replaces what an earlier one set up.

    Args:
        file: appended to, rotated at 10 MiB with five predecessors kept; reopened when somebody moves or deletes it.
        level: one of LEVELS, for our own packages; others start at WARNING.

    Raises:
        SettingsError: `level` is none of LEVELS, or `file` cannot be opened.
    """
    if level.lower() not in LEVELS:
        raise SettingsError("--log-level", level, f"choose one of {', '.join(LEVELS)}")
    handlers: list[logging.Handler] = [_StderrHandler()] if to_stderr else []
    if file is not None:
        try:
            handlers.append(_FileHandler(file))
        except OSError as error:
            raise SettingsError("log file", str(file), f"make its folder exist and be writable ({error})") from error
    tear_down_logs()
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in handlers:
        handler.setFormatter(LineFormatter())
        root.addHandler(handler)
    for package in OUR_PACKAGES:
        logging.getLogger(package).setLevel(level.upper())


def tear_down_logs() -> None:
    """Remove and close the handlers `set_up_logs` added; others stay."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _StderrHandler | _FileHandler)]:
        root.removeHandler(handler)
        handler.close()


def log_change(logger: logging.Logger, change: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log one change of state, e.g. log_change(log, "trial ended", trial=5, score=0.132)."""
    logger.log(level, change, extra={_FIELDS: fields}, stacklevel=2)


class LineFormatter(logging.Formatter):
    """Time, level, change, fields on one line; only the traceback of a bug takes more."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="seconds")
        fields: dict[str, object] = getattr(record, _FIELDS, {})
        message = record.getMessage()
        if not message.isprintable():  # line breaks, or what would move a terminal's cursor
            message = json.dumps(message)[1:-1]
        line = " ".join([time, record.levelname, message, *(f"{key}={_text(value)}" for key, value in fields.items())])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _text(value: object) -> str:
    """Write a field's value so that a reader can split the line at its spaces."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if text and text.isprintable() and not set(text) & set(' ="'):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


class _StderrHandler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the base's name
        if not isinstance(sys.exc_info()[1], OSError):  # a terminal that went away is nobody's fault
            super().handleError(record)


class _FileHandler(logging.handlers.RotatingFileHandler):
    """Follows its name when somebody moves or deletes the file, and complains once while it cannot write."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, maxBytes=_MAX_BYTES, backupCount=_KEPT_FILES, encoding="utf-8")
        self._complained_of: int | None = None

    def shouldRollover(self, record: logging.LogRecord) -> int:  # noqa: N802  the base's name
        if self.stream is not None and not _is_at(Path(self.baseFilename), self.stream):
            with contextlib.suppress(OSError):  # what a full disk kept from being written is lost
                self.stream.close()
            self.stream = self._open()
        return super().shouldRollover(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the base's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)  # e.g. a wrong format string: our bug
        elif error.errno != self._complained_of:
            self._complained_of = error.errno
            print(f"{self.baseFilename}: log lines are being lost ({error.strerror})", file=sys.stderr)


def _is_at(path: Path, stream: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False

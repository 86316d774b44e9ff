"""Commands to a daemon as files: anybody drops one, only the daemon consumes and answers it.

    <time>-<id>.json    the request, there all at once
    <id>.done.json      the answer, which lasts; it is written before the request is removed

A daemon that is killed between the two finds the answered request again and only removes it. One that is killed while
it carries a request out finds it pending again, with the same identity: carrying it out twice must be harmless.

    answer = RequestFolder(study, "optimizer").ask(Pause(kind="pause"), study.optimizer_lock, carry_out)

Where no daemon lives, `ask` takes the daemon's lock and has `carry_out` do the work in this process.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from shared.errors import DiskError, ResourceError, UnreadableFileError, UserError
from shared.failpoints import reach
from shared.files import read_model, set_aside, sweep_temp_files, write_model
from shared.layout import Recipient, StudyLayout
from shared.locks import FileLock
from shared.logs import log_change
from shared.schemas import Answer, EvaluatorRequest, OptimizerRequest, Scalar
from shared.schemas.requests import Request

MAX_REQUEST_BYTES = 1024 * 1024
ANSWER_TIMEOUT_S = 150.0  # an orderly stop waits a minute for the training to save its state
ANSWERS_KEPT = timedelta(days=1)

_POLL_S = 0.05
_LOOK_S = 0.3  # between two looks whether the daemon still lives
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingRequest:
    """A request nobody has answered yet.

    Args:
        id: names the answer.
        identity: of this request alone, the same however often it is found pending; a file name such as stop.json may
            be used again, so its id is not enough.
        path: the file.
        command: what is asked.
    """

    id: str
    identity: str
    path: Path
    command: Request


@dataclass(frozen=True)
class RequestFolder:
    """The requests to one daemon of one study.

    Args:
        study: the study's folder.
        recipient: whose requests.
    """

    study: StudyLayout
    recipient: Recipient

    @property
    def path(self) -> Path:
        return self.study.requests(self.recipient)

    # ------------------------------------------------------------------------------------------------ for anybody

    def submit(self, command: Request) -> str:
        """Leave a command for the daemon and return the request's id.

        Raises:
            UserError: there is no such study folder.
            ValueError: the recipient does not know such a command.
            DiskError: it could not be written; nothing is left there.
        """
        now = datetime.now().astimezone()
        request_id = secrets.token_hex(6)
        self._make_folder()
        asked = command if command.asked else command.model_copy(update={"asked": now})
        write_model(self.study.request(self.recipient, now, request_id), self._model.model_validate(asked))
        return request_id

    def wait_for_answer(self, request_id: str, timeout_s: float) -> Answer | None:
        """Return the answer, or None when there is none after `timeout_s` seconds of the monotonic clock.

        Raises:
            UnreadableFileError: the answer is damaged.
        """
        path = self.study.answer(self.path / f"{request_id}.json")
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(FileNotFoundError):
                return read_model(path, Answer)
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_S)

    def ask(
        self,
        command: Request,
        daemon_lock: Path,
        carry_out: Callable[[PendingRequest], None],
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> Answer:
        """Have a command carried out by the living daemon, or here where none lives, and return the answer.

        Args:
            daemon_lock: what the daemon holds while it lives; taken for as long as `carry_out` runs.
            carry_out: does what is asked and answers it by `accept` or `refuse`.

        Raises:
            UserError: there is no such study folder.
            ResourceError: the daemon lives but has not answered in time; the command is taken back.
            LabError: whatever `carry_out` raises; the command is taken back.
        """
        request_id = self.submit(command)
        deadline = time.monotonic() + timeout_s
        try:
            while (answer := self.wait_for_answer(request_id, _LOOK_S)) is None:
                lock = FileLock(daemon_lock)
                if lock.try_acquire():
                    try:
                        for request in (known for known in self.pending() if known.id == request_id):
                            carry_out(request)
                    finally:
                        lock.release()
                elif time.monotonic() >= deadline:
                    break
        finally:
            self._take_back(request_id)
        answer = answer or self.wait_for_answer(request_id, 0.0)  # it may have come while we gave up
        if answer is None:
            raise ResourceError(
                f"the {self.recipient} daemon ({FileLock.holder(daemon_lock)}) has not answered within "
                f"{timeout_s:.0f} s; the command was taken back, try again"
            )
        return answer

    # --------------------------------------------------------------------------------------------- for the daemon

    def tidy(self, now: datetime) -> None:
        """Make the folder, and remove what killed writers and past commands left in it; for a daemon's start.

        Raises:
            DiskError: the folder cannot be made or tidied.
        """
        self._make_folder()
        sweep_temp_files(self.path)
        self.discard_answers(now - ANSWERS_KEPT)

    def pending(self) -> list[PendingRequest]:
        """Return the readable requests, oldest first.

        Those that were answered before a crash are removed; unreadable ones are answered with what is wrong and set
        aside as <name>.corrupt-<time>.
        """
        found = []
        for path in self.study.list_requests(self.recipient):
            try:
                if self._is_answered(path):
                    _remove(path)
                else:
                    found.append(PendingRequest(self._id(path), self._identity(path), path, self._read(path)))
                    reach("requests.found")
            except FileNotFoundError:
                continue  # taken back by whoever asked
            except (UnreadableFileError, ResourceError) as error:
                self._set_aside(path, str(error))
        return found

    def accept(self, request: PendingRequest, result: Mapping[str, Scalar | None] | None = None) -> None:
        """Answer that the request was carried out, and consume it.

        Raises:
            DiskError: it is not answered and stays pending.
        """
        self._answer(request.path, request.command, dict(result or {}), None)
        reach("requests.answered")
        _remove(request.path)

    def refuse(self, request: PendingRequest, reason: str) -> None:
        """Answer why the request was not carried out, and consume it.

        Raises:
            DiskError: it is not answered and stays pending.
        """
        self._answer(request.path, request.command, {}, reason)
        reach("requests.answered")
        _remove(request.path)

    def discard_answers(self, before: datetime) -> None:
        """Remove the answers written before a time; whoever asked has read them or never will."""
        for path in self.path.glob("*.done.json"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before.timestamp():
                    path.unlink()

    # ---------------------------------------------------------------------------------------------------- helpers

    @property
    def _model(self) -> type[OptimizerRequest] | type[EvaluatorRequest]:
        return OptimizerRequest if self.recipient == "optimizer" else EvaluatorRequest

    def _make_folder(self) -> None:
        if not self.study.root.is_dir():
            raise UserError(f"{self.study.root}: no such study folder; name the folder that holds run.json")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(self.path, error) from error

    def _take_back(self, request_id: str) -> None:
        for path in self.study.list_requests(self.recipient):
            if self._id(path) == request_id:
                _remove(path)

    def _id(self, path: Path) -> str:
        return self.study.answer(path).name.removesuffix(".done.json")

    def _identity(self, path: Path) -> str:
        return self._id(path) if self._is_named_once(path) else f"{self._id(path)}@{path.lstat().st_mtime_ns}"

    def _is_named_once(self, path: Path) -> bool:
        # A name without time and id, such as stop.json, may be used again and again: an old answer says nothing then.
        return self._id(path) != path.stem

    def _is_answered(self, path: Path) -> bool:
        return self._is_named_once(path) and self.study.answer(path).exists()

    def _read(self, path: Path) -> Request:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block us
            raise UnreadableFileError(path, "is no regular file; write the request itself")
        if status.st_size > MAX_REQUEST_BYTES:
            raise UnreadableFileError(path, f"has {status.st_size} bytes; a request has at most {MAX_REQUEST_BYTES}")
        return read_model(path, self._model).root

    def _set_aside(self, path: Path, reason: str) -> None:
        try:
            self._answer(path, None, {}, reason)
            kept = set_aside(path, datetime.now().astimezone())
        except DiskError as error:  # tried again at the next look; the daemon has more to do than this
            log_change(_log, "unreadable request stays", level=logging.WARNING, file=path.name, reason=error)
        else:
            log_change(_log, "unreadable request set aside", level=logging.WARNING, file=kept.name, reason=reason)

    def _answer(self, path: Path, command: Request | None, result: dict[str, Scalar | None], error: str | None) -> None:
        answer = Answer(
            request=_printable(path.name),
            kind=getattr(command, "kind", None),
            ok=error is None,
            result=result,
            error=error and _printable(error),
            answered=datetime.now().astimezone(),
        )
        reach("requests.carried_out")
        write_model(self.study.answer(path), answer)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(path, error) from error


def _printable(text: str) -> str:
    """Spell out what JSON cannot hold: any bytes make a file name."""
    return text.encode(errors="backslashreplace").decode()

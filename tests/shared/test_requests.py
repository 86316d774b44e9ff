"""Commands as files: in order, once, whatever anybody drops there and whenever the daemon is killed."""

import json
import os
import signal
import time
from datetime import UTC, datetime, timedelta

import pytest

from shared.errors import DiskError, ResourceError, UserError
from shared.layout import TEMPORARY_MARK, StudyLayout
from shared.locks import FileLock
from shared.requests import MAX_REQUEST_BYTES, RequestFolder
from shared.schemas import Answer, Enqueue, Pause, Resume, Retry
from tests.shared.process_trees import PATIENCE_S, no_process_left, start  # noqa: F401  autouse

PAUSE = Pause(kind="pause")


@pytest.fixture
def folder(tmp_path):
    return RequestFolder(StudyLayout(tmp_path), "optimizer")


def drop(folder, name, content):
    """Leave a request the way a person does."""
    folder.path.mkdir(parents=True, exist_ok=True)
    path = folder.path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def names(folder):
    return sorted(path.name for path in folder.path.iterdir())


def answer_at(folder, request_id) -> Answer:
    answer = folder.wait_for_answer(request_id, 0)
    assert answer is not None, f"{request_id} is not answered"
    return answer


def test_a_command_goes_to_the_daemon_and_its_answer_back(folder):
    command = Enqueue(kind="enqueue", parameters={"learning_rate": 1e-4, "torch_optim": "AdamW8bit"}, asked_by="me")
    request_id = folder.submit(command)
    (request,) = folder.pending()
    assert (request.id, request.path.name[-len(request_id) - 5 :]) == (request_id, f"{request_id}.json")
    assert request.command.parameters == command.parameters
    assert abs(request.command.asked - datetime.now(UTC)) < timedelta(minutes=5)
    folder.accept(request, {"trial": 7})
    answer = answer_at(folder, request_id)
    assert (answer.ok, answer.kind, answer.result, answer.request) == (True, "enqueue", {"trial": 7}, request.path.name)
    assert names(folder) == [f"{request_id}.done.json"]
    assert folder.pending() == []


def test_a_refusal_tells_why(folder):
    request_id = folder.submit(PAUSE)
    folder.refuse(folder.pending()[0], "the study is finished")
    answer = answer_at(folder, request_id)
    assert (answer.ok, answer.error) == (False, "the study is finished")
    assert folder.pending() == []


def test_requests_come_in_the_order_they_were_made(folder):
    made = [folder.submit(command) for command in [PAUSE, Resume(kind="resume")] * 5]
    assert [request.id for request in folder.pending()] == made


def test_each_daemon_has_its_own(folder):
    evaluator = RequestFolder(folder.study, "evaluator")
    request_id = evaluator.submit(Retry(kind="retry", trial_name="trial_0005"))
    assert folder.pending() == []
    assert [request.id for request in evaluator.pending()] == [request_id]


def test_a_command_of_the_other_daemon_is_a_bug_of_the_caller(folder):
    with pytest.raises(ValueError, match="retry"):
        folder.submit(Retry(kind="retry", trial_name="trial_0005"))
    assert folder.pending() == []


def test_no_study_folder_is_made_by_a_typo(tmp_path):
    with pytest.raises(UserError, match=r"typo: no such study folder"):
        RequestFolder(StudyLayout(tmp_path / "typo"), "optimizer").submit(PAUSE)
    assert RequestFolder(StudyLayout(tmp_path / "typo"), "optimizer").pending() == []
    assert not (tmp_path / "typo").exists()


def test_a_request_by_hand_may_have_any_name_and_use_it_again(folder):
    for _ in range(2):
        drop(folder, "pause.json", {"kind": "pause"})
        (request,) = folder.pending()
        assert request.id == "pause"
        folder.accept(request)
        assert answer_at(folder, "pause").ok
        assert names(folder) == ["pause.done.json"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"", "not JSON", id="empty"),
        pytest.param(b'{"kind": "pau', "not JSON", id="cut short"),
        pytest.param(b"\xff\xfe\x00", "not UTF-8", id="no text"),
        pytest.param([1, 2], "a JSON object is expected", id="no object"),
        pytest.param({"kind": "explode"}, "explode", id="an unknown command"),
        pytest.param({}, "kind", id="no command"),
        pytest.param({"kind": "pause", "hurry": True}, "hurry", id="an unknown field"),
        pytest.param({"kind": "enqueue", "parameters": {}}, "parameters", id="a field without content"),
        pytest.param({"kind": "retry", "trial_name": "trial_0005"}, "retry", id="a command for the other daemon"),
        pytest.param({"kind": "pause", "schema_version": 99}, "schema_version 99", id="a later version"),
        pytest.param(b"[" * 100_000, "nested too deeply", id="nested without end"),
        pytest.param(b" " * (MAX_REQUEST_BYTES + 1), f"at most {MAX_REQUEST_BYTES}", id="far too large"),
        pytest.param({"kind": "\ud800"}, "JSON", id="half a character"),
    ],
)
@pytest.mark.parametrize("name", ["20251115T102345.000000Z-0123456789ab", "by_hand"])
def test_an_unreadable_request_is_answered_and_set_aside(folder, name, content, told, caplog):
    path = drop(folder, f"{name}.json", content)
    other = folder.submit(PAUSE)
    assert [request.id for request in folder.pending()] == [other], "the others go on"
    answer = answer_at(folder, name.rpartition("-")[2])
    assert (answer.ok, answer.kind, answer.request) == (False, None, path.name)
    assert told in answer.error
    assert not path.exists()
    (kept,) = folder.path.glob("*.corrupt-*")
    assert kept.name.startswith(f"{path.name}.corrupt-")
    assert [request.id for request in folder.pending()] == [other]
    assert len(caplog.records) == 1, "told once"


@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a link", "a broken link"])
def test_what_is_no_file_neither_blocks_nor_breaks_the_daemon(folder, tmp_path, kind):
    path = drop(folder, "odd.json", b"")
    path.unlink()
    target = tmp_path / "target.json"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    if kind == "a link":
        target.write_text('{"kind": "pause"}')
    assert folder.pending() == []
    assert "is no regular file" in answer_at(folder, "odd").error
    assert folder.pending() == []


def test_a_name_of_any_bytes_is_answered(folder):
    drop(folder, os.fsdecode(b"\xff.json"), b"?")
    assert folder.pending() == []
    assert answer_at(folder, os.fsdecode(b"\xff")).request == "\\udcff.json"


def test_a_name_too_long_to_answer_does_not_stop_the_others(folder, caplog):
    drop(folder, "x" * 249 + ".json", b"?")
    request_id = folder.submit(PAUSE)
    assert [request.id for request in folder.pending()] == [request_id]
    assert "unreadable request stays" in caplog.text


@pytest.mark.parametrize("name", [".hidden.json", "notes.txt", "0123.done.json", ".x.json.tmp-1-2-0123abcd"])
def test_other_files_are_no_requests(folder, name):
    drop(folder, name, {"kind": "pause"})
    assert folder.pending() == []
    assert names(folder) == [name]


class TestCrashes:
    def test_between_answer_and_removal_the_request_is_only_removed(self, folder):
        request_id = folder.submit(PAUSE)
        (request,) = folder.pending()
        content = request.path.read_bytes()
        folder.accept(request, {"trial": 7})
        request.path.write_bytes(content)  # as if the daemon had been killed before it removed the request
        assert folder.pending() == []
        assert names(folder) == [f"{request_id}.done.json"]
        assert answer_at(folder, request_id).result == {"trial": 7}, "the first answer stands"

    def test_before_the_answer_the_same_request_comes_again(self, folder):
        folder.submit(PAUSE)
        (first,) = folder.pending()
        (again,) = RequestFolder(folder.study, "optimizer").pending()
        assert again == first

    def test_between_answer_and_setting_aside_an_unreadable_request_is_only_removed(self, folder):
        name = "20251115T102345.000000Z-0123456789ab.json"
        drop(folder, name, b"?")
        folder.pending()
        drop(folder, name, b"?")
        assert folder.pending() == []
        assert not (folder.path / name).exists()

    def test_answering_twice_is_harmless(self, folder):
        request_id = folder.submit(PAUSE)
        (request,) = folder.pending()
        folder.accept(request)
        folder.accept(request)
        assert names(folder) == [f"{request_id}.done.json"]

    def test_a_request_taken_back_while_we_look_is_no_request(self, folder, monkeypatch):
        folder.submit(PAUSE)
        (request,) = folder.pending()
        request.path.unlink()
        monkeypatch.setattr(StudyLayout, "list_requests", lambda *_: [request.path])
        assert folder.pending() == []

    def test_an_answer_that_cannot_be_written_leaves_the_request(self, folder):
        request_id = folder.submit(PAUSE)
        (request,) = folder.pending()
        blocker = folder.path / f"{request_id}.done.json"
        blocker.mkdir()
        with pytest.raises(DiskError):
            folder.accept(request)
        blocker.rmdir()
        assert [pending.id for pending in folder.pending()] == [request_id]

    def test_kill_9_at_any_moment_leaves_every_request_whole_or_answered(self, folder):
        daemon = """
            import sys
            from pathlib import Path
            from shared.layout import StudyLayout
            from shared.requests import RequestFolder
            folder = RequestFolder(StudyLayout(Path(sys.argv[1])), "optimizer")
            print("up", flush=True)
            while True:
                for request in folder.pending():
                    folder.accept(request, {"name": request.path.name})
        """
        made = []
        for kill_after_s in (0.02, 0.05, 0.08):
            process = start(daemon, folder.study.root)
            assert process.stdout.readline() == "up\n"
            end = time.monotonic() + kill_after_s
            while time.monotonic() < end:
                made.append(folder.submit(PAUSE))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        for request in folder.pending():
            folder.accept(request, {"name": request.path.name})
        assert len(made) >= 3
        assert sorted(made) == sorted(path.name.removesuffix(".done.json") for path in folder.path.glob("*.done.json"))
        assert all(answer_at(folder, request_id).ok for request_id in made)
        assert not list(folder.path.glob("*.corrupt-*"))


def test_waiting_ends_with_the_answer(folder):
    daemon = """
        import sys, time
        from pathlib import Path
        from shared.layout import StudyLayout
        from shared.requests import RequestFolder
        folder = RequestFolder(StudyLayout(Path(sys.argv[1])), "optimizer")
        while not (requests := folder.pending()):
            time.sleep(0.01)
        folder.accept(requests[0])
    """
    process = start(daemon, folder.study.root)
    request_id = folder.submit(PAUSE)
    assert folder.wait_for_answer(request_id, PATIENCE_S).ok
    process.communicate(timeout=PATIENCE_S)


def test_waiting_ends_when_the_time_is_up(folder):
    begin = time.monotonic()
    assert folder.wait_for_answer(folder.submit(PAUSE), 0.2) is None
    assert time.monotonic() - begin >= 0.2


def test_old_answers_are_discarded(folder):
    old, new = folder.submit(PAUSE), folder.submit(PAUSE)
    for request in folder.pending():
        folder.accept(request)
    os.utime(folder.path / f"{old}.done.json", (1e9, 1e9))
    waiting = folder.submit(PAUSE)
    folder.discard_answers(datetime.now().astimezone() - timedelta(days=7))
    assert folder.wait_for_answer(old, 0) is None
    assert answer_at(folder, new).ok
    assert [request.id for request in folder.pending()] == [waiting]


class TestAsking:
    """A verb: the living daemon carries its command out, else the verb itself under the daemon's lock."""

    DAEMON = """
        import sys, time
        from pathlib import Path
        from shared.layout import StudyLayout
        from shared.locks import FileLock
        from shared.requests import RequestFolder
        study = StudyLayout(Path(sys.argv[1]))
        folder = RequestFolder(study, "optimizer")
        with FileLock(study.optimizer_lock):
            print("up", flush=True)
            while not (requests := folder.pending()):
                time.sleep(0.01)
            DO
    """

    @staticmethod
    def never(request):
        raise AssertionError("the daemon lives")

    def daemon(self, folder, do):
        process = start(self.DAEMON.replace("DO", do), folder.study.root)
        assert process.stdout.readline() == "up\n"
        return process

    def test_a_living_daemon_does_it(self, folder):
        process = self.daemon(folder, "folder.accept(requests[0], {'by': 'the daemon'})")
        assert folder.ask(PAUSE, folder.study.optimizer_lock, self.never).result == {"by": "the daemon"}
        process.communicate(timeout=PATIENCE_S)

    def test_without_a_daemon_it_is_done_here_under_its_lock_and_what_others_asked_stays(self, folder):
        other = folder.submit(PAUSE)

        def carry_out(request):
            assert FileLock.is_held(folder.study.optimizer_lock)
            folder.accept(request, {"by": "us"})

        assert folder.ask(PAUSE, folder.study.optimizer_lock, carry_out).result == {"by": "us"}
        assert not FileLock.is_held(folder.study.optimizer_lock)
        assert [request.id for request in folder.pending()] == [other]

    def test_a_daemon_that_dies_over_it_leaves_it_to_us(self, folder):
        process = self.daemon(folder, "os = __import__('os'); os.kill(os.getpid(), 9)")
        answer = folder.ask(PAUSE, folder.study.optimizer_lock, lambda request: folder.accept(request, {"by": "us"}))
        assert answer.result == {"by": "us"}
        process.communicate(timeout=PATIENCE_S)

    def test_a_daemon_that_does_not_answer_is_not_waited_for_and_the_command_is_taken_back(self, folder):
        with (
            FileLock(folder.study.optimizer_lock),
            pytest.raises(ResourceError, match=r"has not answered within 0 s; the command was taken back"),
        ):
            folder.ask(PAUSE, folder.study.optimizer_lock, self.never, timeout_s=0.2)
        assert names(folder) == []

    def test_what_goes_wrong_here_leaves_no_command_behind(self, folder):
        def carry_out(request):
            raise UserError("not like this")

        with pytest.raises(UserError, match="not like this"):
            folder.ask(PAUSE, folder.study.optimizer_lock, carry_out)
        assert names(folder) == []


def test_a_start_makes_the_folder_and_removes_what_nobody_needs_any_longer(folder):
    folder.tidy(datetime.now().astimezone())
    half = folder.path / f".x.json{TEMPORARY_MARK}99999999-1-0123abcd"
    half.write_text("{")
    old, waiting = folder.submit(PAUSE), folder.submit(PAUSE)
    folder.accept(folder.pending()[0])
    os.utime(folder.path / f"{old}.done.json", (1e9, 1e9))
    folder.tidy(datetime.now().astimezone())
    assert [request.id for request in folder.pending()] == [waiting]
    assert len(names(folder)) == 1


def test_a_request_by_hand_is_another_one_when_it_is_written_again(folder):
    path = drop(folder, "pause.json", {"kind": "pause"})
    (first,), (again,) = folder.pending(), folder.pending()
    assert first.identity == again.identity
    os.utime(path, ns=(1, 1))
    assert folder.pending()[0].identity != first.identity

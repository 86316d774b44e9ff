"""What ends no manager, caused for real on real folders; the managers here are given no evaluator."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from benchmarks.evaluation.prepared import add_finished_trial, whole_file
from evaluator_daemon.errands import label_key
from evaluator_daemon.home import Home
from evaluator_daemon.manager import Manager
from evaluator_daemon.restarts import History
from evaluator_daemon.settings import EvaluatorSettings
from shared.errors import ResourceError
from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.requests import RequestFolder
from shared.schemas import EvaluationState, EvaluatorManagerState, Retry, Run
from shared.service import Service
from shared.settings import LoadedSettings
from tests.scenarios.written_study import plan_study

LEFT = ".evaluation_state.json.tmp-99999999-1-0123abcd"
"""The temporary file of a process that is no more."""


@pytest.fixture
def study(tmp_path) -> StudyLayout:
    study = StudyLayout(tmp_path / "study")
    plan_study(study)
    for number in (1, 2):
        add_finished_trial(study, number, read_model(study.run, Run).plan_hash)
    return study


@contextlib.contextmanager
def managing(study: StudyLayout, *, evaluators: int = 0) -> Iterator[Manager]:
    settings = EvaluatorSettings(optimization_dir=study.root, device="cpu")
    loaded = LoadedSettings(settings, dict.fromkeys(EvaluatorSettings.model_fields, "default"))
    with Home(study) as home:
        manager = Manager(
            loaded, study, Service(), home, once=False, exit_when_finished=False, max_evaluators=evaluators
        )
        try:
            yield manager
        finally:
            manager.close()


def add_checkpoint(study: StudyLayout, name: str) -> None:
    (study.trial(2).folder / f"{name}.safetensors").write_bytes(whole_file(b"12345678"))


def waiting(study: StudyLayout) -> int:
    return read_model(study.manager_state, EvaluatorManagerState).waiting_checkpoints


@pytest.fixture
def fill(tmp_path) -> Iterator[Callable[[bool], None]]:
    """Fill a real file system of 2 MiB, disk/, and free it again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a tiny tmpfs needs root and mount")
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a tiny tmpfs cannot be mounted here")
    filler = disk / "filler"

    def fill(full: bool) -> None:
        filler.unlink(missing_ok=True)
        if full:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_said_once_and_what_it_would_not_take_is_written_later(fill, tmp_path, caplog):
    study = StudyLayout(tmp_path / "disk" / "study")
    plan_study(study)
    add_finished_trial(study, 2, read_model(study.run, Run).plan_hash)
    requests = RequestFolder(study, "evaluator")
    fill(True)
    with managing(study) as manager:  # tidying its folder fails already
        fill(False)
        manager.tick()
        asked = requests.submit(Retry(kind="retry", trial_name="trial_0007"))
        add_checkpoint(study, "new")
        fill(True)
        for _ in range(3):
            manager.tick()
        said = [record for record in caplog.records if record.message == "put off until the disk allows it"]
        assert sorted(record.fields["what"].split()[0] for record in said) == ["answer", "evaluator_manager_state.json"]
        assert all("No space left on device" in str(record.fields["why"]) for record in said)
        assert waiting(study) == 0
        fill(False)
        manager.tick()
        assert waiting(study) == 1
        answer = requests.wait_for_answer(asked, 0.0)
        assert answer is not None
        assert "no trial 'trial_0007'" in answer.error
        fill(True)
    assert read_model(study.manager_state, EvaluatorManagerState).status == "running", "nor could the last word be said"


def test_a_folder_that_goes_while_the_manager_moves_in_is_still_gone(study, caplog):
    with Home(study) as home:
        study.root.rename(study.root.parent / "moved")
        assert not home.come_back(is_needed=False)
        study.root.mkdir()
        study.manager_lock.mkdir()  # as good as a folder removed at that moment: the lock cannot be made in it
        assert not home.come_back(is_needed=False)
        assert not home.come_back(is_needed=False)
        assert not home.is_ours()
        gone = [str(r.fields["why"]) for r in caplog.records if r.message == "study folder gone, waiting for it"]
        assert len(gone) == 2
        assert "cannot be opened" in gone[1]
        with pytest.raises(ResourceError, match="cannot be opened"):
            home.come_back(is_needed=True)
        study.manager_lock.rmdir()
        assert home.come_back(is_needed=False)
        assert home.is_ours()


def test_a_folder_that_cannot_be_tidied_is_worked_in(study, caplog):
    study.requests("evaluator").parent.write_bytes(b"no folder")
    (study.root / LEFT).mkdir()
    with managing(study) as manager:
        manager.tick()
    assert [record.fields["folder"] for record in caplog.records if record.message == "not tidied"] == [study.root] * 2
    assert study.manager_state.exists()


def test_what_a_killed_evaluator_left_beside_its_records_is_swept_where_nothing_is_to_do(study):
    label = study.evaluations("mine").folder
    label.mkdir(parents=True)
    folders = [study.trial(1).evaluations.folder, study.trial(2).evaluations.folder, label]
    for folder in folders:
        (folder / LEFT).write_text("{")
    ours = folders[0] / f".evaluation_state.json.tmp-{os.getpid()}-1-0123abcd.mine"
    ours.write_text("{")
    with Home(study):
        assert not [folder for folder in folders if (folder / LEFT).exists()]
    assert ours.exists(), "what no writer of ours would name so stays"


def fail(manager: Manager, name: str) -> None:
    """Note a crash of an evaluator that was there before."""
    manager._evaluators.restarts.ended(name, -11, time.monotonic(), asked_to=False, settled=False, chance=1.0)


def test_a_retry_of_a_label_ends_the_back_off_of_its_evaluator(study):
    label = study.evaluations("mine")
    label.folder.mkdir(parents=True)
    now = read_model(study.run, Run).created
    write_model(label.state, EvaluationState(trial_name="mine", updated=now, checkpoints=()))
    with managing(study) as manager:
        for name in ("trial_0001", label_key("mine")):
            fail(manager, name)
            assert not manager._evaluators.may_start(name)
            RequestFolder(study, "evaluator").submit(Retry(kind="retry", trial_name=name.rpartition("/")[2]))
            manager.tick()
            assert manager._evaluators.may_start(name)


def test_a_new_trial_or_study_of_an_old_name_inherits_no_back_off(study):
    with managing(study) as manager:
        restarts = manager._evaluators.restarts
        manager.tick()
        for name in ("trial_0001", "trial_0002"):
            fail(manager, name)
        study.trial(2).folder.rename(study.root / "old")
        study.trial(2).folder.mkdir()
        manager.tick()
        assert restarts.of("trial_0002") == History()
        assert restarts.of("trial_0001").failures == 1
        study.root.rename(study.root.parent / "old")
        plan_study(study)
        manager.tick()
        assert restarts.of("trial_0001") == History()


def crash_when_asked_to_end(messages: object) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGTERM, lambda *_: os.abort())
    signal.pause()


@pytest.mark.parametrize("gone", ["the trial", "the study"])
def test_how_an_evaluator_in_a_folder_that_is_gone_ends_is_no_strike_for_the_next(study, gone):
    with managing(study) as manager:
        evaluators = manager._evaluators
        evaluators._context.set_forkserver_preload([])  # it renders nothing
        manager.tick()
        evaluators._start("trial_0002", crash_when_asked_to_end)
        time.sleep(0.5)
        if gone == "the trial":
            study.trial(2).folder.rename(study.root / "old")
            study.trial(2).folder.mkdir()
        else:
            study.root.rename(study.root.parent / "old")
            plan_study(study)
        deadline = time.monotonic() + 60
        while evaluators.names:
            assert time.monotonic() < deadline
            manager.tick()
            time.sleep(0.05)
        assert evaluators.restarts.of("trial_0002") == History()

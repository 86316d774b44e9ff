"""Which trials are looked at when, on real folders with a clock of the test's own."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from benchmarks.evaluation.prepared import NOW, add_finished_trial, whole_file, write_documents
from evaluator_daemon.lookout import LOST_EVENTS_GAP_S, Lookout
from shared.files import write_model
from shared.layout import StudyLayout
from shared.locks import FileLock
from shared.schemas import EvaluationState

PLAN = "a" * 64
FULL_S = 300.0
LATER_S = 3600.0
WEIGHTS, FINAL = "lora_trial_2-000002.safetensors", "lora_trial_2.safetensors"


class Post:
    """A lookout over three finished trials; its wall clock runs ahead, so that no stamp is too young."""

    def __init__(self, root: Path) -> None:
        self.study = StudyLayout(root)
        self.now_s = 0.0
        self.ahead_s = LATER_S
        for number in (1, 2, 3):
            add_finished_trial(self.study, number, PLAN)
        self.lookout = Lookout(
            self.study, PLAN, 900.0, full_sweep_s=FULL_S, clock=lambda: self.now_s,
            wall_clock=lambda: time.time() + self.ahead_s,
        )  # fmt: skip

    def sweep(self, in_use: frozenset[str] = frozenset()) -> list[str]:
        """Sweep 30 s later; return who was looked at, those not quiet marked by `!`, those replaced by `~`."""
        self.now_s += 30.0
        looked: list[str] = []
        moved: list[str] = []
        views = self.lookout.sweep(in_use, lambda view: looked.append(view.name), moved.append)
        active = {view.name for view in views}
        return [f"{name}{'!' * (name in active)}" for name in looked] + [f"~{name}" for name in moved]

    def sweep_in_full(self) -> list[str]:
        self.now_s += FULL_S
        return self.sweep()


@pytest.fixture
def post(tmp_path) -> Post:
    post = Post(tmp_path / "study")
    assert post.sweep() == ["trial_0001", "trial_0002", "trial_0003"], "at the start everything is looked at"
    assert post.sweep() == []
    return post


def in_place(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)


@pytest.mark.parametrize(
    ("change", "looks"),
    [
        pytest.param(lambda f: None, [], id="nothing"),
        pytest.param(lambda f: (f / "new.safetensors").write_bytes(b"x"), ["trial_0002!"], id="a new file"),
        pytest.param(lambda f: (f / WEIGHTS).rename(f / "b.safetensors"), ["trial_0002!"], id="a new name"),
        pytest.param(lambda f: (f / WEIGHTS).unlink(), ["trial_0002"], id="a file is deleted"),
        pytest.param(lambda f: (f / WEIGHTS).replace(f / FINAL), ["trial_0002"], id="a file replaced by its like"),
    ],
)
def test_what_changes_a_folder_is_seen_at_the_next_sweep(post, change, looks):
    change(post.study.trial(2).folder)
    assert post.sweep() == looks


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda f: in_place(f / WEIGHTS, b"x" * 200), id="a file grown in place"),
        pytest.param(lambda f: (f / WEIGHTS).touch(), id="a file touched"),
        pytest.param(lambda f: start_again(f), id="a state written in place"),
    ],
)
def test_what_changes_no_folder_is_seen_at_the_next_full_sweep(post, change):
    change(post.study.trial(2).folder)
    assert post.sweep() == []
    assert post.sweep_in_full() == ["trial_0002!"]


def start_again(folder: Path) -> None:
    write_documents(StudyLayout(folder.parent).trial(2), "training")


def test_lost_records_are_seen_at_the_next_sweep(post):
    trial = post.study.trial(2)
    write_model(trial.evaluations.state, EvaluationState(trial_name=trial.name, updated=NOW, checkpoints=()))
    assert post.sweep() == ["trial_0002!"]


def test_a_new_trial_is_seen_at_the_next_sweep_and_one_that_is_gone_is_forgotten(post):
    add_finished_trial(post.study, 4, PLAN)
    shutil.rmtree(post.study.trial(1).folder)
    assert post.sweep() == ["trial_0004", "~trial_0001"]
    assert sorted(post.lookout.names) == ["trial_0002", "trial_0003", "trial_0004"]
    assert post.sweep() == []


def test_a_trial_folder_that_was_replaced_is_told(post):
    trial = post.study.trial(2)
    trial.folder.rename(post.study.root / "kept")
    add_finished_trial(post.study, 2, PLAN)
    assert post.sweep() == ["trial_0002", "~trial_0002"]


def test_a_linked_trial_is_a_trial_and_turning_the_link_is_a_change(post, tmp_path):
    elsewhere = StudyLayout(tmp_path / "disk")
    for number in (7, 8):
        add_finished_trial(elsewhere, number, PLAN)
    link = post.study.root / "trial_0007"
    link.symlink_to(elsewhere.trial(7).folder)
    assert post.sweep() == ["trial_0007"]
    assert post.sweep() == []
    (elsewhere.trial(7).folder / "new.safetensors").write_bytes(b"x")
    assert post.sweep() == ["trial_0007!"]
    link.unlink()
    link.symlink_to(elsewhere.trial(8).folder)
    assert post.sweep()[-1] == "~trial_0007"
    (post.study.root / "trial_dead").symlink_to(tmp_path / "nowhere")
    assert "trial_dead" not in [name.strip("!") for name in post.sweep()]


@pytest.mark.parametrize(("ahead_s", "looks"), [(0.0, 3), (LATER_S, 0)])
def test_a_stamp_as_young_as_the_coarsest_clock_is_not_trusted(tmp_path, ahead_s, looks):
    post = Post(tmp_path / "study")
    post.ahead_s = ahead_s
    post.sweep()
    assert len(post.sweep()) == looks


def test_live_trials_and_those_with_work_are_looked_at_every_time(post):
    live = post.study.trial(4)
    live.folder.mkdir()
    write_documents(live, "training")
    (post.study.trial(2).folder / "new.safetensors").write_bytes(whole_file(b"12345678"))
    with FileLock(post.study.trial(1).trainer_lock):
        expected = ["trial_0001!", "trial_0002!", "trial_0004!"]
        assert [post.sweep(), post.sweep()] == [expected, expected]
    assert post.sweep() == ["trial_0001", "trial_0002!", "trial_0004!"], "no trainer lives in the first any more"
    assert post.sweep(frozenset({"trial_0003"})) == ["trial_0002!", "trial_0003!", "trial_0004!"]


def test_a_trial_of_another_trainer_is_quiet_once_it_is_over(post):
    foreign = post.study.trial(5)
    add_finished_trial(post.study, 5, PLAN)
    foreign.state.unlink()
    post.ahead_s = 0.0
    assert "trial_0005!" in post.sweep()
    post.ahead_s = LATER_S
    assert "trial_0005" in post.sweep()
    assert post.sweep() == []


def test_a_full_sweep_of_many_trials_goes_on_from_sweep_to_sweep(post, monkeypatch):
    monkeypatch.setattr("evaluator_daemon.lookout.COMPARED_AT_ONCE", 1)
    for number in (1, 3):
        trial = post.study.trial(number)
        path = trial.final_checkpoint
        os.truncate(path, path.stat().st_size - 1)  # changes no folder
    assert post.sweep_in_full() == ["trial_0001!"]
    assert post.lookout.is_under_way
    assert post.sweep() == ["trial_0001!"], "what is not quiet is looked at each time"
    assert post.sweep() == ["trial_0001!", "trial_0003!"]
    assert not post.lookout.is_under_way


def test_full_sweeps_that_lost_events_demand_keep_a_distance(post):
    trial = post.study.trial(2)
    (trial.folder / WEIGHTS).touch()
    post.lookout.demand_full_sweep()
    assert post.sweep() == ["trial_0002!"]
    (post.study.trial(3).folder / "lora_trial_3.safetensors").touch()
    post.lookout.demand_full_sweep()
    post.now_s -= 30.0 - LOST_EVENTS_GAP_S / 2
    assert "trial_0003!" not in post.sweep()
    assert "trial_0003!" in post.sweep(), "but it is not forgotten"


def a_lock_that_cannot_be_opened(folder: Path) -> Path:
    (folder / "trainer.lock").unlink(missing_ok=True)
    (folder / "trainer.lock").symlink_to("trainer.lock")
    return folder / "trainer.lock"


def a_state_that_cannot_be_read(folder: Path) -> Path:
    (folder / "trial_state.json").unlink()
    (folder / "trial_state.json").mkdir()
    return folder / "trial_state.json"


def test_a_folder_that_cannot_be_read_is_said_once_passed_over_and_looked_at_again(post, caplog):
    folder = post.study.trial(2).folder
    for spoil in (a_lock_that_cannot_be_opened, a_state_that_cannot_be_read):
        spoiled = spoil(folder)
        (post.study.trial(3).folder / f"{spoil.__name__}.safetensors").write_bytes(b"x")
        assert post.sweep() == ["trial_0003!"], "the other trials are looked at"
        assert post.sweep_in_full() == ["trial_0003!"]
        (line,) = [record for record in caplog.records if record.message == "passed over"]
        assert line.fields["path"] == folder
        assert str(spoiled) in line.fields["why"], "and the new reason is said again"
        caplog.clear()
        if spoil is a_lock_that_cannot_be_opened:
            spoiled.unlink()
    spoiled.rmdir()
    write_documents(post.study.trial(2), "complete")
    assert post.sweep() == ["trial_0002", "trial_0003!"]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(116, "Stale file handle")])
def test_a_failing_disk_or_mount_ends_no_sweep_and_makes_no_trial_gone(post, monkeypatch, error):
    real, failing = os.scandir, {str(post.study.root), str(post.study.trial(2).folder)}

    def scandir(path):
        if str(path) in failing:
            raise error
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # no disk can be had that fails so
    (post.study.trial(3).folder / "new.safetensors").write_bytes(b"x")
    post.sweep_in_full()
    assert sorted(post.lookout.names) == ["trial_0001", "trial_0002", "trial_0003"]
    failing.remove(str(post.study.root))
    assert post.sweep_in_full() == ["trial_0003!"]
    failing.clear()
    assert "trial_0002" in post.sweep_in_full()


def test_an_optimizers_lock_that_cannot_be_opened_ends_no_sweep_and_no_trial(post, caplog):
    live = post.study.trial(4)
    live.folder.mkdir()
    write_documents(live, "training")
    post.study.optimizer_lock.symlink_to(post.study.optimizer_lock.name)
    views = [post.lookout.sweep((), lambda view: None, lambda name: None) for _ in range(2)][1]
    assert [(view.name, view.owner_lives) for view in views] == [("trial_0004", True)]
    (line,) = [record for record in caplog.records if record.message == "passed over"]
    assert "optimizer.lock: the lock file cannot be opened" in line.fields["why"]

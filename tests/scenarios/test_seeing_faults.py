"""Everything that can come between a new file and the manager, caused for real: what is there is seen all the same.

A file replaced while it is evaluated is in test_checkpoint_faults.py. The managers here start no evaluator, except
where one must answer; their full sweeps come every second instead of every five minutes, or never, as each test says.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.evaluation.prepared import add_finished_trial, whole_file, write_documents
from evaluator_daemon import lookout
from evaluator_daemon.home import Home
from evaluator_daemon.manager import Manager
from evaluator_daemon.settings import EvaluatorSettings
from shared.files import read_model
from shared.layout import StudyLayout, TrialLayout
from shared.locks import FileLock
from shared.schemas import EvaluationState, EvaluatorManagerState, Run
from shared.service import Service
from shared.settings import LoadedSettings
from tests.scenarios.lora_files import STANDARD, lora
from tests.scenarios.written_study import make_trial, plan_study

PATIENCE_S = 120.0
NEVER = 100_000.0

Start = Callable[..., subprocess.Popen]


def remove(folder: Path) -> None:
    """Delete a folder that somebody may be writing into."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def study(tmp_path) -> StudyLayout:
    """A study of three finished trials and one in training."""
    study = StudyLayout(tmp_path / "study")
    fill(study)
    return study


def fill(study: StudyLayout) -> None:
    plan_study(study)
    plan_hash = read_model(study.run, Run).plan_hash
    for number in (1, 2, 3):
        add_finished_trial(study, number, plan_hash)
    study.trial(4).folder.mkdir()
    write_documents(study.trial(4), "training")


@pytest.fixture
def start(study) -> Iterator[Start]:
    """Start a manager, with a command before it where wanted, and wait for its first sweep."""
    with contextlib.ExitStack() as held:
        held.enter_context(FileLock(study.optimizer_lock))  # the fourth trial lives

        def begin(*, before: tuple[str, ...] = (), root: Path = study.root, **limits: float) -> subprocess.Popen:
            flags = [text for name, value in limits.items() for text in (f"--{name.replace('_', '-')}", str(value))]
            command = [*before, sys.executable, "-m", "benchmarks.evaluation.manager_alone", str(root), *flags]
            output = held.enter_context((study.root.parent / "manager.out").open("ab"))
            process = subprocess.Popen(command, stdout=output, stderr=output)
            held.callback(process.wait)
            held.callback(process.send_signal, signal.SIGTERM)
            held.callback(process.send_signal, signal.SIGCONT)
            until(StudyLayout(root).manager_state.exists, "the first sweep")
            return process

        yield begin


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def waiting(study: StudyLayout) -> int | None:
    if not study.manager_state.exists():
        return None
    return read_model(study.manager_state, EvaluatorManagerState).waiting_checkpoints


def log(study: StudyLayout) -> str:
    return study.manager_log.read_text()


def change_unnoticed(trial: TrialLayout) -> None:
    """Open a settled file's question again by a change that no folder shows and no watch tells."""
    path = trial.final_checkpoint
    content = whole_file(b"other   ")
    assert len(content) == path.stat().st_size
    with path.open("r+b") as file:
        file.write(content)


def test_with_everything_well_events_alone_tell_of_checkpoint_and_trial(study, start):
    start(check_interval=NEVER, full_sweep=NEVER)
    study.trial(4).intermediate_checkpoint(2).write_bytes(whole_file(b"12345678"))
    until(lambda: waiting(study) == 1, "the new checkpoint")
    (study.root / "trial_0005").mkdir()
    (study.root / "trial_0005" / "w.safetensors").write_bytes(whole_file(b"12345678"))
    until(lambda: waiting(study) == 2, "the new trial's checkpoint, written just after its folder was made")


def test_full_sweeps_come_by_themselves(study, start):
    start(check_interval=0.2, full_sweep=4.0)
    time.sleep(2.5)  # the young stamps have become old, so that only a full sweep looks at finished trials
    change_unnoticed(study.trial(2))
    until(lambda: waiting(study) == 1, "the changed file")


def test_an_overflow_of_the_kernels_queue_leads_to_a_full_sweep(study, start):
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 200_000:
        pytest.skip(f"the kernel's queue takes {limit} events; lower fs.inotify.max_queued_events to run this")
    manager = start(check_interval=0.3, full_sweep=NEVER)
    time.sleep(2.5)
    manager.send_signal(signal.SIGSTOP)
    until(lambda: Path(f"/proc/{manager.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "it is stopped")
    flooded = study.root / "x"
    for _ in range(limit // 2 + 1000):  # made and closed
        os.close(os.open(flooded, os.O_WRONLY | os.O_CREAT))
        flooded.unlink()
    change_unnoticed(study.trial(2))
    manager.send_signal(signal.SIGCONT)
    until(lambda: waiting(study) == 1, "the change made while events were lost")
    assert "events may be lost" in log(study)
    assert "the kernel's queue of events overflowed" in log(study)


def in_own_limits(limit: str, value: int) -> tuple[str, ...]:
    """A command that starts another under inotify limits of its own, so that nobody else on the machine has them.

    Skips where the kernel gives no user namespace.
    """
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare command; util-linux has it")
    script = f'echo {value} > /proc/sys/user/{limit} && exec "$@"'
    command = ("unshare", "--user", "--map-root-user", "sh", "-c", script, "sh")
    trial = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if trial.returncode != 0:
        pytest.skip(f"no user namespace with limits of its own here: {trial.stderr.strip()}")
    return command


@pytest.mark.parametrize("limit", ["max_inotify_watches", "max_inotify_instances"])
def test_used_up_watches_are_said_once_and_sweeps_go_on(study, start, limit):
    start(before=in_own_limits(limit, 0), check_interval=0.3, full_sweep=NEVER)
    study.trial(4).intermediate_checkpoint(2).write_bytes(whole_file(b"12345678"))
    until(lambda: waiting(study) == 1, "the new checkpoint, by the sweep")
    (study.root / "trial_0005").mkdir()
    until(lambda: "trial seen trial=trial_0005" in log(study), "the new trial, by the sweep")
    assert log(study).count("are used up") == 1
    assert f"raise fs.inotify.{limit.replace('inotify', 'user')}" in log(study)


WATCH_LATER = """
import sys, threading, time
from pathlib import Path
from evaluator_daemon.watcher import RETRY_S, Watches
now, woken, limit = [0.0], threading.Event(), Path("/proc/sys/user/max_inotify_watches")
folder = Path(sys.argv[1])
watches = Watches(woken.set, clock=lambda: now[0])
print(watches.keep({folder: ("*",)}), watches.check())
limit.write_text("10")
now[0] = RETRY_S - 1
print(watches.check(), len(watches.blind))
now[0] = RETRY_S
print(watches.check(), len(watches.blind))
(folder / "new").touch()
print(woken.wait(10))
"""


def test_watches_that_were_used_up_are_tried_again_later(tmp_path):
    command = [*in_own_limits("max_inotify_watches", 0), sys.executable, "-c", WATCH_LATER, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == ["False None", "None 1", f"{tmp_path.name} can be watched again 0", "True"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_deleted_and_remade_root_is_taken_over(study, start, at_once):
    start(check_interval=0.3, full_sweep=NEVER)
    remove(study.root)
    if not at_once:
        said = study.root.parent / "manager.out"
        until(lambda: "study folder gone, waiting for it" in said.read_text(), "that it is gone")
    fill(study)
    study.trial(9).folder.mkdir()
    study.trial(9).final_checkpoint.write_bytes(whole_file(b"12345678"))
    until(lambda: waiting(study) == 1, "the checkpoint in the new folder")
    assert FileLock.is_held(study.manager_lock), "a second manager is kept out of the new folder too"
    assert "study folder replaced" in log(study)


def test_the_remade_root_is_watched(study, start):
    start(check_interval=2.0, full_sweep=NEVER)
    remove(study.root)
    fill(study)
    until(lambda: study.manager_state.exists(), "the new folder")
    for number in range(10, 16):  # six sweeps by the clock would take twelve seconds
        name = study.trial(number).name
        study.trial(number).folder.mkdir()
        until(lambda name=name: f"trial seen trial={name}" in log(study), "the new trial")


def test_a_linked_trial_is_seen_and_watched(study, start, tmp_path):
    disk = StudyLayout(tmp_path / "other_disk")
    disk.root.mkdir()
    trial = make_trial(disk, 7, "training")
    start(check_interval=NEVER, full_sweep=NEVER)
    (study.root / trial.name).symlink_to(trial.folder)
    until(lambda: f"trial seen trial={trial.name}" in log(study), "the link")
    trial.intermediate_checkpoint(2).write_bytes(whole_file(b"12345678"))
    until(lambda: waiting(study) == 1, "the checkpoint on the other disk")


@pytest.mark.slow
def test_evaluators_score_a_linked_trial_and_give_way_where_their_trials_folder_was_remade(study, start, tmp_path):
    disk = StudyLayout(tmp_path / "other_disk")
    disk.root.mkdir()
    linked, remade = make_trial(disk, 7, "training"), study.trial(4)
    start(check_interval=2.0, full_sweep=NEVER, evaluators=2)
    (study.root / linked.name).symlink_to(linked.folder)
    for trial in (linked, remade):
        until(lambda name=trial.name: f"evaluator started trial={name}" in log(study), "its evaluator")

    linked.intermediate_checkpoint(2).write_bytes(lora(1, metadata=STANDARD))
    through = study.trial(7)
    until(through.evaluations.state.exists, "its first attempt")
    until(lambda: f"checkpoint recorded trial={linked.name}" in log(study), "the score")
    records = read_model(through.evaluations.state, EvaluationState).checkpoints
    assert [record.status for record in records] == ["recorded"]

    remade.folder.rename(study.root / "old")
    make_trial(study, 4, "training")
    (remade.folder / "half.safetensors").write_bytes(whole_file(bytes(99))[:-1])
    until(lambda: log(study).count(f"evaluator started trial={remade.name}") == 2, "the second evaluator")
    until(lambda: remade.evaluation_log.exists() and "checkpoint=half" in remade.evaluation_log.read_text(), "its look")
    assert FileLock.is_held(remade.evaluations.lock)


def test_a_mount_that_tells_nothing_is_swept(study, start, tmp_path):
    """A FUSE bind mount: what is written on the other side sends no event here."""
    if shutil.which("bindfs") is None or not Path("/dev/fuse").exists():
        pytest.skip("no bindfs command or no /dev/fuse here")
    other_side, mount = tmp_path / "other_side", tmp_path / "mount"
    mount.mkdir()
    study.root.rename(other_side)
    mounted = subprocess.run(["bindfs", other_side, mount], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"bindfs cannot mount here: {mounted.stderr.strip()}")
    there = StudyLayout(other_side)
    try:
        manager = start(root=mount, check_interval=0.3, full_sweep=NEVER)
        there.trial(4).intermediate_checkpoint(2).write_bytes(whole_file(b"12345678"))
        until(lambda: waiting(there) == 1, "the new checkpoint")
        there.trial(5).folder.mkdir()
        there.trial(5).final_checkpoint.write_bytes(whole_file(b"12345678"))
        until(lambda: waiting(there) == 2, "the new trial")
        assert "its file system, fuse, does not tell what others write" in log(there).replace("\\", "")
        threads = len(list(Path(f"/proc/{manager.pid}/task").iterdir()))
        assert threads == 1, "nothing is watched in vain"
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)  # the manager still has it open


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crashed_handler_costs_one_full_sweep_and_no_manager(study, monkeypatch):
    settings = EvaluatorSettings(optimization_dir=study.root, device="cpu")
    loaded = LoadedSettings(settings, dict.fromkeys(EvaluatorSettings.model_fields, "default"))
    service = Service()
    crashes = [True]
    woken: list[str] = []

    def wake() -> None:
        woken.append("wake")
        if crashes[0]:
            raise OSError("the handler crashes")

    monkeypatch.setattr(service, "wake", wake)
    monkeypatch.setattr(lookout, "LOST_EVENTS_GAP_S", 0.1)
    crashes[0] = False
    with Home(study) as home, FileLock(study.optimizer_lock):
        manager = Manager(
            loaded, study, service, home, once=False, exit_when_finished=False, full_sweep_s=NEVER, max_evaluators=0
        )
        try:
            manager.tick()
            assert woken, "what came between the look at the live trial and its watch is looked for"
            time.sleep(2.1)
            woken.clear()
            manager.tick()
            manager.tick()
            assert not woken, "but only once"
            crashes[0] = True
            woken.clear()
            study.trial(4).intermediate_checkpoint(2).write_bytes(b"x")
            until(lambda: woken, "the event")
            crashes[0] = False
            change_unnoticed(study.trial(2))
            until(lambda: manager.tick() or waiting(study) == 1, "the full sweep sees what no event told")
            woken.clear()
            (study.root / "trial_0006").mkdir()
            until(lambda: woken, "the new watch")
        finally:
            manager.close()

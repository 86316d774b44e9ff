"""Trainings that go wrong in every way we know: the real daemon recognises, ends and explains each, and goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import torch
from safetensors.torch import load_file

from shared.bounded_log import KEPT_HEAD_BYTES, MOST_BYTES
from shared.errors import ResourceError
from shared.files import read_model
from shared.gpu_lease import GpuLease
from shared.layout import TrialLayout
from shared.locks import FileLock
from shared.process import boot_id
from shared.schemas import TERMINAL_STATES, TrainerExit, TrialState
from shared.supervised import start_supervised
from tests.scenarios.invariants import violations
from tests.scenarios.lab import Daemon, Lab, wait_until

HERE = Path(__file__).resolve().parent
CLOCK = 40  # the daemon's 10 minutes of patience pass in 15 s

FAULTS = {
    1: ("crash_at_start", r"the training crashed with ModuleNotFoundError: No module named 'lycoris' \(exit status "
        r"1\); mend what the traceback in its log names; it ended before its first step; last lines of "
        r".*trial_0001/training\.log: Traceback .*\| ModuleNotFoundError: No module named 'lycoris'"),
    2: ("crash_in_epoch_2", r"the training crashed with RuntimeError: expected scalar type Half but found Float "
        r"\(exit status 1\); .*; it ended at step 8/12 of epoch 2; last lines .*8/12 \[.*\| RuntimeError: expected"),
    3: ("segfault", r"the training crashed with SIGSEGV, a fault of a library or driver; update torch .*; it ended at "
        r"step 3/12 of epoch 1; .*3/12 \["),
    4: ("not_installed", r"exit status 127: 'no-such-trainer' cannot be started: command not found; install the "
        r"program, or correct --trainer or its paths; it ended before its first step; .*supervise: 'no-such-trainer'"),
    5: ("nan_and_goes_on", r"diverged: the loss it shows is nan since step \d+, for \d+ steps now; .*lower the "
        r"learning rates, or train with mixed_precision bf16 or no; it ended at step \d+/12 of "
        r"epoch \d+; .*avr_loss=nan"),
    6: ("hangs_and_ignores_sigterm", r"hung: no progress line for 600 s; see whether the GPU, .*; it did not heed "
        r"SIGTERM and was killed; it ended at step 4/12 of epoch 1; .*: .*waiting for the GPU \| waiting for the GPU$"),
    7: ("floods_the_log", r"the training crashed with ValueError: too much to say \(exit status 1\); .*; it ended "
        r"before its first step; .*\| the last but one line \| Traceback .*\| ValueError: too much to say$"),
    8: ("saves_no_final_checkpoint", r"missing checkpoint: the training ended with exit status 0 but left no whole "
        r"lora_trial_8\.safetensors; make it save its last epoch under that name; it ended at step 12/12 .*12/12 \["),
    9: ("saves_half_a_final_checkpoint", r"missing checkpoint: .* no whole lora_trial_9\.safetensors; make it save"),
    10: ("gpu_memory", r"out of memory on the GPU: lower batch_size in the data-set TOML, set gradient_checkpointing = "
         r"true, use a smaller network_dim, or pass --gpu-policy defer; it ended at step 1/12 of epoch 1; .*2\.00 GiB"),
    11: ("host_memory", r"out of memory on the host: lower batch_size .*, or close other programs; it ended before its "
         r"first step; .*\| MemoryError$"),
    12: ("is_killed", r"killed too often: 4 attempts were ended from outside, the last by signal 9; look for who does "
         r"it, dmesg names the kernel's own kills; it ended at step 2/12 of epoch 1; .*2/12 \["),
    13: ("full_disk", r"the disk is full: OSError: \[Errno 28\] No space left on device: 'lora\.safetensors'; free "
         r"space, then start the study again; it ended at step 6/12 of epoch 2; "),
}  # fmt: skip
LEFT_CHILDREN, GOOD = 14, 15


def daemon(lab: Lab, *flags: object, clock: float = 1, failpoints: str = "", **env: str) -> Daemon:
    """Start the optimizer daemon with a quick evaluator."""
    command = [sys.executable, str(HERE / "fault_daemon.py"), "--config", str(lab.study_file), *map(str, flags)]
    environment = lab.environment(failpoints, {"FAULT_CLOCK": str(clock), **env})
    return Daemon("optimizer", command, environment, lab.folder / "optimizer.out")


def state_of(lab: Lab, number: int) -> TrialState:
    return read_model(lab.study.trial(number).state, TrialState)


def is_over(lab: Lab, number: int) -> bool:
    return lab.study.trial(number).state.exists() and state_of(lab, number).state in TERMINAL_STATES


def told(lab: Lab) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="lora_study", storage=f"sqlite:///{lab.study.database}").trials


FAULTY = 'trainer = "faulty_trainer:TRAINER"'


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, str]]:
    """One study in which trial after trial goes wrong, until two are good; what its daemon said."""
    faults = {number: name for number, (name, _) in FAULTS.items()} | {LEFT_CHILDREN: "leaves_children"}
    with Lab(tmp_path_factory.mktemp("faults"), optimizer=FAULTY) as lab:
        running = daemon(lab, "--n-trials", 2, clock=CLOCK, FAULTS=json.dumps(faults))
        assert running.wait(200) == 0, running.said
        yield lab, running.said


@pytest.mark.parametrize("number", FAULTS, ids=[name.replace("_", " ") for name, _ in FAULTS.values()])
def test_a_fault_ends_its_trial_with_cause_remedy_and_last_lines(ran: tuple[Lab, str], number: int):
    lab, _ = ran
    state = state_of(lab, number)
    assert state.state == "failed"
    assert state.reason is not None and re.match(FAULTS[number][1], state.reason), state.reason
    assert len(state.reason) < 20 * 310 + 1000
    trial = told(lab)[number - 1]
    assert (trial.state.name, trial.user_attrs["reason"]) == ("FAIL", state.reason)
    assert state.attempt == (4 if FAULTS[number][0] == "is_killed" else 1)


def test_the_study_goes_on_counts_no_failure_and_leaves_nothing_behind(ran: tuple[Lab, str]):
    lab, said = ran
    assert len(lab.study.list_trials()) == GOOD
    assert [state_of(lab, number).state for number in (LEFT_CHILDREN, GOOD)] == ["complete"] * 2
    assert "2 of 2 trials are finished." in said
    assert lab.processes() == {}
    # The quick evaluator renders one picture and no verdict on trial 9's half file; the trainers' tracebacks are meant.
    expected = re.compile("has the pictures|the summary lists|lora_trial_9: is unfit|a log holds a traceback")
    assert [line for line in violations(lab.study, finished=2) if not expected.search(line)] == []


def test_a_training_that_diverges_is_stopped_within_some_twenty_steps(ran: tuple[Lab, str]):
    reason = state_of(ran[0], 5).reason or ""
    found = re.search(r"nan since step 1, for (\d+) steps now", reason)
    assert found and 20 <= int(found[1]) < 200, reason


def test_what_a_hung_training_forked_is_ended_with_it(ran: tuple[Lab, str]):
    trial = ran[0].study.trial(6)
    assert not Path(f"/proc/{(trial.tensorboard / 'child').read_text()}").exists()
    assert read_model(trial.trainer_exit, TrainerExit).signal == signal.SIGKILL


def test_a_flood_leaves_the_log_s_ends_on_disk_and_the_daemon_s_memory_alone(ran: tuple[Lab, str]):
    lab, said = ran
    log = lab.study.trial(7).training_log
    status = log.stat()
    assert status.st_size > 290_000_000
    assert status.st_blocks * 512 <= MOST_BYTES
    with log.open("rb") as file:
        assert b"\0" not in file.read(KEPT_HEAD_BYTES)
        file.seek(-1_000_000, os.SEEK_END)
        assert b"\0" not in file.read()
    peak = re.search(r"VmHWM:\s*(\d+) kB", said)
    assert peak and int(peak[1]) < 250 * 1024, "one copy of the flood would take 300 MB more"


def test_the_exit_record_helps_to_find_the_cause(ran: tuple[Lab, str]):
    record = read_model(ran[0].study.trial(2).trainer_exit, TrainerExit)
    assert (record.exit_status, record.oom_kills, record.evaluators_on, record.boot_id) == (1, 0, (), boot_id())
    assert record.start_ticks
    assert record.peak_memory is not None and 5 * 2**20 < record.peak_memory < 2**30


def test_gpu_memory_that_an_evaluator_held_too_is_excused_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    gate = tmp_path / "go on"
    gate.touch()
    evaluator = GpuLease("GPU-8f2c6a31", "evaluator").acquire()
    faults = json.dumps({1: "gpu_memory"})
    (tmp_path / "lab").mkdir()
    with Lab(tmp_path / "lab", optimizer=FAULTY) as lab:
        running = daemon(lab, "--n-trials", 1, FAULTS=faults, FAULT_GATE=str(gate))
        trial = lab.study.trial(1)
        wait_until(lambda: trial.state.exists() and state_of(lab, 1).state == "interrupted")
        state = state_of(lab, 1)
        assert state.ran_short_of == ("GPU-8f2c6a31",)
        assert state.reason == (
            "out of memory on GPU GPU-8f2c6a31, where an evaluator was at work; trained again with it alone"
        )
        gate.unlink()
        assert state_of(lab, 1).state == "interrupted", "it waits for the evaluator"
        assert running.exit_status is None
        running.kill()  # the excuse is durable
        running = daemon(lab, "--n-trials", 1, FAULTS=faults, FAULT_GATE=str(gate))
        evaluator.release()
        starts = trial.tensorboard
        wait_until(lambda: (trial.attempt(1) / "logs").exists() and list(starts.glob("start-*")), what=running.said)
        with pytest.raises(ResourceError, match="GPU-8f2c6a31 is in use"):
            GpuLease("GPU-8f2c6a31", "evaluator").acquire()
        gate.touch()
        assert running.wait() == 0, running.said
        state = state_of(lab, 1)
        assert (state.state, state.attempt) == ("failed", 1)
        assert (state.reason or "").startswith("out of memory on the GPU: lower batch_size")
        assert [trial.state.name for trial in told(lab)] == ["FAIL", "COMPLETE"]
        GpuLease("GPU-8f2c6a31", "evaluator").acquire().release()


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A control group with 64 MiB; only root can make one."""
    folder = Path("/sys/fs/cgroup/memory" if Path("/sys/fs/cgroup/memory").exists() else "/sys/fs/cgroup")
    group = folder / f"lora-tuner-test-{os.getpid()}"
    limit = "memory.limit_in_bytes" if folder.name == "memory" else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(64 << 20))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group of our own ({error.strerror})")
    yield group
    group.rmdir()


def test_the_kernel_s_memory_killer_is_told_from_a_kill_by_hand(small_cgroup: Path, tmp_path: Path):
    trial = TrialLayout(tmp_path)
    grow = "import sys; rows = []\nwhile True: rows.append(bytearray(1 << 20))"
    script = f'echo $$ > {small_cgroup}/cgroup.procs; exec "$0" -S -c "$1"'
    trainer = start_supervised(["sh", "-c", script, sys.executable, grow], directory=trial.folder)
    assert trainer.wait(60)
    record = read_model(trial.trainer_exit, TrainerExit)
    assert (record.signal, record.exit_status) == (signal.SIGKILL, None)
    assert record.oom_kills is not None and record.oom_kills >= 1
    assert record.peak_memory is not None and record.peak_memory > 32 << 20


# ------------------------------------------------------------------------------------------------ the native trainer


SPACE_OF_ONE = """
name = "one"
[parameters.learning_rate]
type = "categorical"
choices = [{rate}]
[parameters.network_dim]
type = "categorical"
choices = [4]
[parameters.optimizer_type]
type = "categorical"
choices = ["AdamW"]
[parameters.max_train_epochs]
type = "categorical"
choices = [{epochs}]
"""


def test_the_native_trainer_ends_a_training_whose_loss_is_no_number(tmp_path: Path):
    space = SPACE_OF_ONE.format(rate="1e36", epochs=4)
    with Lab(tmp_path, space=space) as lab:
        running = daemon(lab, "--save-every-n-epochs", 9)
        wait_until(lambda: is_over(lab, 1), 240, "trial 1 is not over")
        running.kill()
        state = state_of(lab, 1)
        assert state.state == "failed"
        # The daemon counts along, and comes first where the training's last steps are quick.
        itself = r"the loss was nan for 20 steps in a row, last at step 2\d of epoch 4"
        assert re.match(
            rf"({itself}|diverged: .*nan.*); lower the learning rates, or train with mixed_precision bf16 or no; it ",
            state.reason or "",
        ), state.reason
        assert lab.study.trial(1).list_checkpoints() == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The final weights of a training that nobody disturbed."""
    with Lab(tmp_path_factory.mktemp("whole"), space=SPACE_OF_ONE.format(rate="1e-3", epochs=2)) as lab:
        running = daemon(lab, "--n-trials", 1)
        assert running.wait() == 0, running.said
        return load_file(lab.study.trial(1).final_checkpoint)


def assert_undisturbed(lab: Lab, whole: dict[str, torch.Tensor]) -> None:
    trial = lab.study.trial(1)
    found = load_file(trial.final_checkpoint)
    assert found.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(found[name], whole[name])] == []
    assert [path.name for path in trial.list_checkpoints()] == [
        "lora_trial_1-000001.safetensors",
        "lora_trial_1.safetensors",
    ]
    assert not trial.training_state.exists()
    assert list(trial.folder.glob(".*.tmp-*")) == []
    assert state_of(lab, 1).state == "complete"


KILLS = [
    ("after a step of epoch 2, it resumes", "trainer.step=kill@8", (1, 1)),
    ("after the final checkpoint's own save, nothing is trained again", "trainer.checkpoint_saved=kill@2", (1, 0)),
    ("after a saved state, it resumes", "trainer.state_saved=kill@1", (1, 1)),
    ("before the state is removed, nothing is trained again", "trainer.finished=kill@1", (1, 0)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("failpoint", "expected"), [pytest.param(*row[1:], id=row[0]) for row in KILLS])
def test_a_training_killed_anywhere_ends_with_the_same_weights(tmp_path: Path, whole, failpoint: str, expected):
    with Lab(tmp_path, space=SPACE_OF_ONE.format(rate="1e-3", epochs=2)) as lab:
        running = daemon(lab, "--n-trials", 1, failpoints=failpoint)
        assert running.wait() == 0, running.said
        assert_undisturbed(lab, whole)
        state = state_of(lab, 1)
        assert (state.attempt, state.resumes) == expected
        assert lab.processes() == {}


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", ["trainer.step=kill@3", "trainer.checkpoint_saved=kill@1"],
                         ids=["in epoch 1", "between the first checkpoint and its state"])  # fmt: skip
def test_a_training_killed_before_anything_was_saved_is_redone(tmp_path: Path, whole, failpoint: str):
    with Lab(tmp_path, space=SPACE_OF_ONE.format(rate="1e-3", epochs=2)) as lab:
        running = daemon(lab, "--n-trials", 1, failpoints=failpoint)
        trial = lab.study.trial(1)
        wait_until((trial.attempt(1) / "trainer_exit.json").exists, what=running.said)
        running.kill()
        lab.kill_everything()
        running = daemon(lab, "--n-trials", 1)
        assert running.wait() == 0, running.said
        assert_undisturbed(lab, whole)
        assert state_of(lab, 1).attempt >= 2
        assert (trial.attempt(1) / "training.log").exists()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["step", "checkpoint_saved", "state_saved", "finished"])
def test_a_killed_supervisor_changes_nothing(tmp_path: Path, whole, place: str):
    gate = tmp_path / "go on"
    (tmp_path / "lab").mkdir()
    with Lab(tmp_path / "lab", space=SPACE_OF_ONE.format(rate="1e-3", epochs=2)) as lab:
        running = daemon(lab, "--n-trials", 1, failpoints=f"trainer.{place}=wait:{gate}")
        trial = lab.study.trial(1)
        wait_until(lambda: trial.training_log.exists() and "running training" in trial.training_log.read_text())
        supervisor = FileLock.signed_pid(trial.trainer_lock)
        assert supervisor is not None
        os.kill(supervisor, signal.SIGKILL)
        gate.touch()
        assert running.wait() == 0, running.said
        assert_undisturbed(lab, whole)
        assert not trial.trainer_exit.exists()
        assert (state_of(lab, 1).attempt, state_of(lab, 1).resumes) == (1, 0)

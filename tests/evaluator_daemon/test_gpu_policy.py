"""When a checkpoint may be rendered: the decisions as tables, the locks for real, the card's memory as told."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.evaluation.prepared import write_documents
from evaluator_daemon import gpu
from evaluator_daemon.gpu import DeviceGate, weight_bytes
from evaluator_daemon.gpu_policy import (
    DeviceMemory,
    lacks_memory,
    needed_bytes,
    pause_s,
    picture_bytes,
    policy_of,
    training_in_the_way,
)
from evaluator_daemon.job import Job
from shared.errors import DeviceBusyError, ResourceError
from shared.files import write_model
from shared.gpu_lease import GpuLease
from shared.layout import StudyLayout
from shared.locks import FileLock
from shared.planning import make_plan
from shared.schemas import PromptOptions, Run, Trainer

GIB = 2**30
TIME = datetime(2025, 11, 15, 10, 23, 45, tzinfo=UTC)


def run_of(base_model: Path, **settings) -> Run:
    plan = make_plan(base_model=base_model, prompts=["a"], device="cpu", num_samples=2)
    return Run(
        folder_id="f", study_name="s", storage="sqlite://", workload="sd-lora", score_source="evaluator",
        status="running", created=TIME, updated=TIME, base_model=str(base_model), plan=plan, plan_hash=plan.digest(),
        trainer=Trainer(name="native"), settings=settings, threads_per_process=1, versions={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("memory", "needed", "verdict"),
    [
        pytest.param(DeviceMemory(6, 0, 24), 5, None, id="enough is free"),
        pytest.param(DeviceMemory(2, 4, 24), 5, None, id="with what we have ourselves"),
        pytest.param(DeviceMemory(4, 0, 24), 5, "4.0 GiB of its memory are free, about 5.0 GiB are needed",
                     id="others have it"),
        pytest.param(DeviceMemory(23, 0, 24), 30, None, id="nobody else is there: only the attempt tells"),
        pytest.param(DeviceMemory(3, 2, 24), 30, "5.0 GiB of its memory are free, about 30.0 GiB are needed",
                     id="more than the card has, and others there"),
    ],
)  # fmt: skip
def test_the_memory_gate(memory, needed, verdict):
    in_gib = DeviceMemory(memory.free * GIB, memory.ours * GIB, memory.total * GIB)
    assert lacks_memory(in_gib, needed * GIB) == verdict


@pytest.mark.parametrize(
    ("peak", "ran_out_with", "needed"),
    [
        pytest.param(None, None, 330, id="an estimate: weights and pictures"),
        pytest.param(150, None, 165, id="the latest checkpoint's peak"),
        pytest.param(150, 400, 440, id="more than what was too little"),
    ],
)
def test_what_is_needed(peak, ran_out_with, needed):
    assert needed_bytes(100, 200, peak, ran_out_with) == needed


def test_pauses_grow_to_five_minutes():
    assert [pause_s(n) for n in (0, 1, 2, 5, 6, 7, 10_000)] == [5, 10, 20, 160, 300, 300, 300]


def test_the_estimate_follows_the_largest_batch(base_model):
    plan = make_plan(base_model=base_model, prompts=["a", "b"], device="cuda", num_samples=8)
    one = plan.model_copy(update={"batch_size": 1})
    wide = plan.model_copy(update={"overrides": (PromptOptions(width=160), PromptOptions())})
    assert picture_bytes(one) < picture_bytes(plan) < picture_bytes(wide)
    sd15 = plan.model_copy(update={"width": 512, "height": 512})
    assert 2 * GIB < picture_bytes(sd15) < 4 * GIB, "what eight pictures of Stable Diffusion 1.5 take in fp16"


def test_weights_are_counted_in_the_plans_number_format(base_model):
    full, half = weight_bytes(base_model, "float32"), weight_bytes(base_model, "float16")
    on_disk = sum(file.stat().st_size for file in base_model.rglob("*.safetensors"))
    assert full == 2 * half
    assert 0.8 * on_disk < full <= on_disk


def test_the_policy_is_the_studys_as_it_is_now_else_the_flags(tmp_path, base_model):
    study = StudyLayout(tmp_path)
    assert policy_of(study, None) == "share"
    assert policy_of(study, "defer") == "defer"
    for policy in ("defer", "share"):
        write_model(study.run, run_of(base_model, **{"gpu-policy": policy}))
        assert policy_of(study, None) == policy
    write_model(study.run, run_of(base_model))
    assert policy_of(study, "defer") == "defer", "a run.json from before the setting"


def test_any_living_trainer_of_the_study_is_in_the_way_under_defer_alone(tmp_path):
    study = StudyLayout(tmp_path)
    for number in (1, 2):
        study.trial(number).folder.mkdir()
    assert training_in_the_way(study, "defer") is None
    with FileLock(study.trial(2).trainer_lock):
        assert training_in_the_way(study, "defer") == "trial_0002"
        assert training_in_the_way(study, "share") is None
    assert training_in_the_way(study, "defer") is None


@pytest.fixture
def probed(monkeypatch) -> list[str]:
    """The trials whose lock was probed."""
    names: list[str] = []
    real = FileLock.is_held

    def is_held(path: Path) -> bool:
        names.append(path.parent.name)
        return real(path)

    monkeypatch.setattr(FileLock, "is_held", is_held)
    return names


def test_trials_that_are_over_are_not_probed_again_before_their_state_changes(tmp_path, probed):
    study = StudyLayout(tmp_path)
    one, two, three = (study.trial(number) for number in (1, 2, 3))
    for trial, state in ((one, "complete"), (two, "complete"), (three, "training")):
        trial.folder.mkdir()
        write_documents(trial, state)

    def look() -> tuple[str | None, list[str]]:
        probed.clear()
        return training_in_the_way(study, "defer"), probed

    with FileLock(one.trainer_lock):
        assert look() == ("trial_0001", ["trial_0003", "trial_0002", "trial_0001"]), "over, and its trainer still lives"
        assert look() == ("trial_0001", ["trial_0001"]), "the last one first"
    assert look() == (None, ["trial_0001", "trial_0003"])
    assert look() == (None, ["trial_0003"])
    write_documents(two, "training")
    with FileLock(two.trainer_lock):
        assert look() == ("trial_0002", ["trial_0003", "trial_0002"]), "it was started again"
    two.folder.rename(tmp_path / "elsewhere")
    three.trainer_lock.symlink_to("trainer.lock")
    assert look() == (None, ["trial_0002", "trial_0003"]), "one that cannot be opened is nobody's we know of"


# ------------------------------------------------------------------------------- the gate, on a card that is only told


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card whose driver's answers are in this list: (free, ours, total) in GiB."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    answer = [DeviceMemory(20 * GIB, 0, 24 * GIB)]
    monkeypatch.setattr(gpu, "gpu_uuid", lambda device: "GPU-1")
    monkeypatch.setattr(gpu, "device_memory", lambda device: answer[0])
    monkeypatch.setattr(gpu, "_forget_peak", lambda device: None)
    monkeypatch.setattr(gpu, "_peak", lambda device: 7 * GIB)
    monkeypatch.setattr(gpu, "LEASE_PATIENCE_S", 2.0)
    return answer


def gate_of(base_model: Path, tmp_path: Path) -> tuple[DeviceGate, list[str]]:
    plan = make_plan(base_model=base_model, prompts=["a"], device="cuda", num_samples=2)
    called: list[str] = []
    job = Job(tmp_path, plan, base_model, None, "cuda", 1, 1.0, 1.0)
    return DeviceGate(job, lambda: called.append("given back"), lambda: called.append("asked")), called


def test_a_turn_holds_the_lease_against_other_evaluators(card, base_model, tmp_path):
    gate, _ = gate_of(base_model, tmp_path)
    gate.enter()
    with pytest.raises(DeviceBusyError):
        GpuLease("GPU-1", "evaluator").acquire()
    GpuLease("GPU-1", "sharing trainer").acquire().release()
    gate.leave()
    with GpuLease("GPU-1", "evaluator"):
        other, called = gate_of(base_model, tmp_path)
        with pytest.raises(DeviceBusyError, match="GPU GPU-1 is in use by pid"):
            other.enter()
        assert called == ["given back", "asked"], "the model does not lie in the others' way meanwhile"
    gate.enter()
    gate.leave()


def test_too_little_memory_ends_the_turn_before_it_begins(card, base_model, tmp_path):
    gate, _ = gate_of(base_model, tmp_path)
    gate.note_success()  # 7 GiB, so 7.7 GiB are needed
    card[0] = DeviceMemory(5 * GIB, 2 * GIB, 24 * GIB)
    with pytest.raises(DeviceBusyError, match=r"cuda: 7\.0 GiB of its memory are free, about 7\.7 GiB are needed"):
        gate.enter()
    GpuLease("GPU-1", "evaluator").acquire().release()
    card[0] = DeviceMemory(6 * GIB, 2 * GIB, 24 * GIB)
    gate.enter()
    gate.leave()


def test_after_memory_ran_out_more_than_that_must_be_free(card, base_model, tmp_path):
    gate, _ = gate_of(base_model, tmp_path)
    card[0] = DeviceMemory(8 * GIB, 0, 24 * GIB)
    error = gate.after_running_out("too little for 1 picture")
    assert isinstance(error, DeviceBusyError)
    assert str(error) == "too little for 1 picture; others have 16.0 GiB of it"
    with pytest.raises(DeviceBusyError, match=r"8\.0 GiB of its memory are free, about 8\.8 GiB"):
        gate.enter()
    card[0] = DeviceMemory(math.ceil(8.9 * GIB), 0, 24 * GIB)
    gate.enter()
    gate.leave()


def test_a_card_that_is_too_small_when_it_is_empty_is_no_matter_of_waiting(card, base_model, tmp_path):
    gate, _ = gate_of(base_model, tmp_path)
    card[0] = DeviceMemory(23 * GIB, 0, 24 * GIB)
    error = gate.after_running_out("too little for 1 picture; use a smaller --num-samples")
    assert type(error) is ResourceError
    assert str(error) == "too little for 1 picture; use a smaller --num-samples"


def test_on_a_cpu_only_the_policy_counts(base_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    plan = make_plan(base_model=base_model, prompts=["a"], device="cpu", num_samples=2)
    study = StudyLayout(tmp_path / "study")
    study.trial(1).folder.mkdir(parents=True)
    job = Job(study.root, plan, base_model, None, "cpu", 1, 1.0, 1.0, "defer")
    gate = DeviceGate(job, lambda: None, lambda: None)
    gate.enter()
    gate.leave()
    with (
        FileLock(study.trial(1).trainer_lock),
        pytest.raises(DeviceBusyError, match="--gpu-policy defer: trial_0001 is training"),
    ):
        gate.enter()

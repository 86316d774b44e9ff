"""When a checkpoint may be rendered: the decisions as tables, the locks for real, the card's memory as told."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from benchmarks.evaluation.prepared import write_documents
from evaluator_daemon import gpu
from evaluator_daemon.gpu import DeviceGate, loaded_bytes, weight_bytes
from evaluator_daemon.gpu_policy import (
    QUEUE_PAUSE_S,
    REFUSALS_BEFORE_A_TRY,
    DeviceMemory,
    Repeated,
    is_too_small,
    lacks_memory,
    needed_bytes,
    pause_s,
    picture_bytes,
    policy_of,
    training_in_the_way,
)
from evaluator_daemon.job import Job
from evaluator_daemon.renderers.base import is_out_of_memory
from evaluator_daemon.resident import ResidentModel
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
        pytest.param(DeviceMemory(5.2, 0, 6), 6.17, None, id="SD 1.5, eight pictures, beside a desktop on 6 GiB"),
        pytest.param(DeviceMemory(14, 0, 16), 20.5, None, id="SDXL beside a desktop on 16 GiB"),
        pytest.param(DeviceMemory(10, 0, 16), 20.5, "10.0 GiB of its memory are free, about 12.8 GiB are needed",
                     id="SDXL beside a training on 16 GiB"),
        pytest.param(DeviceMemory(6, 0, 24), 5, None, id="enough is free"),
        pytest.param(DeviceMemory(2, 4, 24), 5, None, id="with what we have ourselves"),
        pytest.param(DeviceMemory(4, 0, 24), 5, "4.0 GiB of its memory are free, about 5.0 GiB are needed",
                     id="others have it"),
        pytest.param(DeviceMemory(23, 0, 24), 30, None, id="nobody else is there: only the attempt tells"),
        pytest.param(DeviceMemory(3, 2, 24), 30, "5.0 GiB of its memory are free, about 19.2 GiB are needed",
                     id="more than the card has, and others there"),
    ],
)  # fmt: skip
def test_the_memory_gate(memory, needed, verdict):
    in_gib = DeviceMemory(int(memory.free * GIB), memory.ours * GIB, memory.total * GIB)
    assert lacks_memory(in_gib, int(needed * GIB)) == verdict


@pytest.mark.parametrize(
    ("ran_out_with", "refusals", "weights", "is_tried"),
    [
        pytest.param(None, REFUSALS_BEFORE_A_TRY - 1, 3, False, id="it waits"),
        pytest.param(None, REFUSALS_BEFORE_A_TRY, 3, True, id="nothing changed for long"),
        pytest.param(None, REFUSALS_BEFORE_A_TRY, 7, False, id="not even the weights have room"),
        pytest.param(6, 0, 3, False, id="as much as it ran out with"),
        pytest.param(6, REFUSALS_BEFORE_A_TRY, 3, True, id="that expires, too"),
        pytest.param(5, 0, 3, False, id="more than it ran out with, less than is needed"),
    ],
)
def test_nobody_waits_for_ever_for_memory_that_an_estimate_wants(ran_out_with, refusals, weights, is_tried):
    why = lacks_memory(DeviceMemory(6, 0, 24), 8, weights=weights, ran_out_with=ran_out_with, refusals=refusals)
    assert (why is None) is is_tried


@pytest.mark.parametrize(
    ("available", "count", "verdict"),
    [
        pytest.param(23, 1, True, id="to ourselves"),
        pytest.param(20, 2, False, id="others have little: perhaps they go"),
        pytest.param(20, 3, True, id="they do not"),
        pytest.param(12, 99, False, id="others have much"),
    ],
)
def test_when_a_card_is_too_small(available, count, verdict):
    assert is_too_small(DeviceMemory(available, 0, 24), Repeated(count, available)) is verdict


def test_what_is_repeated_begins_anew_where_others_have_another_share():
    seen = Repeated()
    for available in (1000, 1010, 990):
        seen = seen.once_more(DeviceMemory(available, 0, 1000))
    assert (seen.count, seen.available) == (3, 1000), "a little more or less is the same"
    assert seen.still(DeviceMemory(900, 0, 1000)) == 0
    assert seen.once_more(DeviceMemory(900, 0, 1000)) == Repeated(1, 900)


@pytest.mark.parametrize(
    ("peak", "needed"),
    [
        pytest.param(None, 330, id="an estimate: weights and pictures"),
        pytest.param(150, 165, id="the latest checkpoint's peak"),
    ],
)
def test_what_is_needed(peak, needed):
    assert needed_bytes(100, 200, peak) == needed


def test_pauses_grow_to_a_quarter_of_a_minute():
    assert [pause_s(n) for n in (0, 1, 2, 5, 10_000)] == [5, 10, 15, 15, 15]


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (MemoryError(), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_every_library_says_in_its_own_way_that_memory_ran_out(error, verdict):
    assert is_out_of_memory(error) is verdict


def test_the_estimate_follows_the_largest_batch(base_model):
    plan = make_plan(base_model=base_model, prompts=["a", "b"], device="cuda", num_samples=8)
    one = plan.model_copy(update={"batch_size": 1})
    wide = plan.model_copy(update={"overrides": (PromptOptions(width=160), PromptOptions())})
    assert picture_bytes(one) < picture_bytes(plan) < picture_bytes(wide)
    sd15 = plan.model_copy(update={"width": 512, "height": 512})
    assert 2 * GIB < picture_bytes(sd15) < 4 * GIB, "what eight pictures of Stable Diffusion 1.5 take in fp16"


def job_of(base_model: Path, root: Path, **options) -> Job:
    plan = make_plan(base_model=base_model, prompts=["a"], device="cuda", num_samples=2)
    return Job(root, plan, base_model, None, "cuda", 1, 1.0, 1.0, **options)


def test_weights_are_counted_in_the_plans_number_format(base_model, tmp_path):
    full, half = weight_bytes(base_model / "unet", "float32"), weight_bytes(base_model / "unet", "float16")
    assert full == 2 * half > 0
    on_disk = sum(file.stat().st_size for file in base_model.rglob("*.safetensors"))
    assert 0.8 * on_disk < 2 * loaded_bytes(job_of(base_model, tmp_path)) <= on_disk


def test_only_what_is_loaded_counts(base_model, clip_model, dino_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = loaded_bytes(job_of(folder, tmp_path))
    for twin in (
        folder / "v1-5-pruned.safetensors",
        folder / "safety_checker" / "model.safetensors",
        unet.with_name("diffusion_pytorch_model.fp16.safetensors"),
        unet.with_name("diffusion_pytorch_model.non_ema.safetensors"),
        unet.with_name("diffusion_pytorch_model.bin"),
    ):
        twin.parent.mkdir(exist_ok=True)
        shutil.copy(unet, twin)
    assert loaded_bytes(job_of(folder, tmp_path)) == before
    unet.rename(unet.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))
    assert loaded_bytes(job_of(folder, tmp_path)) == before, "shards"
    job = replace(job_of(folder, tmp_path), clip_model=clip_model, dino_model=dino_model)
    assert loaded_bytes(job) == before + weight_bytes(clip_model, "float32"), "no metric asks for the DINOv2"


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
    called: list[str] = []
    job = job_of(base_model, tmp_path)
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
        assert set(called) == {"asked"}, "a short turn of another one is no reason to load the model anew"
        assert other.queues
    other.enter()
    other.leave()
    assert not other.queues
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


def test_a_card_on_which_nothing_changes_is_tried_in_the_end(card, base_model, tmp_path):
    gate, _ = gate_of(base_model, tmp_path)
    gate.note_success()  # 7 GiB, so 7.7 GiB are needed
    card[0] = DeviceMemory(7 * GIB, 0, 24 * GIB)
    for _ in range(REFUSALS_BEFORE_A_TRY):
        with pytest.raises(DeviceBusyError):
            gate.enter()
    gate.enter()
    gate.leave()
    assert isinstance(gate.after_running_out("no room"), DeviceBusyError)
    with pytest.raises(DeviceBusyError):
        gate.enter()


def test_a_nearly_free_card_that_runs_out_again_and_again_is_too_small(card, base_model, tmp_path):
    gate, _ = gate_of(base_model, tmp_path)
    card[0] = DeviceMemory(20 * GIB, 0, 24 * GIB)
    ends = [type(gate.after_running_out("too little")) for _ in range(3)]
    assert ends == [DeviceBusyError, DeviceBusyError, ResourceError]


def test_a_card_too_full_to_be_asked_is_busy(card, base_model, tmp_path, monkeypatch):
    gate, called = gate_of(base_model, tmp_path)

    def full(device):
        raise torch.AcceleratorError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(gpu, "device_memory", full)
    with pytest.raises(DeviceBusyError, match=r"^cuda: CUDA error: out of memory; others have all of its memory$"):
        gate.enter()
    assert called == ["given back"]
    GpuLease("GPU-1", "evaluator").acquire().release()
    assert isinstance(gate.after_running_out("no room"), DeviceBusyError)


@pytest.mark.parametrize(
    ("free", "keep_s", "is_kept"),
    [
        pytest.param(10, 60.0, True, id="room for both"),
        pytest.param(5, 60.0, False, id="the other one finds no room"),
        pytest.param(10, 0.0, False, id="its turn is long"),
    ],
)
def test_in_the_queue_the_model_stays_while_it_is_in_nobodys_way(
    card, base_model, tmp_path, monkeypatch, free, keep_s, is_kept
):
    gate, called = gate_of(base_model, tmp_path)
    gate.enter()
    gate.note_success()  # 7 GiB, so 7.7 GiB are needed
    gate.leave()
    monkeypatch.setattr(gpu, "KEEP_MODEL_S", keep_s)
    monkeypatch.setattr(gpu, "LEASE_PATIENCE_S", 0.02)
    monkeypatch.setattr(gpu, "_LEASE_LOOK_S", 0.01)
    card[0] = DeviceMemory(free * GIB, 7 * GIB, 24 * GIB)
    with GpuLease("GPU-1", "evaluator"), pytest.raises(DeviceBusyError):
        gate.enter()
    assert ("given back" not in called) is is_kept


@pytest.mark.parametrize(
    ("policy", "free", "is_kept"), [("share", 10, True), ("share", 5, False), ("defer", 10, False)]
)
def test_an_idle_model_stays_beside_a_training_under_share_while_there_is_room(
    card, base_model, tmp_path, policy, free, is_kept
):
    gate = DeviceGate(job_of(base_model, tmp_path, gpu_policy=policy), lambda: None, lambda: None)
    gate.enter()
    gate.note_success()  # 7 GiB, so 7.7 GiB are needed
    gate.leave()
    card[0] = DeviceMemory(free * GIB, 7 * GIB, 24 * GIB)
    assert gate.may_keep_model() is is_kept


def test_who_waits_for_a_turn_looks_again_soon_and_who_waits_for_memory_later(card, base_model, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEASE_PATIENCE_S", 0.01)
    monkeypatch.setattr(gpu, "_LEASE_LOOK_S", 0.01)
    model = ResidentModel(job_of(base_model, tmp_path), lambda: None)
    with GpuLease("GPU-1", "evaluator"), pytest.raises(DeviceBusyError), model.turn():
        pass
    assert [model.pause_s(n) for n in (0, 9)] == [QUEUE_PAUSE_S] * 2
    card[0] = DeviceMemory(0, 0, 24 * GIB)
    with pytest.raises(DeviceBusyError), model.turn():
        pass
    assert [model.pause_s(n) for n in (0, 9)] == [5, 15]


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

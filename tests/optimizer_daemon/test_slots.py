"""Slots: how many trainings run at once, on which GPUs, and when one more may begin."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from optimizer_daemon import slots as module
from optimizer_daemon.runner import LiveTrial
from optimizer_daemon.settings import OptimizerSettings, load_optimizer_settings
from optimizer_daemon.slots import Slot, Slots, Standing, slot_count, slots_of
from optimizer_daemon.study_file import threads_per_process
from optimizer_daemon.trainers import TRAINERS
from optimizer_daemon.trainers.base import starts_apart
from shared.errors import SettingsError
from shared.layout import TrialLayout
from shared.progress_bar import Progress

CPU = Slot("cpu", None)
ONE, TWO = Slot("cuda:0", "GPU-1"), Slot("cuda:1", "GPU-2")


def drawn() -> Standing:
    return Standing("drawn")


def training(gpu: str | None = None, *, prepares: bool = False) -> Standing:
    return Standing("training", gpu, holds_slot=True, prepares=prepares)


def trained() -> Standing:
    return Standing("trained", "GPU-1")


@pytest.mark.parametrize(
    ("count", "policy", "trials", "may"),
    [
        pytest.param(1, "share", [], True, id="nothing runs"),
        pytest.param(1, "share", [training()], False, id="one runs on the only slot"),
        pytest.param(2, "share", [training()], True, id="one runs on two slots"),
        pytest.param(2, "share", [training(), drawn()], False, id="a drawn one waits for the other slot"),
        pytest.param(2, "share", [Standing("interrupted"), training()], False, id="so does one that goes on"),
        pytest.param(1, "share", [training(), training()], False, id="two of a run with more slots"),
        pytest.param(1, "share", [trained()] * 2, True, id="two wait for their scores"),
        pytest.param(1, "share", [trained()] * 3, False, id="three are too many for one slot"),
        pytest.param(2, "share", [training(), *[trained()] * 4], True, id="four wait on two slots"),
        pytest.param(2, "share", [*[trained()] * 4, Standing("pruned")], False, id="five are too many for two slots"),
        pytest.param(2, "defer", [training()], True, id="defer: the other slot is free"),
        pytest.param(2, "defer", [trained()], False, id="defer: one waits for its scores"),
    ],
)  # fmt: skip
def test_when_another_trial_is_drawn(count, policy, trials, may):
    assert Slots([CPU] * count, policy).may_draw(trials) is may


@pytest.mark.parametrize(
    ("slots", "others", "free"),
    [
        pytest.param([CPU, CPU], [], [None, None], id="both"),
        pytest.param([CPU, CPU], [training()], [None], id="one of two on a CPU"),
        pytest.param([CPU, CPU], [training(), training()], [], id="none"),
        pytest.param([ONE, TWO], [training("GPU-1")], ["GPU-2"], id="the GPU nobody trains on"),
        pytest.param([ONE, TWO], [training("GPU-2")], ["GPU-1"], id="the other one"),
        pytest.param([ONE, ONE], [training("GPU-1")], ["GPU-1"], id="the same GPU has two slots"),
        pytest.param([ONE, TWO], [Standing("training", "GPU-1"), trained()], ["GPU-1", "GPU-2"], id="ended ones"),
        pytest.param([TWO], [training("GPU-1")], [], id="one of an earlier run on another GPU ends first"),
        pytest.param([ONE, TWO], [training("GPU-9")], ["GPU-1"], id="and takes up one of two slots"),
        pytest.param([ONE], [training("GPU-1"), training("GPU-2")], [], id="two of an earlier run"),
    ],
)  # fmt: skip
def test_where_a_training_may_start(slots, others, free):
    assert Slots(slots, "share").free_for_training(others) == free


def test_under_defer_scores_come_before_the_next_training():
    slots = Slots([ONE, TWO], "defer")
    assert slots.free_for_training([training("GPU-1")]) == ["GPU-2"]
    assert slots.free_for_training([training("GPU-1"), trained()]) == []


def test_trainings_that_write_the_same_files_prepare_one_after_the_other():
    preparing, stepping = training("GPU-1", prepares=True), training("GPU-1")
    assert Slots([ONE, TWO], "share", apart=True).free_for_training([preparing]) == []
    assert Slots([ONE, TWO], "share", apart=True).free_for_training([stepping]) == ["GPU-2"]
    assert Slots([ONE, TWO], "share").free_for_training([preparing]) == ["GPU-2"]


def test_scores_are_made_where_nobody_trains_if_there_is_such_a_place():
    slots = Slots([ONE, TWO], "share")
    assert slots.scoring_device([]) == "cuda:0"
    assert slots.scoring_device([training("GPU-1"), trained()]) == "cuda:1"
    assert slots.scoring_device([training("GPU-1"), training("GPU-2")]) == "cuda:0"
    unlike = Slots([ONE, Slot("cuda:1", "GPU-2", "another card")], "share")
    assert unlike.scoring_device([training("GPU-1")]) == "cuda:0", "scores of another kind of card do not compare"


# --------------------------------------------------------------------------------------------- what the settings say


@pytest.mark.parametrize(
    ("alive", "progress", "leases", "holds", "prepares"),
    [
        pytest.param(False, None, [], False, False, id="nothing lives"),
        pytest.param(False, None, ["a lease"], True, False, id="it is about to start"),
        pytest.param(True, None, [], True, True, id="it has said nothing yet"),
        pytest.param(True, Progress(None, 5, 9, preparing="latents"), [], True, True, id="it caches latents"),
        pytest.param(True, Progress(1, 0, 9), [], True, True, id="before its first step"),
        pytest.param(True, Progress(1, 1, 9), [], True, False, id="it steps"),
    ],
)
def test_how_a_trial_stands_to_the_slots(tmp_path, alive, progress, leases, holds, prepares):
    anything: Any = None
    state: Any = SimpleNamespace(state="training")
    live = LiveTrial(TrialLayout(tmp_path), anything, state, anything, gpu="GPU-1", progress=progress, leases=leases)
    process: Any = SimpleNamespace(is_alive=alive)
    live.process = process
    assert live.standing == Standing("training", "GPU-1", holds, prepares)


def test_which_trainers_write_what_all_their_trainings_use():
    assert {name: starts_apart(TRAINERS.load(name)) for name in ("native", "kohya", "command")} == {
        "native": False, "kohya": True, "command": True
    }  # fmt: skip


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs, as its driver would tell."""
    monkeypatch.setattr(module, "why_no_cuda", lambda: None)
    monkeypatch.setattr(module, "cuda_device_count", lambda: 2)
    monkeypatch.setattr(module, "require_device", lambda device: None)
    monkeypatch.setattr(module, "gpu_model", lambda device: None)
    monkeypatch.setattr(module, "resolve_device", lambda device: "cuda" if device == "auto" else device)
    monkeypatch.setattr(
        module, "gpu_uuid", lambda device: {"cuda": "GPU-1", "cuda:0": "GPU-1", "cuda:1": "GPU-2"}.get(device)
    )


@pytest.mark.parametrize(
    ("settings", "slots"),
    [
        ({"device": "cpu"}, [CPU]),
        ({"device": "cpu", "jobs": 2}, [CPU, CPU]),
        ({}, [Slot("cuda", "GPU-1")]),
        ({"device": "cuda:1", "jobs": 2}, [TWO, TWO]),
        ({"gpus": "0,1"}, [ONE, TWO]),
        ({"gpus": " 1 , 0 "}, [TWO, ONE]),
        ({"gpus": "1", "gpu_policy": "defer"}, [TWO]),
    ],
)
def test_the_slots_of_a_run(two_gpus, settings, slots):
    given = OptimizerSettings(**settings)
    assert slots_of(given) == slots
    assert slot_count(given) == len(slots)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpus": "0,2"}, "--gpus: '0,2' will not do; there are only 2 GPUs, counted from 0; name others"),
        ({"gpus": "1,1"}, "--gpus: '1,1' will not do; GPU 1 is named twice; name each once"),
        ({"gpus": "0,0"}, "--gpus: '0,0' will not do; GPU 0 is named twice; name each once"),
        ({"gpus": ""}, "--gpus: '' will not do; write the GPUs' numbers with commas between, such as 0,1"),
        ({"gpus": "0,"}, "--gpus: '0,' will not do; write the GPUs' numbers"),
        ({"gpus": "cuda:0"}, "--gpus: 'cuda:0' will not do; write the GPUs' numbers"),
        ({"gpus": "0", "jobs": 1}, "--jobs: 1 will not do; leave it out: --gpus 0 trains once on each GPU"),
        ({"gpus": "0", "device": "cpu"}, "--device: 'cpu' will not do; leave it out: --gpus 0 names the devices"),
        ({"gpus": "0", "device": "cuda:1"}, "--device: 'cuda:1' will not do; leave it out"),
        ({"jobs": 2, "gpu_policy": "defer"}, "--jobs: 2 will not do; under --gpu-policy defer a training has its GPU"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_or_is_not_there(two_gpus, settings, said):
    with pytest.raises(SettingsError) as caught:
        slots_of(OptimizerSettings(**settings))
    assert str(caught.value).startswith(said)
    assert caught.value.exit_code == 2


def test_what_is_written_wrongly_is_told_before_what_it_does_not_go_with():
    with pytest.raises(SettingsError, match="--gpus: '' will not do"):
        slot_count(OptimizerSettings(gpus="", jobs=2, device="cpu"))


def test_gpus_without_cuda(monkeypatch):
    monkeypatch.setattr(module, "why_no_cuda", lambda: "the CUDA driver shows no device")
    with pytest.raises(SettingsError, match="--gpus: '0,1' will not do; the CUDA driver shows no device; repair that"):
        slots_of(OptimizerSettings(gpus="0,1"))


@pytest.mark.parametrize(
    ("written", "read"), [('"0,1"', "0,1"), ("[0, 1]", "0,1"), ("1", "1"), ("[]", ""), ("[true]", None)]
)
def test_a_study_file_may_hold_a_list(tmp_path, written, read):
    file = tmp_path / "study.toml"
    file.write_text(f"[optimizer]\ngpus = {written}\n")
    arguments = argparse.Namespace(config=file)
    if read is None:
        with pytest.raises(SettingsError, match="gpus"):
            load_optimizer_settings(arguments)
    else:
        assert load_optimizer_settings(arguments).gpus == read


def test_cores_are_shared_by_all_trainers_and_the_evaluator(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    assert [threads_per_process(slots) for slots in (1, 2, 3, 20)] == [8, 5, 4, 1]

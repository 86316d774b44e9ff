"""--gpu-policy of the real optimizer daemon: when the next training begins, and under which lease."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optimizer_daemon.runner import Runner, uses_of
from shared.errors import DeviceBusyError
from shared.files import read_model
from shared.gpu_lease import GpuLease
from shared.locks import FileLock
from shared.schemas import Run, TrialState
from tests.scenarios.lab import wait_until
from tests.scenarios.quick_lab import PATIENCE_S, QuickLab


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("policy", ["share", "defer"])
def test_the_next_training_waits_for_every_score_under_defer_alone(tmp_path: Path, policy: str):
    with QuickLab(tmp_path) as lab:
        lab.study.root.mkdir(exist_ok=True)
        first, second = lab.study.trial(1), lab.study.trial(2)
        with FileLock(lab.study.manager_lock):  # a manager lives and is slow, so nothing is scored yet
            daemon = lab.optimizer("--n-trials", 2, "--gpu-policy", policy)
            wait_until(
                lambda: first.state.exists() and read_model(first.state, TrialState).state == "trained",
                PATIENCE_S,
                daemon.said,
            )
            if policy == "share":
                wait_until(second.state.exists, PATIENCE_S, daemon.said)
            else:
                time.sleep(3.0)  # ticks of the daemon: it had time to draw
                assert not second.folder.exists()
                assert daemon.exit_status is None, daemon.said
        assert daemon.wait(PATIENCE_S) == 0, daemon.said
        assert [read_model(trial.state, TrialState).state for trial in (first, second)] == ["complete"] * 2
        assert read_model(lab.study.run, Run).settings["gpu-policy"] == policy
        assert ("pruning" in lab.log()) is (policy == "defer"), "what defer costs is said at the start"


@pytest.mark.parametrize(
    ("gpu", "policy", "ran_short_of", "uses"),
    [
        pytest.param(None, "share", (), {}, id="on a CPU none"),
        pytest.param(None, "defer", (), {}, id="on a CPU none under defer either"),
        pytest.param("GPU-1", "share", (), {"GPU-1": "sharing trainer"}, id="share"),
        pytest.param("GPU-1", "defer", (), {"GPU-1": "exclusive trainer"}, id="defer"),
        pytest.param("GPU-1", "share", ("GPU-1",), {"GPU-1": "exclusive trainer"}, id="alone after it ran short"),
        pytest.param("GPU-1", "share", ("GPU-2",), {"GPU-1": "exclusive trainer"}, id="alone on another card, too"),
        pytest.param("GPU-1", "share", ("host",), {"GPU-1": "sharing trainer"}, id="the host's memory is no card's"),
        pytest.param(None, "share", ("GPU-2",), {"GPU-2": "exclusive trainer"}, id="a card the daemon does not know"),
    ],
)  # fmt: skip
def test_the_leases_of_a_training(gpu, policy, ran_short_of, uses):
    assert uses_of(gpu, policy, ran_short_of) == uses


def trial(*ran_short_of: str) -> Any:
    return SimpleNamespace(leases=[], gpu=None, state=SimpleNamespace(ran_short_of=ran_short_of))


def test_trainers_of_two_studies_see_each_other_and_the_evaluators(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    plugin: Any = None
    run: Any = None
    share, defer = Runner(plugin, run, "share"), Runner(plugin, run, "defer")
    one, two, alone = trial(), trial(), trial()
    with GpuLease("GPU-1", "evaluator"):
        assert share.may_start(one, ["GPU-1"])
        assert share.may_start(two, ["GPU-1"]), "sharing trainers run beside each other and beside an evaluator"
        assert not defer.may_start(alone, ["GPU-1"])
    assert not defer.may_start(alone, ["GPU-1"]), "the other study's trainings still run"
    for live in (one, two):
        live.leases.pop().release()
    assert defer.may_start(alone, ["GPU-1"])
    assert defer.may_start(alone, ["GPU-1"]), "asked again it keeps what it has"
    assert len(alone.leases) == 1
    assert not share.may_start(one, ["GPU-1"])
    with pytest.raises(DeviceBusyError, match="GPU-1 is in use"):
        GpuLease("GPU-1", "evaluator").acquire()
    alone.leases.pop().release()
    assert share.may_start(one, ["GPU-1"])
    one.leases.pop().release()

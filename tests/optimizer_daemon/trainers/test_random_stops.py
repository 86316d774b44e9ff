"""SIGTERM at moments nobody chose: a training that was stopped again and again ends as one that never was.

The short form, two stops, is part of every trainer's contract: test_contract.py.
"""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optimizer_daemon.lifecycle import signal_of
from shared.safetensors_file import read_checkpoint
from tests.optimizer_daemon.trainers.bench import STEPS_PER_EPOCH, Bench

STATE = "training_state.pt"


@dataclass(frozen=True)
class Stop:
    """One SIGTERM and what it left.

    Args:
        moment: when it was sent.
        step: optimizer steps that the saved state holds; 0 without one.
        seconds: from the signal to the end of the whole tree.
    """

    moment: str
    step: int
    seconds: float


def whole_checkpoints(bench: Bench) -> list[str]:
    """See that every weight file in the trial's folder is whole, finite and not zero, and nothing lies beside it."""
    names = [path.name for path in bench.trial.folder.glob("*.safetensors*")]
    for name in names:
        read_checkpoint(bench.trial.folder / name, bench.trial.folder)
    assert [path.name for path in bench.trial.folder.glob(".*") if ".safetensors" in path.name] == []
    return sorted(names)


def saved_step(bench: Bench) -> int:
    """Return how far the saved state is, once it has been seen to be whole."""
    path = bench.trial.training_state / STATE
    if not path.exists():
        return 0
    position = torch.load(path, weights_only=True)["position"]
    assert position["step"] == (position["epoch"] - 1) * STEPS_PER_EPOCH + position["step_in_epoch"]
    return int(position["step"])


def stop_at_random(bench: Bench, rng: random.Random, before: int, target: int) -> Stop:
    """Start the training, send SIGTERM at step `target` or, one time in four, while it starts; look at what is left."""
    bench.start()
    if rng.random() < 0.25:
        moment = rng.uniform(0.0, 6.0)
        time.sleep(moment)
        told = f"{moment:.2f} s after the start"
    else:
        bench.wait_for_step(target)
        time.sleep(rng.uniform(0.0, 0.3))
        told = f"from step {target}"
    report = bench.stop()
    assert report is not None and report.killed == report.survivors == ()
    assert not bench.is_alive and bench.strays() == {}
    assert signal_of(bench.record) == signal.SIGTERM, bench.log
    assert "Traceback" not in bench.log
    step = saved_step(bench)
    assert step >= before, "a stop lost steps that an earlier one had saved"
    assert whole_checkpoints(bench) == [
        bench.trial.intermediate_checkpoint(epoch).name for epoch in range(1, step // STEPS_PER_EPOCH + 1)
    ]
    return Stop(told, step, report.duration_s)


def prove(root: Path, stops: int, steps_between: int, seed: int) -> list[Stop]:
    """Train once undisturbed and once with so many stops; return the stops, once both ended with equal weights."""
    rng = random.Random(seed)
    epochs = -(-(stops + 1) * steps_between // STEPS_PER_EPOCH)
    (root / "whole").mkdir()
    (root / "stopped").mkdir()
    done: list[Stop] = []
    with (
        Bench(root / "whole", max_train_epochs=epochs) as whole,
        Bench(root / "stopped", beside=whole, max_train_epochs=epochs) as b,
    ):
        whole.start()
        assert whole.finish().exit_status == 0, whole.log
        for number in range(stops):
            before = done[-1].step if done else 0
            # Each has its own stretch of the training, so that one which comes late leaves room for the others.
            target = max(before + 1, number * steps_between + rng.randint(1, steps_between))
            done.append(stop_at_random(b, rng, before, target))
        b.start()
        assert b.finish().exit_status == 0, b.log
        assert whole_checkpoints(b) == whole_checkpoints(whole)
        for name in whole.checkpoints:
            found, expected = load_file(b.trial.folder / name), load_file(whole.trial.folder / name)
            assert found.keys() == expected.keys()
            assert [key for key in expected if not torch.equal(found[key], expected[key])] == [], name
        assert not b.trial.training_state.exists()
    return done


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_stopped_at_twenty_random_moments_it_ends_with_the_same_weights(tmp_path: Path):
    done = prove(tmp_path, stops=20, steps_between=12, seed=6)
    for number, stop in enumerate(done, 1):
        print(f"stop {number:2}: {stop.moment}, state at step {stop.step}, all over after {stop.seconds:.2f} s")
    assert len(done) == 20

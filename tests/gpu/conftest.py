"""Checks that need a CUDA device: `python -m pytest tests/gpu`. Without one each is skipped by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluator_daemon.job import Job
from examples.tiny_world.paths import BASE_MODEL
from shared.planning import make_plan
from shared.schemas import EvaluationPlan

PROMPTS = ("a red ball", "a blue cube")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"{item.name}: torch finds no CUDA device"))


@pytest.fixture(autouse=True)
def own_leases(monkeypatch, tmp_path):
    """Leases of this test alone, not those of studies that run on this machine."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def plan() -> EvaluationPlan:
    return make_plan(base_model=BASE_MODEL, prompts=PROMPTS, device="cuda", num_samples=8, steps=8)


@pytest.fixture
def job(plan, tmp_path) -> Job:
    study = tmp_path / "study"
    study.mkdir()
    return Job(study, plan, BASE_MODEL, None, "cuda", 1, 1.0, 900.0)

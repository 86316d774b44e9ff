"""LPIPS diversity through the real package: a random backbone here, said to be one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import RenderedSet
from evaluator_daemon.metrics.lpips_diversity import LpipsDiversity
from evaluator_daemon.metrics.lpips_network import load_lpips
from shared.planning import make_plan

RANDOM = Path("random")


@pytest.fixture
def job(base_model) -> Job:
    plan = make_plan(base_model=base_model, prompts=["a"], device="cpu", num_samples=2)
    return Job(base_model.parent, plan, base_model, None, "cpu", 1, 1.0, 900.0, lpips_weights=RANDOM)


def pictures(count: int = 4, side: int = 64) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]


def test_distances_are_those_of_the_package_pair_by_pair():
    import torch

    network, why_not = load_lpips(RANDOM, "cpu")
    assert network is not None, why_not
    found = pictures()
    ours = network.distances(found)
    tensors = [torch.from_numpy(p).permute(2, 0, 1)[None].float() / 127.5 - 1 for p in found]
    with torch.no_grad():
        theirs = [[float(network._lpips(a, b)) for b in tensors] for a in tensors]
    assert ours == pytest.approx(np.array(theirs), abs=1e-6)
    assert ours.max() > 0


def test_each_picture_has_its_mean_distance_and_a_random_backbone_says_so(job):
    metric = LpipsDiversity(job).measure(RenderedSet(pictures(), ["a"] * 4, None))["lpips_diversity"]
    network, _ = load_lpips(RANDOM, "cpu")
    distances = network.distances(pictures())
    assert metric.per_image == pytest.approx(distances.sum(axis=1) / 3)
    assert metric.value == pytest.approx(distances[np.triu_indices(4, 1)].mean())
    assert metric.version == "1 (lpips 0.1.4, backbone: random)"


def test_a_backbone_from_a_file_of_torchvisions_form_is_used_and_named(job, tmp_path):
    import torch
    import torchvision

    torch.manual_seed(5)
    weights = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save(weights, tmp_path / "squeeze.pth")
    metric = LpipsDiversity(replace(job, lpips_weights=tmp_path / "squeeze.pth")).measure(
        RenderedSet(pictures(), ["a"] * 4, None)
    )["lpips_diversity"]
    assert (metric.status, metric.version) == ("ok", "1 (lpips 0.1.4, backbone: squeeze)")
    del weights["features.12.expand3x3.weight"]
    torch.save(weights, tmp_path / "part.pth")
    part = LpipsDiversity(replace(job, lpips_weights=tmp_path / "part.pth")).measure(
        RenderedSet(pictures(), ["a"] * 4, None)
    )["lpips_diversity"]
    assert part.status == "unavailable"
    assert "lacks parts of squeeze" in part.reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "--lpips-weights"), ("missing", "there is no file"), (b"no weights", "cannot be read")],
)
def test_without_usable_weights_it_is_unavailable_never_0(job, tmp_path, content, reason):
    file = None if content is None else tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    metric = LpipsDiversity(replace(job, lpips_weights=file)).measure(RenderedSet(pictures(2), ["a"] * 2, None))
    assert (metric["lpips_diversity"].status, metric["lpips_diversity"].value) == ("unavailable", None)
    assert reason in metric["lpips_diversity"].reason


def test_one_picture_has_no_diversity(job):
    one = LpipsDiversity(job).measure(RenderedSet(pictures(1), ["a"], None))["lpips_diversity"]
    assert one.status == "unavailable"
    assert "--num-samples 2" in one.reason


def test_pictures_of_several_sizes_have_no_common_distance(job):
    mixed = RenderedSet([*pictures(1), *pictures(1, side=32)], ["a", "b"], None)
    metric = LpipsDiversity(job).measure(mixed)["lpips_diversity"]
    assert (metric.status, metric.value) == ("unavailable", None)
    assert "several sizes" in metric.reason

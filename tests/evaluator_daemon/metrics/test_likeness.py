"""Likeness to held-out pictures, memorisation and style distance, with random networks on known pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluator_daemon.job import Job
from evaluator_daemon.metrics import METRICS, plugin
from evaluator_daemon.metrics.base import RenderedSet
from shared.errors import StudyMismatchError
from shared.held_out import pictures_in
from shared.metric_names import MetricInputs
from shared.planning import make_plan
from shared.schemas.pictures import StudyPictures

PROMPTS = ["a red ball", "a blue cube", "a green cone"]


def noise(seed: int, count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(count)]


@pytest.fixture
def job(base_model, clip_model, dino_model, tmp_path) -> Job:
    for folder, seed in (("held", 1), ("training", 2)):
        (tmp_path / folder).mkdir()
        for i, picture in enumerate(noise(seed, 4)):
            Image.fromarray(picture).save(tmp_path / folder / f"{i}.png")
    plan = make_plan(base_model=base_model, prompts=PROMPTS, device="cpu", num_samples=3, clip_model=clip_model)
    pictures = StudyPictures(
        held_out=pictures_in(tmp_path / "held", "--x"), training=pictures_in(tmp_path / "training", "--x")
    )
    return Job(tmp_path, plan, base_model, clip_model, "cpu", 1, 1.0, 900.0, dino_model=dino_model, pictures=pictures)


def measure(name: str, job: Job, pictures: list[np.ndarray], base: list[np.ndarray] | None = None):
    return METRICS.load(name)(job).measure(RenderedSet(pictures, PROMPTS, base))


def test_clip_likeness_is_the_mean_cosine_with_the_held_out_pictures(job):
    import torch
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(job.clip_model).eval()
    processor = CLIPProcessor.from_pretrained(job.clip_model)

    def embed(pictures):
        pixels = processor(images=pictures, return_tensors="pt").pixel_values
        with torch.no_grad():
            out = model(pixel_values=pixels, input_ids=torch.tensor([[0, 1]]))
        return out.image_embeds

    expected = (embed(noise(0)) @ embed(noise(1, 4)).T).mean(dim=1).tolist()
    assert measure("clip_image", job, noise(0))["clip_image"].per_image == pytest.approx(expected, abs=1e-4)


def test_dino_likeness_is_the_mean_cosine_of_the_class_tokens(job):
    import torch
    from transformers import BitImageProcessor, Dinov2Model

    model = Dinov2Model.from_pretrained(job.dino_model).eval()
    processor = BitImageProcessor.from_pretrained(job.dino_model)

    def embed(pictures):
        with torch.no_grad():
            states = model(**processor(images=pictures, return_tensors="pt")).last_hidden_state
        return torch.nn.functional.normalize(states[:, 0], dim=1)

    expected = (embed(noise(0)) @ embed(noise(1, 4)).T).mean(dim=1).tolist()
    assert measure("dino_likeness", job, noise(0))["dino_likeness"].per_image == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("network", ["dino", "clip"])
def test_a_copy_of_a_training_picture_is_found_named_and_raises_the_alarm(job, network):
    job = job if network == "dino" else replace(job, dino_model=None)
    copy = noise(2, 4)[3]
    found = measure("memorisation", job, [noise(0)[0], copy, noise(0)[2]], noise(7))
    assert found["nearest_training"].per_image[1] == pytest.approx(1.0, abs=1e-4)
    assert found["memorisation"].nearest[1] == "3.png"
    assert found["memorisation"].per_image[1] > 0
    assert found["copies"].per_image[1] == 1.0
    assert found["memorisation"].version == f"1 ({network})"
    own = measure("memorisation", job, noise(0), noise(0))
    assert own["memorisation"].per_image == pytest.approx([0.0] * 3, abs=1e-6)
    assert own["copies"].value == 0
    assert "memorisation" not in measure("memorisation", job, noise(0))


def test_the_held_out_pictures_themselves_have_no_style_distance(job):
    held_out = noise(1, 4)
    same = METRICS.load("style_distance")(job).measure(RenderedSet(held_out, ["a"] * 4, None))["style_distance"]
    assert same.value == pytest.approx(0.0, abs=1e-3)
    dark = [(picture // 4).astype(np.uint8) for picture in held_out]
    other = METRICS.load("style_distance")(job).measure(RenderedSet(dark, ["a"] * 4, None))["style_distance"]
    assert other.value > 0.1


def test_the_contributions_to_the_style_distance_stand_in_for_leaving_a_picture_out(job):
    metric = METRICS.load("style_distance")(job)
    pictures = [noise(0)[0], noise(5)[0] // 2, noise(6)[0] // 3]
    whole = metric.measure(RenderedSet(pictures, PROMPTS, None))["style_distance"]
    without = [
        metric.measure(RenderedSet(pictures[:i] + pictures[i + 1 :], PROMPTS[:2], None))["style_distance"].value
        for i in range(3)
    ]
    means = [sum(v for j, v in enumerate(whole.per_image) if j != i) / 2 for i in range(3)]
    moved = [left - sum(without) / 3 for left in without]
    assert [mean - whole.value for mean in means] == pytest.approx(moved, abs=1e-6)


def test_embeddings_are_computed_once_per_study_and_changed_pictures_refused(job, tmp_path):
    first = measure("clip_image", job, noise(0))
    kept = sorted((tmp_path / "reference").iterdir())
    assert len(kept) == 1
    picture = Path(job.pictures.held_out[0].path)
    picture.unlink()
    assert measure("clip_image", job, noise(0)) == first, "the picture was looked at again"
    kept[0].write_bytes(b"damaged")
    with pytest.raises(StudyMismatchError, match="put it back"):
        measure("clip_image", job, noise(0))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("clip_image", {"clip_model": None}, "--clip-model"),
        ("clip_image", {"pictures": StudyPictures()}, "no held-out pictures"),
        ("dino_likeness", {"dino_model": None}, "--dino-model"),
        ("style_distance", {"pictures": StudyPictures()}, "--reference-pictures"),
        ("memorisation", {"dino_model": None, "clip_model": None}, "--clip-model"),
        ("memorisation", {"pictures": StudyPictures()}, "the training pictures are not known"),
    ],
)
def test_what_is_missing_makes_a_metric_unavailable_with_the_remedy(job, name, change, reason):
    found = measure(name, replace(job, **change), noise(0), noise(7))
    assert {metric.status for metric in found.values()} == {"unavailable"}
    assert all(reason in metric.reason for metric in found.values())
    there = {key: getattr(job, key) for key in ("clip_model", "dino_model", "pictures")} | change
    assert reason in plugin(name).why_not(MetricInputs(**there))


def test_a_dino_that_is_a_clip_is_refused_by_name(job, clip_model):
    found = measure("dino_likeness", replace(job, dino_model=clip_model), noise(0))["dino_likeness"]
    assert "model_type 'clip'" in found.reason


@pytest.mark.parametrize("name", METRICS.names)
def test_every_metric_measures_exactly_what_it_declares_within_its_range(name, job):
    job = replace(job, lpips_weights=Path("random"))
    pictures = [np.kron(p, np.ones((4, 4, 1), np.uint8)) for p in noise(0)]
    base = [np.kron(p, np.ones((4, 4, 1), np.uint8)) for p in noise(7)]
    facts = plugin(name).facts
    found = measure(name, job, pictures, base)
    assert found.keys() == facts.quantities.keys()
    for quantity, metric in found.items():
        declared = facts.quantities[quantity]
        assert metric.status == "ok", metric.reason
        assert metric.direction == declared.direction
        assert metric.version.startswith(facts.version)
        assert len(metric.per_image) == 3
        assert declared.low - 1e-6 <= metric.value <= declared.high + 1e-6
    assert facts.source
    assert (facts.weights == "none") == (facts.get == "-")

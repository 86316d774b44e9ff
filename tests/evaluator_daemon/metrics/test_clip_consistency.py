"""CLIP consistency against an independent computation, and where it is unavailable."""

from __future__ import annotations

import numpy as np
import pytest

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import RenderedSet
from evaluator_daemon.metrics.clip_consistency import ClipConsistency
from shared.planning import make_plan

PROMPTS = ["a red ball", "a blue cube"]


@pytest.fixture
def job(base_model, clip_model) -> Job:
    plan = make_plan(base_model=base_model, prompts=PROMPTS, device="cpu", num_samples=2)
    return Job(base_model.parent, plan, base_model, clip_model, "cpu", 1, 1.0, 900.0)


@pytest.fixture
def rendered() -> RenderedSet:
    rng = np.random.default_rng(0)
    return RenderedSet([rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in PROMPTS], PROMPTS, None)


def test_it_is_the_cosine_of_each_picture_with_its_own_prompt(job, rendered):
    import torch
    from transformers import CLIPModel, CLIPProcessor

    metric = ClipConsistency(job).measure(rendered)["clip_consistency"]
    model = CLIPModel.from_pretrained(job.clip_model).eval()
    processor = CLIPProcessor.from_pretrained(job.clip_model)
    inputs = processor(text=PROMPTS, images=list(rendered.pictures), return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)
    expected = (out.logits_per_image / model.logit_scale.exp()).diagonal().tolist()
    assert metric.per_image == pytest.approx(expected, abs=1e-4)
    assert metric.value == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert metric.direction == "maximise"


def test_without_weights_it_is_unavailable_and_says_why(job, rendered, tmp_path):
    none = ClipConsistency(Job(**{**vars(job), "clip_model": None})).measure(rendered)["clip_consistency"]
    assert (none.status, none.value) == ("unavailable", None)
    assert "--clip-model" in none.reason
    (tmp_path / "config.json").write_text("{}")
    broken = ClipConsistency(Job(**{**vars(job), "clip_model": tmp_path})).measure(rendered)["clip_consistency"]
    assert broken.status == "unavailable"
    assert str(tmp_path) in broken.reason


def test_the_probability_of_the_own_prompt_is_clips_own_classifier(job, rendered):
    import torch
    from transformers import CLIPModel, CLIPProcessor

    match = ClipConsistency(job).measure(rendered)["prompt_match"]
    model = CLIPModel.from_pretrained(job.clip_model).eval()
    processor = CLIPProcessor.from_pretrained(job.clip_model)
    inputs = processor(text=PROMPTS, images=list(rendered.pictures), return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.softmax(dim=1).diagonal().tolist()
    assert match.per_image == pytest.approx(expected, abs=1e-3)
    alone = RenderedSet(rendered.pictures, ["a red ball"] * 2, None)
    assert ClipConsistency(job).measure(alone)["prompt_match"].status == "unavailable"

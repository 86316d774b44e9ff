"""The networks that metrics share: lost in mid-study, dropped from memory, and what they keep."""

from __future__ import annotations

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluator_daemon.job import Job
from evaluator_daemon.metrics import METRICS, load_metrics
from evaluator_daemon.metrics.base import RenderedSet, drop_networks
from evaluator_daemon.metrics.networks import Clip, clip_of
from evaluator_daemon.resident import ResidentModel
from shared.errors import ResourceError
from shared.held_out import pictures_in
from shared.planning import make_plan
from shared.schemas.pictures import StudyPictures

PICTURES = [np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8) for seed in range(3)]


@pytest.fixture
def job(base_model, clip_model, tmp_path) -> Job:
    plan = make_plan(
        base_model=base_model, prompts=["a", "b"], device="cpu", num_samples=2, steps=1, clip_model=clip_model
    )
    return Job(tmp_path, plan, base_model, clip_model, "cpu", 1, 1.0, 900.0)


def planned_with(job: Job, **networks: object) -> Job:
    """The job of a plan that was made with these networks, whose metric it measures."""
    metric = "lpips_diversity" if "lpips_weights" in networks else "dino_likeness"
    identity = "lpips_digest" if "lpips_weights" in networks else "dino_digest"
    values = {**job.plan.scoring.values, identity: "0" * 64, "metrics": f"pixels,{metric}"}
    scoring = job.plan.scoring.model_copy(update={"values": values})
    return replace(job, plan=job.plan.model_copy(update={"scoring": scoring}), **networks)


def held_out(tmp_path: Path) -> StudyPictures:
    (tmp_path / "held").mkdir()
    Image.fromarray(PICTURES[0]).save(tmp_path / "held" / "0.png")
    return StudyPictures(held_out=pictures_in(tmp_path / "held", "--x"))


def test_a_planned_network_that_is_gone_ends_the_evaluation_instead_of_the_metric(job, tmp_path):
    gone = tmp_path / "gone"
    for lost in (
        replace(job, clip_model=gone),
        planned_with(job, dino_model=gone),
        planned_with(job, lpips_weights=gone),
    ):
        with pytest.raises(ResourceError, match=rf"{gone}.*the study was started with it: put it back"):
            load_metrics(lost)
    never = replace(planned_with(job), dino_model=None)
    with pytest.raises(ResourceError, match="--dino-model"):
        load_metrics(never)


def test_what_the_plan_never_had_is_unavailable(job, base_model):
    plan = make_plan(base_model=base_model, prompts=["a", "b"], device="cpu", num_samples=2)
    sources = load_metrics(replace(job, plan=plan, clip_model=None))
    found = {}
    for source in sources:
        found |= source.measure(RenderedSet(PICTURES[:2], ["a", "b"], None))
    assert found["clip_consistency"].status == "unavailable"


def test_a_planned_network_that_cannot_be_loaded_is_tried_again(job, dino_model, tmp_path):
    folder = tmp_path / "dino"
    shutil.copytree(dino_model, folder)
    whole = (folder / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").write_text("{")  # being copied
    job = replace(planned_with(job, dino_model=folder), pictures=held_out(tmp_path))
    for _ in range(2):
        with pytest.raises(ResourceError, match=rf"the DINOv2 in {folder} cannot be loaded"):
            METRICS.load("dino_likeness")(job)
    (folder / "preprocessor_config.json").write_text(whole)
    found = METRICS.load("dino_likeness")(job).measure(RenderedSet(PICTURES, ["a"] * 3, None))
    assert found["dino_likeness"].status == "ok", "the failure was not remembered"


def test_a_planned_backbone_that_is_damaged_ends_the_evaluation(job, tmp_path):
    (tmp_path / "backbone.pth").write_bytes(b"half a file")
    with pytest.raises(ResourceError, match=r"backbone\.pth cannot be read"):
        load_metrics(planned_with(job, lpips_weights=tmp_path / "backbone.pth"))


def test_giving_back_leaves_no_network_behind(job):
    drop_networks()  # one that another test of this process has loaded may be held there
    model = ResidentModel(job, lambda: None)
    model.make_ready()
    loaded = weakref.ref(clip_of(job)[0])
    assert loaded() is not None
    model.give_back()
    gc.collect()
    assert loaded() is None


def test_clip_keeps_what_its_layers_say_only_where_somebody_asks_and_then_as_moments(job, clip_model):
    clip = Clip(clip_model, "", "cpu")

    def kept() -> int:
        return sum(part.numel() for _, answer in clip._kept._answers for part in answer if part is not None)

    embeddings = clip.embed(PICTURES)
    assert kept() == embeddings.numel()
    moments = clip.moments(PICTURES)
    assert kept() == embeddings.numel() + moments.numel()
    assert torch.equal(clip.embed(PICTURES), embeddings)
    pixels = clip._images(images=PICTURES, return_tensors="pt").pixel_values
    with torch.inference_mode():
        patches = clip._model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[0][:, 1:]
    assert moments.shape == (3, 1, 2, patches.shape[-1])
    assert torch.allclose(moments[:, 0, 0], patches.double().mean(dim=1))
    assert torch.allclose(moments[:, 0, 1], patches.double().square().mean(dim=1))

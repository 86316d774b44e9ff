"""The resident pipeline: what a LoRA changes, and that nothing of it stays."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from evaluator_daemon.job import Job
from evaluator_daemon.renderers.diffusion import DiffusionRenderer
from shared.errors import RefusedCheckpointError, SettingsError
from shared.planning import make_plan
from shared.safetensors_file import lora_modules, read_checkpoint
from tests.evaluator_daemon.tiny_models import PROMPTS, TEXT_MODULES, UNET_MODULES, lora_bytes


@pytest.fixture(scope="module")
def job(base_model) -> Job:
    plan = make_plan(base_model=base_model, prompts=PROMPTS, device="cpu", num_samples=3, steps=3)
    return Job(base_model.parent, plan, base_model, None, "cpu", 1, 1.0, 900.0)


@pytest.fixture(scope="module")
def renderer(job) -> DiffusionRenderer:
    return DiffusionRenderer(job)


def apply(renderer, tmp_path, content: bytes):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    checkpoint = read_checkpoint(path, tmp_path)
    return renderer.lora(checkpoint, lora_modules(checkpoint))


def render(renderer) -> np.ndarray:
    return np.stack(renderer.render(lambda: None).pictures)


def tensors() -> int:
    import torch

    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def test_the_base_model_is_bit_equal_before_and_after_loras(renderer, tmp_path):
    before = render(renderer)
    assert before.shape == (3, 16, 16, 3)
    assert before.dtype == np.uint8
    assert (before[0] != before[1]).any(), "other prompt, other picture"
    assert (before[0] != before[2]).any(), "same prompt, other seed"
    counts = []
    for seed in range(3):
        with apply(renderer, tmp_path, lora_bytes(seed)):
            changed = render(renderer)
        assert (changed != before).any()
        counts.append(tensors())
    assert (render(renderer) == before).all()
    assert counts[1] == counts[2], "a LoRA's tensors stay behind"


def test_samples_do_not_depend_on_their_neighbours_seed(renderer, job):
    whole = render(renderer)
    alone = renderer._render_all(1, lambda: None)
    assert np.abs(whole.astype(int) - np.stack(alone).astype(int)).max() <= 2


@pytest.mark.parametrize(
    "modules", [pytest.param(UNET_MODULES, id="unet only"), pytest.param(TEXT_MODULES, id="text encoder only")]
)
def test_each_part_alone_is_applied_and_leaves_no_trace(renderer, tmp_path, modules):
    before = render(renderer)
    with apply(renderer, tmp_path, lora_bytes(7, modules=modules, strength=2.0)):
        assert (render(renderer) != before).any()
    assert (render(renderer) == before).all()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        pytest.param({"lora_unet_no_such_layer": (16, 16)}, "do not exist", id="all of them unknown"),
        pytest.param({**UNET_MODULES, "lora_unet_mid_block_x": (16, 16)}, "1 of its", id="one unknown beside known"),
        pytest.param({"lora_te2_text_model_encoder_layers_0_mlp_fc1": (64, 32)}, "do not exist", id="SDXL's prefix"),
        pytest.param(
            # diffusers takes the query's names for another format when the output projection is missing
            {name: shape for name, shape in TEXT_MODULES.items() if "q_proj" in name or "fc1" in name},
            "not applied by the loader",
            id="known layers that the loader drops",
        ),
        pytest.param(
            {name: shape for name, shape in TEXT_MODULES.items() if "q_proj" in name},
            "diffusers cannot load it",
            id="known layers that the loader stumbles over",
        ),
        pytest.param(
            {n: (s[0] * 2, s[1]) for n, s in UNET_MODULES.items()}, "another width", id="another model's width"
        ),
    ],
)
def test_a_lora_that_would_be_applied_in_part_is_refused_and_leaves_no_trace(renderer, tmp_path, modules, message):
    before = render(renderer)
    with (
        pytest.raises(RefusedCheckpointError, match=message) as caught,
        apply(renderer, tmp_path, lora_bytes(modules=modules)),
    ):
        pytest.fail("it was applied")
    assert caught.value.code == "not_applied"
    assert (render(renderer) == before).all()


def test_the_lora_scale_of_the_plan_counts(job, tmp_path):
    nothing = Job(**{**vars(job), "plan": job.plan.model_copy(update={"lora_scale": 0.0})})
    renderer = DiffusionRenderer(nothing)
    before = render(renderer)
    with apply(renderer, tmp_path, lora_bytes()):
        assert np.abs(render(renderer).astype(int) - before.astype(int)).max() <= 1


def test_a_stop_ends_a_rendering_between_two_steps(renderer):
    steps = []

    def stop() -> None:
        steps.append(1)
        if len(steps) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        renderer.render(stop)
    assert len(steps) == 2


def test_another_kind_of_pipeline_is_refused_by_name(job, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(SettingsError, match="FluxPipeline"):
        DiffusionRenderer(Job(**{**vars(job), "base_model": tmp_path}))

"""The resident pipeline: what a LoRA changes, and that nothing of it stays."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest

from evaluator_daemon.job import Job
from evaluator_daemon.renderers.diffusion import DiffusionRenderer
from optimizer_daemon.lora_training.lora import text_layers, unet_layers
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


def peft_bytes(*, alpha: float | None, part: str = "unet") -> bytes:
    """A LoRA of rank 2 in diffusers' form, its alpha where diffusers puts it."""
    import torch
    from safetensors.torch import save

    tensors = {}
    for block in ("down_blocks.1", "up_blocks.0"):
        for layer in ("attn1.to_q", "attn2.to_out.0"):
            name = f"{part}.{block}.attentions.0.transformer_blocks.0.{layer}"
            tensors |= {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)}
    settings = {"unet.r": 2, "unet.lora_alpha": alpha}
    return save(tensors, {"lora_adapter_metadata": json.dumps(settings)} if alpha is not None else {"format": "pt"})


def test_a_lora_in_diffusers_form_is_applied_at_the_strength_that_its_metadata_names(renderer, tmp_path):
    pictures = {}
    for alpha in (None, 2, 8):
        with apply(renderer, tmp_path, peft_bytes(alpha=alpha)):
            pictures[alpha] = render(renderer)
    assert (pictures[None] == pictures[2]).all(), "without metadata alpha is the rank"
    assert (pictures[8] != pictures[2]).any()


def test_kohyas_alpha_is_applied_as_alpha_by_rank(renderer, tmp_path):
    from safetensors.torch import load, save

    tensors = load(lora_bytes(rank=4))
    halved = {name: tensor / 2 if name.endswith("alpha") else tensor for name, tensor in tensors.items()}
    with apply(renderer, tmp_path, save(halved)):
        half = render(renderer)
    with apply(renderer, tmp_path, save(tensors)):
        assert (render(renderer) != half).any()


def test_what_a_lora_leaves_out_is_counted_against_what_the_native_trainer_trains(renderer, tmp_path):
    pipeline = renderer._pipeline
    unet = {name: tuple(layer.weight.shape[:2]) for name, layer in unet_layers(pipeline.unet)}
    text = {name: tuple(layer.weight.shape[:2]) for name, layer in text_layers(pipeline.text_encoder)}

    def named(module: str) -> str:
        return next(name for name in renderer._names.layers if f"lora_{name}".replace(".", "_") == module)

    def left_out(modules: dict) -> set[str]:
        path = tmp_path / "lora.safetensors"
        path.write_bytes(lora_bytes(modules=modules))
        return renderer.left_out(lora_modules(read_checkpoint(path, tmp_path)))

    assert left_out({**unet, **text}) == left_out(unet) == left_out(text) == set()
    gone = next(iter(unet))
    assert left_out({name: shape for name, shape in unet.items() if name != gone}) == {named(gone)}
    assert len(left_out({**dict(list(unet.items())[::2]), **text})) == len(unet) // 2


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

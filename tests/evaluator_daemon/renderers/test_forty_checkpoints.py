"""Forty checkpoints in a row leave the resident model as it was: pixels, tensors and memory."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import numpy as np
import pytest

from evaluator_daemon.job import Job
from evaluator_daemon.renderers.diffusion import DiffusionRenderer
from examples.tiny_world.paths import BASE_MODEL
from shared.errors import RefusedCheckpointError
from shared.planning import make_plan
from shared.safetensors_file import lora_modules, read_checkpoint
from tests.evaluator_daemon.tiny_models import PROMPTS, TEXT_MODULES, UNET_MODULES, lora_bytes
from tests.scenarios import lora_files

CHECKPOINTS = 40
FITTED = 30  # the last of them: the first warm the allocator up
MOST_BYTES_PER_CHECKPOINT = 64 * 1024
"""Of the order of one of these LoRAs; the slopes read were 3 to 6 KB."""


def tiny(seed: int) -> bytes:
    """By turns the UNet's modules, the text encoder's and both, of changing rank."""
    modules = ({**UNET_MODULES, **TEXT_MODULES}, UNET_MODULES, TEXT_MODULES)[seed % 3]
    return lora_bytes(seed, modules=modules, rank=16 + seed % 2, strength=0.2)


def of_the_tiny_world(seed: int) -> bytes:
    return lora_files.lora(seed, strength=0.2)


@pytest.mark.parametrize(
    ("world", "content"),
    [("random", tiny), pytest.param("tiny world", of_the_tiny_world, marks=pytest.mark.slow)],
)
def test_nothing_stays_of_forty_checkpoints(base_model, tmp_path, world, content):
    folder = base_model if world == "random" else BASE_MODEL
    plan = make_plan(base_model=folder, prompts=PROMPTS, device="cpu", num_samples=2, steps=2)
    renderer = DiffusionRenderer(Job(tmp_path, plan, folder, None, "cpu", 1, 1.0, 900.0))
    before = render(renderer)
    tensors, memory, seen = [], [], set()
    for seed in range(CHECKPOINTS):
        pictures = apply_and_render(renderer, tmp_path / "lora.safetensors", content(seed))
        seen.add(pictures.tobytes())
        if seed % 13 == 0:  # the count looks at every object there is; 13 takes each kind of LoRA in turn
            tensors.append(living_tensors())
        memory.append(resident_bytes())
    assert len(seen) == CHECKPOINTS, "each shows its own pictures"
    assert (render(renderer) == before).all(), "the base model's pictures, bit by bit"
    assert len(set(tensors)) == 1, tensors
    slope = np.polyfit(range(FITTED), memory[-FITTED:], 1)[0]
    assert slope < MOST_BYTES_PER_CHECKPOINT, f"{slope:.0f} bytes a checkpoint: {memory}"


def test_a_refusal_in_between_leaves_nothing_either(base_model, tmp_path):
    plan = make_plan(base_model=base_model, prompts=PROMPTS, device="cpu", num_samples=2, steps=2)
    renderer = DiffusionRenderer(Job(tmp_path, plan, base_model, None, "cpu", 1, 1.0, 900.0))
    path = tmp_path / "lora.safetensors"
    before = render(renderer)
    good = apply_and_render(renderer, path, tiny(0))
    count = living_tensors()
    misfit = {name: (2 * out, into) for name, (out, into) in UNET_MODULES.items()}
    with pytest.raises(RefusedCheckpointError, match="another width"):
        apply_and_render(renderer, path, lora_bytes(modules={**TEXT_MODULES, **misfit}))
    assert living_tensors() == count
    assert (apply_and_render(renderer, path, tiny(0)) == good).all()
    assert (render(renderer) == before).all()


def apply_and_render(renderer: DiffusionRenderer, path: Path, content: bytes) -> np.ndarray:
    path.write_bytes(content)
    checkpoint = read_checkpoint(path, path.parent)
    with renderer.lora(checkpoint, lora_modules(checkpoint)):
        return render(renderer)


def render(renderer: DiffusionRenderer) -> np.ndarray:
    return np.stack(renderer.render(lambda: None).pictures)


def living_tensors() -> int:
    import torch

    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

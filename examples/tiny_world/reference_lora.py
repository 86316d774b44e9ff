"""LoRA training in the fewest honest lines: the yardstick of the model card, independent of the product's trainers."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image

from examples.tiny_world.dataset import NUM_REPEATS
from examples.tiny_world.models import noise_scheduler
from examples.tiny_world.paths import BASE_MODEL, DATASET
from examples.tiny_world.training import encode_images, tokenize

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
BATCH = 4


def load_base() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(BASE_MODEL, dtype=torch.float32, safety_checker=None)


def train_reference_lora(
    pipeline: StableDiffusionPipeline,
    *,
    rank: int,
    learning_rate: float,
    epochs: int,
    on_epoch: Callable[[int], None],
    seed: int = 42,
) -> None:
    """Train a UNet LoRA (alpha = rank, AdamW, constant rate) on the data set; `on_epoch(n)` after every epoch.

    The adapter stays on the pipeline until `pipeline.unload_lora_weights()`.
    """
    torch.manual_seed(seed)
    shuffled = random.Random(seed)
    files = sorted(DATASET.rglob("*.png"))
    latents = encode_images(pipeline.vae, np.stack([np.asarray(Image.open(f)) for f in files]))
    with torch.no_grad():
        ids = tokenize(pipeline.tokenizer, [f.with_suffix(".txt").read_text().strip() for f in files])
        states = pipeline.text_encoder(ids).last_hidden_state
    noise = noise_scheduler()
    unet = pipeline.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    for epoch in range(1, epochs + 1):
        order = list(range(len(files))) * NUM_REPEATS
        shuffled.shuffle(order)
        unet.train()
        for start in range(0, len(order), BATCH):
            index = order[start : start + BATCH]
            times = torch.randint(0, 1000, (len(index),))
            eps = torch.randn_like(latents[index])
            noisy = noise.add_noise(latents[index], eps, times)
            loss = (unet(noisy, times, states[index]).sample - eps).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        unet.eval()
        on_epoch(epoch)

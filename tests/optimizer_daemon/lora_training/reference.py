"""The training objective in as few lines as it takes, sharing nothing with the product but its random draws.

The LoRA is folded into the frozen weights, W + alpha / rank * up @ down, instead of running beside them.
"""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch.func import functional_call
from transformers import CLIPTextModel, CLIPTokenizer


def frozen_latent(vae: AutoencoderKL, file: Path, *, flipped: bool = False) -> torch.Tensor:
    """Posterior sample of a 64 px image, drawn with the seed that its cache name gives."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    name = f"{digest}-64x64-64x64{'-flipped' if flipped else ''}.safetensors"
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) >> 1
    image = np.asarray(Image.open(file).convert("RGB")) / 255.0 * 2 - 1
    pixels = torch.tensor(image[:, ::-1].copy() if flipped else image).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed))
    return (posterior.mean + posterior.std * noise)[0] * vae.config.scaling_factor


def adapted(
    module: torch.nn.Module, blocks: tuple[str, ...], rank: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Fresh LoRA factors by weight name, in the order of `named_modules`, but a block's ff before its attn2.

    Numbers are drawn for down, up and down again, as where two layers are constructed and the first is initialised.
    """
    found = {}
    for outer, block in module.named_modules():
        if type(block).__name__ in blocks:
            layers = [(name, layer) for name, layer in block.named_modules() if hasattr(layer, "weight")]
            for inner, layer in sorted(layers, key=lambda pair: place(pair[0])):
                weight = layer.weight
                if isinstance(layer, torch.nn.Linear) or weight.shape[2:] == (1, 1):
                    down, up = torch.empty(rank, *weight.shape[1:]), torch.empty(weight.shape[0], rank)
                    for drawn in (down, up, down):
                        torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
                    up = torch.zeros(weight.shape[0], rank, *weight.shape[2:])
                    found[f"{outer}.{inner}.weight"] = (down.requires_grad_(), up.requires_grad_())
    return found


def place(name: str) -> tuple[int, int, int]:
    """Sorts a transformer's layers: by block, and attn1, ff, attn2 within one; all others stay where they are."""
    first, *rest = name.split(".")
    if first != "transformer_blocks":
        return (2 if first == "proj_out" else 0, 0, 0)
    return (1, int(rest[0]), {"attn1": 0, "ff": 1, "attn2": 2}.get(rest[1], 3))


def merged(module: torch.nn.Module, factors: dict, scale: float) -> dict[str, torch.Tensor]:
    weights = dict(module.named_parameters())
    for name, (down, up) in factors.items():
        change = (up.flatten(1) @ down.flatten(1)).reshape(weights[name].shape)
        weights[name] = weights[name] + scale * change
    return weights


def reference_losses(
    base: Path,
    captions: dict[str, str],
    images: Path,
    *,
    epochs: int,
    seed: int,
    lr: float,
    rank: int = 4,
    alpha: float = 1.0,
    velocity: bool = False,
    gamma: float | None = None,
    offset: float | None = None,
    accumulate: int = 1,
    clip_skip: int = 1,
    sgd: bool = False,
    clip: float = 1.0,
    flip: bool = False,
    repeats: dict[str, int] | None = None,
    counts: dict[str, float] | None = None,
) -> list[float]:
    """Loss of each optimizer step: batches of two, a constant rate, AdamW or SGD.

    An image is seen once and its loss counts once, unless `repeats` and `counts` say otherwise.
    """
    repeats, counts = repeats or {}, counts or {}
    load = {"local_files_only": True}
    unet = UNet2DConditionModel.from_pretrained(base / "unet", **load).eval().requires_grad_(False)
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder", **load).float().eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer", **load)
    vae = AutoencoderKL.from_pretrained(base / "vae", **load).eval()
    scheduler = DDPMScheduler.from_pretrained(base / "scheduler", **load)
    latents = {
        (name, flipped): frozen_latent(vae, images / f"{name}.png", flipped=flipped)
        for name in captions
        for flipped in {False, flip}
    }
    torch.manual_seed(seed)
    text_factors = adapted(encoder, ("CLIPAttention", "CLIPMLP"), rank)
    unet_factors = adapted(unet, ("Transformer2DModel",), rank)
    parameters = [p for factors in (text_factors, unet_factors) for pair in factors.values() for p in pair]
    optimizer = torch.optim.SGD(parameters, lr=lr) if sgd else torch.optim.AdamW(parameters, lr=lr)
    losses = []
    for epoch in range(1, epochs + 1):
        rng = random.Random(seed + epoch)
        order = [name for name in sorted(captions) for _ in range(repeats.get(name, 1))]
        rng.shuffle(order)
        batches = [order[start : start + 2] for start in range(0, len(order), 2)]
        rng.shuffle(batches)
        batches = [[(name, flip and rng.random() < 0.5) for name in batch] for batch in batches]
        for start in range(0, len(batches), accumulate):
            group = batches[start : start + accumulate]
            values = []
            for draws in group:
                names = [name for name, _ in draws]
                clean = torch.stack([latents[draw] for draw in draws])
                noise = torch.randn_like(clean)
                if offset:
                    noise = noise + offset * torch.randn(len(names), 4, 1, 1)
                times = torch.randint(0, 1000, (len(names),))
                ids = tokenizer(
                    [captions[n] for n in names], padding="max_length", truncation=True, return_tensors="pt"
                )
                kwargs = {"output_hidden_states": True}
                out = functional_call(encoder, merged(encoder, text_factors, alpha / rank), (ids.input_ids,), kwargs)
                states = encoder.final_layer_norm(out.hidden_states[-clip_skip])
                noisy = scheduler.add_noise(clean, noise, times)
                predicted = functional_call(
                    unet, merged(unet, unet_factors, alpha / rank), (noisy, times, states)
                ).sample
                target = scheduler.get_velocity(clean, noise, times) if velocity else noise
                error = ((predicted - target) ** 2).mean([1, 2, 3])
                error = error * torch.tensor([counts.get(name, 1.0) for name in names])
                if gamma is not None:
                    alphas = scheduler.alphas_cumprod[times]
                    snr = alphas / (1 - alphas)
                    error = error * torch.minimum(snr, torch.tensor(gamma)) / (snr + 1 if velocity else snr)
                (error.mean() / accumulate).backward()
                values.append(error.mean().item())
            if clip:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(sum(values) / len(values))
    return losses

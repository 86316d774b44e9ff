"""How the three networks of the tiny world are trained: VAE, CLIP, then UNet with its text encoder."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from examples.tiny_world.models import TEXT_LENGTH, noise_scheduler
from examples.tiny_world.pictures import COMBINATIONS, Pool
from examples.tiny_world.scenes import BASE_LIGHTINGS, LIGHTINGS, TARGET_LIGHTING, Scene, caption


class Progress:
    """One line every `every_s` seconds: step, loss, time left."""

    def __init__(self, name: str, steps: int, every_s: float = 20.0) -> None:
        self.name, self.steps, self.every_s = name, steps, every_s
        self.started = self.printed = time.monotonic()
        self.mean_loss = math.nan

    def step(self, step: int, loss: Tensor) -> None:
        value = float(loss.detach())
        self.mean_loss = value if math.isnan(self.mean_loss) else 0.98 * self.mean_loss + 0.02 * value
        now = time.monotonic()
        if now - self.printed >= self.every_s or step + 1 == self.steps:
            self.printed = now
            left = (now - self.started) / (step + 1) * (self.steps - step - 1)
            print(
                f"{self.name}: step {step + 1}/{self.steps}, loss {self.mean_loss:.4f}, {left:.0f} s left", flush=True
            )


def to_tensor(images: np.ndarray) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))) + 1e-3)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_vae(vae: AutoencoderKL, pool: Pool, *, steps: int, batch: int = 16, seed: int = 1) -> None:
    """Fit the autoencoder and set its `scaling_factor` so that latents have unit variance (as SD's 0.18215 does)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0)
    schedule = _schedule(optimizer, steps, 100)
    progress = Progress("vae", steps)
    vae.train()
    for step in range(steps):
        target = to_tensor(pool.images[rng.integers(0, len(pool.images), batch)])
        posterior = vae.encode(target).latent_dist
        restored = vae.decode(posterior.sample()).sample
        # L1 keeps edges crisp; the weak KL keeps the latent space smooth without costing detail
        loss = l1_loss(restored, target) + mse_loss(restored, target) + 1e-4 * posterior.kl().mean() / 1024
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.step(step, loss)
    vae.eval()
    sample = encode_images(vae, pool.images[:512], scaled=False)
    vae.register_to_config(scaling_factor=round(float(1 / sample.std()), 5))


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: np.ndarray, *, scaled: bool = True) -> Tensor:
    """(n, 64, 64, 3) uint8 -> (n, 4, 16, 16) latent means."""
    means = [
        vae.encode(to_tensor(chunk)).latent_dist.mean for chunk in np.array_split(images, max(1, len(images) // 64))
    ]
    return torch.cat(means) * (vae.config.scaling_factor if scaled else 1.0)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Inverse of `encode_images`; returns uint8 pictures."""
    chunks = torch.split(latents / vae.config.scaling_factor, 64)
    pictures = torch.cat([vae.decode(chunk).sample for chunk in chunks]).clamp(-1, 1)
    return ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(n, 77) token ids."""
    return tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def clip_pixels(images: np.ndarray) -> Tensor:
    """What the tiny CLIP's image processor computes: OpenAI CLIP's mean and standard deviation, no resize at 64 px."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return (to_tensor(images).add(1).div(2) - mean) / std


def train_clip(
    clip: CLIPModel, tokenizer: CLIPTokenizer, pool: Pool, *, steps: int, batch: int = 96, seed: int = 2
) -> None:
    """Contrastive training; CLIP, like the real one, has seen every style, the target style included.

    A batch never holds one combination twice under one caption, so the diagonal is the only right answer.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    by_key: dict[tuple[str, str, str, str], list[int]] = {}
    for index, s in enumerate(pool.scenes):
        by_key.setdefault((s.shape, s.color, s.background, s.lighting), []).append(index)
    optimizer = torch.optim.AdamW(clip.parameters(), 1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = _schedule(optimizer, steps, 100)
    progress = Progress("clip", steps)
    clip.train()
    for step in range(steps):
        with_style = step % 2 == 0
        if with_style:  # hard negatives: the same object in another style
            combos = rng.choice(len(COMBINATIONS), batch // len(LIGHTINGS), replace=False)
            keys = [(*COMBINATIONS[c], style) for c in combos for style in LIGHTINGS]
        else:
            combos = rng.choice(len(COMBINATIONS), batch, replace=False)
            keys = [(*COMBINATIONS[c], str(rng.choice(list(LIGHTINGS)))) for c in combos]
        images = clip_pixels(pool.images[[int(rng.choice(by_key[key])) for key in keys]])
        images = images + 0.08 * torch.rand(()) * torch.randn_like(images)  # renders are never quite clean
        captions = [caption(*key[:3], key[3] if with_style else None) for key in keys]
        # causal attention pools at the end token, so padding behind it would only cost time
        ids = tokenizer(captions, padding=True, return_tensors="pt").input_ids
        out = clip(input_ids=ids, pixel_values=images, return_loss=True)
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100.0))  # as in CLIP's own training
        schedule.step()
        progress.step(step, out.loss)
    clip.eval()


class Ema:
    """Exponential moving average of several modules' weights."""

    def __init__(self, modules: list[nn.Module], decay: float) -> None:
        self.modules, self.decay = modules, decay
        self.shadow = [copy.deepcopy(m).requires_grad_(False) for m in modules]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for module, shadow in zip(self.modules, self.shadow, strict=True):
            torch._foreach_lerp_(list(shadow.parameters()), list(module.parameters()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the modules hold the averaged weights."""
        kept = [copy.deepcopy(m.state_dict()) for m in self.modules]
        self.copy_to_modules()
        yield
        for module, state in zip(self.modules, kept, strict=True):
            module.load_state_dict(state)

    def copy_to_modules(self) -> None:
        for module, shadow in zip(self.modules, self.shadow, strict=True):
            module.load_state_dict(shadow.state_dict())


def base_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The caption the base model learns a picture with.

    One in ten is empty (classifier-free guidance). The target style's *name* appears on pictures of other styles, so
    that it is a known word without a meaning, as most words of a user's style are to Stable Diffusion.
    """
    assert scene.lighting in BASE_LIGHTINGS, "the base model must never see the target style"
    draw = rng.random()
    if draw < 0.10:
        return ""
    if draw < 0.22:
        return caption(scene.shape, scene.color, scene.background)
    if draw < 0.34:
        return caption(scene.shape, scene.color, scene.background, TARGET_LIGHTING)
    return scene.caption


def train_base(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    scenes: tuple[Scene, ...],
    *,
    steps: int,
    batch: int = 32,
    seed: int = 3,
    checkpoint_every: int,
    on_checkpoint: Callable[[int], None],
) -> None:
    """Train UNet and text encoder together on the epsilon objective; the modules end with the averaged weights.

    The cosine schedule is laid out for half as many steps again: the average over the last weights does the annealing,
    and the tail of the schedule would cost a third of the time for little.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    noise = noise_scheduler()
    alphas = noise.alphas_cumprod
    snr = alphas / (1 - alphas)
    modules: list[nn.Module] = [unet, text_encoder]
    parameters = [p for m in modules for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1.5e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = _schedule(optimizer, steps * 3 // 2, 200)
    ema = Ema(modules, 0.998)
    progress = Progress("base model", steps)
    for module in modules:
        module.train()
    for step in range(steps):
        index = rng.integers(0, len(scenes), batch)
        clean = latents[torch.from_numpy(index)]
        captions = [base_caption(scenes[i], rng) for i in index]
        times = torch.randint(0, noise.config.num_train_timesteps, (batch,))
        eps = torch.randn_like(clean)
        noisy = noise.add_noise(clean, eps, times)
        states = text_encoder(tokenize(tokenizer, captions)).last_hidden_state
        error = (unet(noisy, times, states).sample - eps).square().mean((1, 2, 3))
        # min-SNR (arXiv:2303.09556), gamma 5: the almost clean steps must not dominate
        loss = (error * (snr[times].clamp(max=5.0) / snr[times])).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        ema.update(step)
        progress.step(step, loss)
        if (step + 1) % checkpoint_every == 0:
            with ema.applied():
                on_checkpoint(step + 1)
    ema.copy_to_modules()
    for module in modules:
        module.eval()

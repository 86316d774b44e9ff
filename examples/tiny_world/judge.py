"""Two independent judges of a render: the tiny CLIP, and plain colour arithmetic that knows no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from examples.tiny_world.paths import CLIP_MODEL
from examples.tiny_world.pictures import COMBINATIONS
from examples.tiny_world.scenes import BACKGROUNDS, COLORS, SHAPES, caption, draw_scene, render
from examples.tiny_world.training import clip_pixels, tokenize

STEPS = 20
GUIDANCE = 3.0


@dataclass(frozen=True)
class Prompt:
    """A prompt whose right answer is known. `style` None leaves the style words out."""

    shape: str
    color: str
    background: str
    style: str | None = None

    @property
    def text(self) -> str:
        return caption(self.shape, self.color, self.background, self.style)


def random_prompts(count: int, styles: Sequence[str | None], seed: int) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    return [Prompt(*COMBINATIONS[int(rng.integers(len(COMBINATIONS)))], styles[i % len(styles)]) for i in range(count)]


def fixed_prompts(count: int, style: str | None = "harsh") -> list[Prompt]:
    """Every shape, colour and background in turn."""
    colors, backgrounds = list(COLORS), list(BACKGROUNDS)
    return [Prompt(SHAPES[i % 3], colors[i % 8], backgrounds[(i + i // 6) % 6], style) for i in range(count)]


def render_prompts(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    guidance: float = GUIDANCE,
    batch: int = 16,
) -> NDArray[np.uint8]:
    """(n, 64, 64, 3) uint8; picture i starts from seed + i."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    pictures = []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        out = pipeline(
            [p.text for p in chunk],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        )
        pictures.append((out.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def grid(rows: Sequence[NDArray[np.uint8]], zoom: int = 2) -> Image.Image:
    """One row of pictures per entry."""
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    picture = Image.fromarray(sheet)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def render_grid(pipeline: StableDiffusionPipeline, prompts: Sequence[Prompt], *, seed: int) -> Image.Image:
    return grid(np.split(render_prompts(pipeline, prompts, seed=seed), 2))


# --- judge one: CLIP -------------------------------------------------------------------------------------------------


class ClipJudge:
    """Top-1 retrieval among the 144 captions without style words, and the cosine between a picture and its prompt."""

    def __init__(self) -> None:
        self.clip = CLIPModel.from_pretrained(CLIP_MODEL, dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(CLIP_MODEL)
        self.answers = self.embed_text([caption(*c) for c in COMBINATIONS])

    @torch.no_grad()
    def embed_text(self, texts: list[str]) -> torch.Tensor:
        return self.clip(input_ids=tokenize(self.tokenizer, texts), pixel_values=torch.zeros(1, 3, 64, 64)).text_embeds

    @torch.no_grad()
    def embed_images(self, images: NDArray[np.uint8]) -> torch.Tensor:
        return self.clip(input_ids=tokenize(self.tokenizer, ["a"]), pixel_values=clip_pixels(images)).image_embeds

    def name(self, images: NDArray[np.uint8]) -> list[tuple[str, str, str]]:
        best = (self.embed_images(images) @ self.answers.T).argmax(1)
        return [COMBINATIONS[i] for i in best.tolist()]

    def consistency(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> NDArray[np.float64]:
        text = self.embed_text([p.text for p in prompts])
        return (self.embed_images(images) * text).sum(1).double().numpy()


# --- judge two: dominant colours -------------------------------------------------------------------------------------


class ColorJudge:
    """Names background and object colour by plain arithmetic; its references are ray-cast scenes, no network.

    The background is the median of the upper picture's rim, the object colour the dominant hue of the middle.
    """

    def __init__(self, lightings: Sequence[str], seed: int = 77) -> None:
        rng = np.random.default_rng(seed)
        self.rims: list[tuple[str, NDArray[np.float64]]] = []
        self.hues: list[tuple[str, float]] = []
        for lighting in lightings:
            for name in BACKGROUNDS:
                pictures = [render(draw_scene(rng, lighting, background=name)) for _ in range(16)]
                self.rims.append((name, np.median([_rim_color(p) for p in pictures], axis=0)))
            for name in COLORS:
                angles = [_middle_hue(render(draw_scene(rng, lighting, color=name))) for _ in range(24)]
                self.hues.append((name, float(np.angle(np.mean(np.exp(1j * np.array(angles)))))))

    def name(self, picture: NDArray[np.uint8]) -> tuple[str, str]:
        """Return (colour, background)."""
        rim, hue = _rim_color(picture), _middle_hue(picture)
        background = min(self.rims, key=lambda r: float(np.abs(r[1] - rim).sum()))[0]
        color = min(self.hues, key=lambda h: abs(float(np.angle(np.exp(1j * (h[1] - hue))))))[0]
        return color, background


def _rim_color(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    rim = np.concatenate(
        [picture[:4].reshape(-1, 3), picture[4:24, :5].reshape(-1, 3), picture[4:24, -5:].reshape(-1, 3)]
    )
    return np.asarray(np.median(rim, axis=0))


def _middle_hue(picture: NDArray[np.uint8]) -> float:
    """Hue angle (radians) where most of the colourfulness of the middle lies."""
    middle = picture[24:44, 24:40].reshape(-1, 3).astype(np.float64)
    # the opponent-colour plane: its angle is the hue, its radius the chroma, so pale highlights and shade weigh little
    plane = middle @ np.exp(2j * np.pi / 3 * np.arange(3))
    bins = np.round(np.angle(plane) / (np.pi / 36)).astype(int) % 72
    weight = np.bincount(bins, np.abs(plane), minlength=72)
    smooth = weight + np.roll(weight, 1) + np.roll(weight, -1)
    best = int(smooth.argmax())
    near = (bins - best + 36) % 72 - 36
    return float(np.angle(plane[np.abs(near) <= 1].sum()))

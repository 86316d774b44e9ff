"""Make the tiny world from nothing: `python -m examples.tiny_world.build`.

Steps, each repeatable alone with `--steps`: pictures (rendered into the work folder), tokenizer, vae, clip, base,
dataset, card. Seeds are fixed; on the same machine and library versions the weights come out the same. About 70
minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPImageProcessor, CLIPTokenizer

from examples.tiny_world import models, training
from examples.tiny_world.card import write_card
from examples.tiny_world.dataset import write_dataset
from examples.tiny_world.paths import BASE_MODEL, CLIP_MODEL, HERE
from examples.tiny_world.pictures import COMBINATIONS, Pool, render_pool
from examples.tiny_world.scenes import BASE_LIGHTINGS, LIGHTINGS

ALL_STEPS = ("pictures", "tokenizer", "vae", "clip", "base", "dataset", "card")
PICTURES_PER_COMBINATION = 24  # and per lighting


def pool_file(work: Path) -> Path:
    return work / "pool.npz"


def load_pool(work: Path, lightings: tuple[str, ...]) -> Pool:
    """The pictures of these lightings; scenes are drawn again from their seed, pixels come from the work folder."""
    stored = np.load(pool_file(work), allow_pickle=True)
    scenes = stored["scenes"].tolist()
    keep = [i for i, scene in enumerate(scenes) if scene.lighting in lightings]
    return Pool(stored["images"][keep], tuple(scenes[i] for i in keep))


def build_pictures(work: Path) -> None:
    pool = render_pool(11, len(COMBINATIONS) * len(LIGHTINGS) * PICTURES_PER_COMBINATION, tuple(LIGHTINGS))
    scenes = np.empty(len(pool.scenes), dtype=object)
    scenes[:] = pool.scenes
    np.savez(pool_file(work), images=pool.images, scenes=scenes)


def build_tokenizer(_: Path) -> None:
    models.build_tokenizer(BASE_MODEL / "tokenizer")


def build_vae(work: Path) -> None:
    torch.manual_seed(0)
    vae = models.new_vae()
    training.train_vae(vae, load_pool(work, tuple(LIGHTINGS)), steps=2200)
    vae.half().save_pretrained(BASE_MODEL / "vae")


def build_clip(work: Path) -> None:
    """Trained on pictures as the VAE restores them, because that is what it will have to judge."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(BASE_MODEL / "tokenizer")
    clip = models.new_clip(tokenizer)
    pool = load_pool(work, tuple(LIGHTINGS))
    vae = AutoencoderKL.from_pretrained(BASE_MODEL / "vae", dtype=torch.float32)
    every_third = np.arange(0, len(pool.images), 3)
    pool.images[every_third] = training.decode_latents(vae, training.encode_images(vae, pool.images[every_third]))
    training.train_clip(clip, tokenizer, pool, steps=1000)
    clip.half().save_pretrained(CLIP_MODEL)
    tokenizer.save_pretrained(CLIP_MODEL)
    size = models.IMAGE_SIZE_PX
    CLIPImageProcessor(
        size={"height": size, "width": size}, crop_size={"height": size, "width": size}, do_center_crop=False
    ).save_pretrained(CLIP_MODEL)


def build_base(work: Path) -> None:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(BASE_MODEL / "tokenizer")
    vae = AutoencoderKL.from_pretrained(BASE_MODEL / "vae", dtype=torch.float32)
    unet, text_encoder = models.new_unet(), models.new_text_encoder(tokenizer)
    pool = load_pool(work, BASE_LIGHTINGS)
    latents = training.encode_images(vae, pool.images)

    def pipeline() -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=models.noise_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def look(step: int) -> None:
        """A glance at the model on the way: 12 prompts, and the averaged weights kept in the work folder."""
        from examples.tiny_world.judge import fixed_prompts, render_grid

        render_grid(pipeline(), fixed_prompts(12), seed=100).save(work / f"base-{step:05d}.png")
        pipeline().save_pretrained(work / "base-latest")

    training.train_base(
        unet, text_encoder, tokenizer, latents, pool.scenes, steps=4000, checkpoint_every=1000, on_checkpoint=look
    )
    pipeline().to(dtype=torch.float16).save_pretrained(BASE_MODEL)
    forget_paths(BASE_MODEL)
    shutil.rmtree(work / "base-latest", ignore_errors=True)


def forget_paths(folder: Path) -> None:
    """Remove the builder's own paths, which the libraries note in the configurations they save."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n")


def build_dataset(_: Path) -> None:
    write_dataset()


def build_card(work: Path) -> None:
    write_card(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(ALL_STEPS), help="comma-separated, in order (default: all)")
    parser.add_argument("--work-dir", type=Path, default=HERE.parents[1] / "build" / "tiny_world")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all)")
    options = parser.parse_args()
    steps = options.steps.split(",")
    if unknown := [s for s in steps if s not in ALL_STEPS]:
        parser.error(f"--steps: no step named {unknown[0]!r}; choose from {', '.join(ALL_STEPS)}")
    torch.set_num_threads(options.threads)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    for step in steps:
        started = time.monotonic()
        print(f"== {step}", flush=True)
        globals()[f"build_{step}"](options.work_dir)
        print(f"== {step} done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

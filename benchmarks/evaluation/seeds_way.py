"""The usual way to score one checkpoint, as the comparison of `throughput`: plain diffusers in a process of its own.

It imports, loads the pipeline and the CLIP, applies the LoRA, renders one picture after the other, measures, writes
pictures and figures, and ends. Nothing of this project is used.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

BEGIN = time.perf_counter()


def main() -> None:
    """Score one LoRA and print the seconds of each phase as JSON."""
    parser = argparse.ArgumentParser()
    for flag in ("--base-model", "--lora", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--clip-model", type=Path)
    parser.add_argument("--prompts", nargs="+", required=True)
    for flag in ("--samples", "--steps", "--width", "--height", "--threads"):
        parser.add_argument(flag, type=int, required=True)
    parser.add_argument("--cfg-scale", type=float, required=True)
    options = parser.parse_args()

    import numpy as np
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from transformers import CLIPModel, CLIPProcessor

    torch.set_num_threads(options.threads)
    imported = time.perf_counter()
    pipeline = StableDiffusionPipeline.from_pretrained(
        options.base_model, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    pipeline.load_lora_weights(str(options.lora.parent), weight_name=options.lora.name)
    pipeline.set_progress_bar_config(disable=True)
    loaded = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    figures = []
    prompts = [options.prompts[index % len(options.prompts)] for index in range(options.samples)]
    images = []
    for index, prompt in enumerate(prompts):
        image = pipeline(
            prompt,
            num_inference_steps=options.steps,
            guidance_scale=options.cfg_scale,
            width=options.width,
            height=options.height,
            generator=torch.Generator().manual_seed(42 + index),
        ).images[0]
        image.save(options.out / f"sample_{index}.png")
        images.append(image)
    rendered = time.perf_counter()
    for image in images:
        rgb = np.asarray(image) / 255
        saturation = np.asarray(image.convert("HSV"))[..., 1] / 255
        figures.append([float(rgb.mean()), float(rgb.std()), float(saturation.mean())])
    if options.clip_model is not None:
        clip = CLIPModel.from_pretrained(options.clip_model, local_files_only=True)
        processor = CLIPProcessor.from_pretrained(options.clip_model, local_files_only=True)
        with torch.inference_mode():
            inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True, truncation=True)
            figures.append(clip(**inputs).logits_per_image.diagonal().tolist())
    (options.out / "metrics.json").write_text(json.dumps(figures))
    measured = time.perf_counter()
    phases = {
        "import": imported - BEGIN,
        "load": loaded - imported,
        "render": rendered - loaded,
        "measure": measured - rendered,
    }
    print(json.dumps(phases))


if __name__ == "__main__":
    main()

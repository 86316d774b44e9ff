"""Do the scoring presets pick the right checkpoint? The tiny world knows the answer.

python benchmarks/evaluation/presets.py train --into /tmp/presets    # real LoRAs, about 10 minutes on one core
python benchmarks/evaluation/presets.py score --into /tmp/presets    # writes benchmarks/evaluation/presets.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from evaluator_daemon.job import Job
from evaluator_daemon.metrics.base import Picture
from evaluator_daemon.renderers.diffusion import DiffusionRenderer
from examples.tiny_world.judge import GUIDANCE, fixed_prompts, random_prompts
from examples.tiny_world.paths import BASE_MODEL, CLIP_MODEL, DATASET_TOML
from examples.tiny_world.scenes import TARGET_LIGHTING
from optimizer_daemon.lora_training.config import TrainConfig, to_toml
from shared.held_out import study_pictures, with_held_out
from shared.planning import make_plan
from shared.safetensors_file import lora_modules, read_checkpoint

STUDY_SEED = 42
RANK = 16
EPOCHS = 12
EVERY = 2
RENDERED_EPOCHS = (2, 12, 6)
RATES = (3e-5, 5e-4, 1e-3, 2e-3, 6e-3, 2e-2)
TRAINING_SEEDS = (42,)
STUDY_PROMPTS = fixed_prompts(8, TARGET_LIGHTING)
TRUTH_PROMPTS = random_prompts(8, [TARGET_LIGHTING], seed=77)
TRUTH_SEED = 9000
RENDER_STEPS = 10


def run_name(rate: float, seed: int) -> str:
    return f"lr{rate:g}_seed{seed}"


def train(into: Path) -> None:
    """Train every rate with the native trainer, the held-out pictures left out; what is there is kept."""
    pictures = with_held_out(study_pictures(DATASET_TOML), STUDY_SEED)
    for seed in TRAINING_SEEDS:
        for rate in RATES:
            folder = into / run_name(rate, seed)
            if (folder / "lora.safetensors").exists():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            config = TrainConfig(
                pretrained_model_name_or_path=BASE_MODEL,
                dataset_config=DATASET_TOML,
                held_out=[picture.sha256 for picture in pictures.held_out],
                output_dir=folder,
                output_name="lora",
                latent_cache_dir=into / "latents",
                network_dim=RANK,
                network_alpha=float(RANK),
                learning_rate=rate,
                text_encoder_lr=0.0,
                max_train_epochs=EPOCHS,
                save_every_n_epochs=EVERY,
                seed=seed,
                device="cpu",
                threads=1,
            )
            (folder / "train_config.toml").write_text(to_toml(config))
            command = [sys.executable, "-m", "optimizer_daemon.lora_training", "--config"]
            with (folder / "training.log").open("w") as log:
                subprocess.run([*command, folder / "train_config.toml"], check=True, stdout=log, stderr=log)
            print(f"trained {folder.name}", flush=True)


def checkpoints(into: Path) -> list[Path]:
    """Return the files that are judged: RENDERED_EPOCHS of every run."""
    names = ["lora" if epoch == EPOCHS else f"lora-{epoch:06d}" for epoch in RENDERED_EPOCHS]
    runs = [into / run_name(rate, seed) for seed in TRAINING_SEEDS for rate in RATES]
    return [run / f"{name}.safetensors" for name in names for run in runs]


def render(into: Path) -> None:
    """Render the study's grids and the truth's with the base model and every checkpoint; what is there is kept."""
    plans = {
        "study": make_plan(
            base_model=BASE_MODEL,
            prompts=[prompt.text for prompt in STUDY_PROMPTS],
            device="cpu",
            num_samples=len(STUDY_PROMPTS),
            cfg_scale=GUIDANCE,
            steps=RENDER_STEPS,
        ),
        "truth": make_plan(
            base_model=BASE_MODEL,
            prompts=[prompt.text for prompt in TRUTH_PROMPTS],
            device="cpu",
            num_samples=len(TRUTH_PROMPTS),
            cfg_scale=GUIDANCE,
            steps=RENDER_STEPS,
            base_seed=TRUTH_SEED,
        ),
    }
    renderers = {
        # one grid is one batch, as in a study
        name: DiffusionRenderer(
            Job(into, plan.model_copy(update={"batch_size": 8}), BASE_MODEL, CLIP_MODEL, "cpu", 1, 1.0, 1.0)
        )
        for name, plan in plans.items()
    }
    for name, renderer in renderers.items():
        _keep(into / f"base_{name}.npz", lambda renderer=renderer: renderer.render(lambda: None).pictures)
    for file in checkpoints(into):
        checkpoint = read_checkpoint(file, file.parent)
        layout = lora_modules(checkpoint)
        for name, renderer in renderers.items():

            def pictures(renderer: DiffusionRenderer = renderer) -> list[Picture]:
                with renderer.lora(checkpoint, layout):  # noqa: B023  called at once
                    return renderer.render(lambda: None).pictures

            _keep(file.with_name(f"{file.stem}_{name}.npz"), pictures)
        print(f"rendered {file.parent.name}/{file.stem}", flush=True)


def _keep(file: Path, make: Callable[[], list[Picture]]) -> None:
    if not file.exists():
        temporary = file.with_suffix(".part.npz")
        np.savez_compressed(temporary, np.stack(make()))
        temporary.rename(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "render", "score"])
    parser.add_argument("--into", type=Path, required=True, help="folder of the trained LoRAs")
    options = parser.parse_args()
    {"train": train, "render": render}[options.what](options.into.absolute())


if __name__ == "__main__":
    main()

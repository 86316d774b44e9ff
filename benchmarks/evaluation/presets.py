"""Do the scoring presets pick the right checkpoint? The tiny world knows the answer.

python -m benchmarks.evaluation.presets train --into DIR     # real LoRAs, about 10 minutes on one core
python -m benchmarks.evaluation.presets render --into DIR
python -m benchmarks.evaluation.presets score --into DIR     # writes benchmarks/evaluation/presets.json

The recommended preset was chosen by looking at seed 42. Any other `--seed` trains, prompts and renders anew, and says
how far the choice carries: benchmarks/evaluation/presets_seed<N>.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from evaluator_daemon.job import Job
from evaluator_daemon.measuring import gate_of, measure, scores_of
from evaluator_daemon.metrics import METRICS
from evaluator_daemon.metrics.base import Picture, RenderedSet
from evaluator_daemon.metrics.targets import measure_targets
from evaluator_daemon.renderers.diffusion import DiffusionRenderer
from examples.tiny_world.judge import GUIDANCE, ClipJudge, Prompt, fixed_prompts, random_prompts
from examples.tiny_world.paths import BASE_MODEL, CLIP_MODEL, DATASET_TOML
from examples.tiny_world.scenes import TARGET_LIGHTING, draw_scene
from examples.tiny_world.scenes import render as ray_cast
from optimizer_daemon.lora_training.config import TrainConfig, to_toml
from shared.held_out import study_pictures, with_held_out
from shared.metric_names import MetricInputs, parse_metrics
from shared.planning import make_plan
from shared.safetensors_file import lora_modules, read_checkpoint
from shared.scoring_presets import COMBINED, load_preset, plan_scoring, preset_names

SCENES = 64
STUDY_SEED = 42
RANK = 16
EPOCHS = 12
EVERY = 2
RENDERED_EPOCHS = (2, 12, 6)
RATES = (3e-5, 5e-4, 1e-3, 2e-3, 6e-3, 2e-2)
STUDY_PROMPTS = fixed_prompts(8, TARGET_LIGHTING)
RENDER_STEPS = 10


@dataclass(frozen=True)
class Draw:
    """What chance decides.

    Args:
        seed: of the trainings; the truth's prompts, noise and scenes follow from it.
    """

    seed: int

    @property
    def truth_prompts(self) -> list[Prompt]:
        return random_prompts(8, [TARGET_LIGHTING], seed=self.seed + 35)

    @property
    def truth_noise(self) -> int:
        return 8958 + self.seed

    @property
    def report(self) -> Path:
        here = Path(__file__)
        return here.with_suffix(".json") if self.seed == STUDY_SEED else here.with_name(f"presets_seed{self.seed}.json")


def run_name(rate: float, seed: int) -> str:
    return f"lr{rate:g}_seed{seed}"


def train(into: Path, draw: Draw) -> None:
    """Train every rate with the native trainer, the held-out pictures left out; what is there is kept."""
    pictures = with_held_out(study_pictures(DATASET_TOML), STUDY_SEED)
    for rate in RATES:
        folder = into / run_name(rate, draw.seed)
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
            seed=draw.seed,
            device="cpu",
            threads=1,
        )
        (folder / "train_config.toml").write_text(to_toml(config))
        command = [sys.executable, "-m", "optimizer_daemon.lora_training", "--config"]
        with (folder / "training.log").open("w") as log:
            subprocess.run([*command, folder / "train_config.toml"], check=True, stdout=log, stderr=log)
        print(f"trained {folder.name}", flush=True)


def checkpoints(into: Path, draw: Draw) -> list[Path]:
    """Return the files that are judged: RENDERED_EPOCHS of every run."""
    names = ["lora" if epoch == EPOCHS else f"lora-{epoch:06d}" for epoch in RENDERED_EPOCHS]
    runs = [into / run_name(rate, draw.seed) for rate in RATES]
    return [run / f"{name}.safetensors" for name in names for run in runs]


def render(into: Path, draw: Draw) -> None:
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
            prompts=[prompt.text for prompt in draw.truth_prompts],
            device="cpu",
            num_samples=len(draw.truth_prompts),
            cfg_scale=GUIDANCE,
            steps=RENDER_STEPS,
            base_seed=draw.truth_noise,
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
    for file in checkpoints(into, draw):
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


@dataclass(frozen=True)
class Judged:
    """One checkpoint.

    Args:
        error: mean over the truth's prompts of the RMS difference (RGB/255) to the nearest true scene of the prompt.
        right: share of the truth's pictures in which CLIP names shape, colour and background as asked.
        feasible: whether the gate lets it pass.
        scores: each preset's score, lower is better.
        metrics: means of the study's pictures.
    """

    name: str
    error: float
    right: float
    feasible: bool
    scores: dict[str, float]
    metrics: dict[str, float]


def true_scenes(prompts: list[Prompt]) -> NDArray[np.float32]:
    """Return (prompts, SCENES, 64, 64, 3): fresh scenes in the target style, size, place, turn and light at random."""
    rng = np.random.default_rng(5)
    return (
        np.stack(
            [
                np.stack(
                    [
                        ray_cast(
                            draw_scene(rng, TARGET_LIGHTING, shape=p.shape, color=p.color, background=p.background)
                        )
                        for _ in range(SCENES)
                    ]
                )
                for p in prompts
            ]
        ).astype(np.float32)
        / 255
    )


def score(into: Path, draw: Draw) -> None:
    """Score the rendered checkpoints with every preset, and compare with the truth."""
    inputs = MetricInputs(
        clip_model=CLIP_MODEL,
        lpips_weights=Path("random"),
        pictures=with_held_out(study_pictures(DATASET_TOML), STUDY_SEED),
    )
    metrics = parse_metrics(None, inputs, tuple(sorted(set(METRICS.names) - {"dino_likeness"})))
    plans = {
        name: make_plan(
            base_model=BASE_MODEL,
            prompts=[prompt.text for prompt in STUDY_PROMPTS],
            device="cpu",
            scoring=plan_scoring(load_preset(name), metrics, inputs, measure_targets),
        )
        for name in preset_names()
    }
    plan = plans[COMBINED]
    job = Job(
        *(into, plan, BASE_MODEL, CLIP_MODEL, "cpu", 1, 1.0, 1.0),
        lpips_weights=Path("random"),
        pictures=inputs.pictures,
    )
    sources = [METRICS.load(name)(job) for name in metrics]
    truth_prompts = draw.truth_prompts
    scenes, clip = true_scenes(truth_prompts), ClipJudge()
    prompts = [prompt.text for prompt in STUDY_PROMPTS]
    base = list(np.load(into / "base_study.npz")["arr_0"])
    base_metrics = measure(sources, RenderedSet(base, prompts, None))

    def judged(name: str, study: list[Picture], truth: NDArray[np.uint8]) -> Judged:
        rendered = RenderedSet(study, prompts, base)
        found = measure(sources, rendered)
        named = clip.name(truth)
        asked = [(p.shape, p.color, p.background) for p in truth_prompts]
        apart = scenes - truth[:, None].astype(np.float32) / 255
        values = {preset: scores_of(found, p)[p.scoring.objective].value for preset, p in plans.items()}
        return Judged(
            name,
            float(np.sqrt(np.square(apart).mean(axis=(2, 3, 4))).min(axis=1).mean()),
            float(np.mean([n == a for n, a in zip(named, asked, strict=True)])),
            gate_of(rendered, found, base_metrics, plan).feasible,
            {preset: value for preset, value in values.items() if value is not None},
            {quantity: metric.value for quantity, metric in found.items() if metric.value is not None},
        )

    rows = [
        judged(
            f"{file.parent.name}/{file.stem}",
            list(np.load(file.with_name(f"{file.stem}_study.npz"))["arr_0"]),
            np.load(file.with_name(f"{file.stem}_truth.npz"))["arr_0"],
        )
        for file in checkpoints(into, draw)
    ]
    base_row = judged("base", base, np.load(into / "base_truth.npz")["arr_0"])
    report = {
        "base": asdict(base_row),
        "checkpoints": [asdict(row) for row in rows],
        "presets": {preset: _verdict(rows, lambda row, preset=preset: row.scores[preset]) for preset in plans},
        "single_metrics": {
            quantity: round(float(spearmanr([r.metrics[quantity] for r in rows], [r.error for r in rows]).statistic), 3)
            for quantity in rows[0].metrics
            if len({r.metrics[quantity] for r in rows}) > 1
        },
    }
    draw.report.write_text(json.dumps(_rounded(report), indent=1) + "\n")
    print(json.dumps(_rounded({"presets": report["presets"], "single": report["single_metrics"]}), indent=1))


def _verdict(rows: list[Judged], key: Callable[[Judged], float]) -> dict[str, object]:
    """Say how well a score ranks, and what it would choose with and without the gate."""
    feasible = [row for row in rows if row.feasible]
    with_gate, without = min(feasible, key=key), min(rows, key=key)
    return {
        "spearman_all": float(spearmanr([key(row) for row in rows], [row.error for row in rows]).statistic),
        "spearman_feasible": float(spearmanr([key(r) for r in feasible], [r.error for r in feasible]).statistic),
        "chosen": {"name": with_gate.name, "error": with_gate.error, "right": with_gate.right},
        "chosen_without_gate": {"name": without.name, "error": without.error, "right": without.right},
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "render", "score"])
    parser.add_argument("--into", type=Path, required=True, help="folder of the trained LoRAs")
    parser.add_argument("--seed", type=int, default=STUDY_SEED, help="of trainings and truth (default: %(default)s)")
    options = parser.parse_args()
    {"train": train, "render": render, "score": score}[options.what](options.into.absolute(), Draw(options.seed))


if __name__ == "__main__":
    main()

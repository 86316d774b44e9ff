"""Measure the tiny world and write its model card (README.md, card/)."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray

from evaluator_daemon.metrics.pixels import pixel_statistics, sentinel
from examples.tiny_world.dataset import NUM_REPEATS, dataset_scenes
from examples.tiny_world.judge import (
    GUIDANCE,
    STEPS,
    ClipJudge,
    ColorJudge,
    Prompt,
    fixed_prompts,
    grid,
    random_prompts,
    render_prompts,
)
from examples.tiny_world.paths import CARD, CARD_FILES
from examples.tiny_world.pictures import COMBINATIONS
from examples.tiny_world.reference_lora import load_base, train_reference_lora
from examples.tiny_world.scenes import BASE_LIGHTINGS, LIGHTINGS, TARGET_LIGHTING, draw_scene, render
from shared.scores.formulas import combined_score, gate

mpl.use("Agg")

EPOCHS = 12
MEASURED_EPOCHS = (2, 4, 6, 8, 10, 12)
RUNS: tuple[tuple[str, int, float], ...] = (
    ("too low", 16, 3e-5),
    ("good", 16, 1e-3),
    ("high", 16, 6e-3),
    ("collapse", 16, 2e-2),
    ("high rank", 64, 2e-3),
)
STUDY_SEED = 42
FRESH_SEED = 9000


def prompt_accuracy(pipeline: StableDiffusionPipeline, clip: ClipJudge) -> dict[str, float]:
    """200 fresh prompts in the two base styles and without a style, judged twice."""
    styles = [*BASE_LIGHTINGS, None]
    prompts = random_prompts(200, styles, seed=2001)
    images = render_prompts(pipeline, prompts, seed=FRESH_SEED)
    by_clip = clip.name(images)
    colors = ColorJudge(BASE_LIGHTINGS)
    by_color = [colors.name(image) for image in images]
    share = lambda hits: float(np.mean(list(hits)))  # noqa: E731
    return {
        "clip_shape": share(a[0] == p.shape for a, p in zip(by_clip, prompts, strict=True)),
        "clip_color": share(a[1] == p.color for a, p in zip(by_clip, prompts, strict=True)),
        "clip_background": share(a[2] == p.background for a, p in zip(by_clip, prompts, strict=True)),
        "clip_all_three": share(a == (p.shape, p.color, p.background) for a, p in zip(by_clip, prompts, strict=True)),
        "dominant_color": share(a[0] == p.color for a, p in zip(by_color, prompts, strict=True)),
        "dominant_background": share(a[1] == p.background for a, p in zip(by_color, prompts, strict=True)),
    }


def clip_retrieval(clip: ClipJudge) -> dict[str, float]:
    """Top-1 among the 144 captions, for fresh ray-cast scenes: every combination in every style."""
    rng = np.random.default_rng(4242)
    result = {}
    for lighting in LIGHTINGS:
        scenes = [draw_scene(rng, lighting, shape=s, color=c, background=b) for s, c, b in COMBINATIONS]
        named = clip.name(np.stack([render(scene) for scene in scenes]))
        result[lighting] = float(np.mean([n == c for n, c in zip(named, COMBINATIONS, strict=True)]))
    result["all"] = float(np.mean(list(result.values())))
    return result


def measure(images: NDArray[np.uint8], prompts: list[Prompt], clip: ClipJudge) -> dict[str, Any]:
    """Per-image numbers and the seed's score of one set of renders."""
    pixels = [pixel_statistics(image) for image in images]
    brightness, contrast = [p.brightness for p in pixels], [p.contrast for p in pixels]
    named = clip.name(images)
    return {
        "combined_score": combined_score(brightness, contrast).combined_score,
        "mean_brightness": float(np.mean(brightness)),
        "mean_contrast": float(np.mean(contrast)),
        "mean_sharpness": float(np.mean([p.sharpness for p in pixels])),
        "clip_consistency": clip.consistency(images, prompts).tolist(),
        "clip_accuracy": float(
            np.mean([n == (p.shape, p.color, p.background) for n, p in zip(named, prompts, strict=True)])
        ),
        "sentinels": [sentinel(p) for p in pixels],
    }


def with_gate(row: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    verdict = gate(row["sentinels"], row["clip_consistency"], base["clip_consistency"])
    difference = asdict(verdict.clip_difference) if verdict.clip_difference else None
    return {**row, "gate_passed": verdict.passed, "gate_reasons": list(verdict.reasons), "clip_difference": difference}


def learning_rates(pipeline: StableDiffusionPipeline, clip: ClipJudge) -> tuple[dict[str, Any], list[Any]]:
    """Train every row of RUNS and score it every two epochs on the study's grid of 8 prompts."""
    prompts = fixed_prompts(8, TARGET_LIGHTING)
    base_images = render_prompts(pipeline, prompts, seed=STUDY_SEED)
    base = measure(base_images, prompts, clip)
    rows: list[Any] = [base_images]
    results: dict[str, Any] = {"base": base}
    for name, rank, rate in RUNS:
        curve: list[dict[str, Any]] = []
        last: list[NDArray[np.uint8]] = []
        train_s = [0.0, time.monotonic()]
        evaluate_s: list[float] = []

        def look(
            epoch: int,
            curve: list[dict[str, Any]] = curve,
            last: list[NDArray[np.uint8]] = last,
            train_s: list[float] = train_s,
            evaluate_s: list[float] = evaluate_s,
        ) -> None:
            train_s[0] += time.monotonic() - train_s[1]
            if epoch in MEASURED_EPOCHS:
                started = time.monotonic()
                images = render_prompts(pipeline, prompts, seed=STUDY_SEED)
                curve.append({"epoch": epoch, **with_gate(measure(images, prompts, clip), base)})
                evaluate_s.append(time.monotonic() - started)
                last[:] = [images]
            train_s[1] = time.monotonic()

        train_reference_lora(pipeline, rank=rank, learning_rate=rate, epochs=EPOCHS, on_epoch=look)
        pipeline.unload_lora_weights()
        rows.append(last[0])
        results[name] = {
            "rank": rank,
            "learning_rate": rate,
            "curve": curve,
            "train_s_per_2_epochs": 2 * train_s[0] / EPOCHS,
            "evaluate_s": float(np.median(evaluate_s)),
        }
        tail = curve[-1]
        print(
            f"{name}: rank {rank}, rate {rate:g}: score "
            + " ".join(f"{c['combined_score']:.3f}" for c in curve)
            + f"; CLIP {np.mean(tail['clip_consistency']):.3f}; right {tail['clip_accuracy']:.2f}; "
            + f"gate {'passed' if tail['gate_passed'] else tail['gate_reasons']}",
            flush=True,
        )
    return results, rows


def plot_curves(results: dict[str, Any], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, _, _ in RUNS:
        curve = results[name]["curve"]
        epochs = [row["epoch"] for row in curve]
        label = f"{name} (rank {results[name]['rank']}, {results[name]['learning_rate']:g})"
        line = axes[0].plot(epochs, [row["combined_score"] for row in curve], label=label)[0]
        axes[1].plot(epochs, [np.mean(row["clip_consistency"]) for row in curve], color=line.get_color())
        for row in curve:
            if not row["gate_passed"]:
                axes[0].plot(row["epoch"], row["combined_score"], "x", color=line.get_color(), markersize=9)
    axes[0].axhline(results["base"]["combined_score"], color="gray", linestyle=":", label="base model")
    axes[1].axhline(np.mean(results["base"]["clip_consistency"]), color="gray", linestyle=":")
    axes[0].set(xlabel="epoch", ylabel="combined score (lower is better)", title="the seed's score; x = gate failed")
    axes[1].set(xlabel="epoch", ylabel="cosine", title="CLIP consistency")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write_card(work: Path) -> None:
    """Measure everything, then write card/measurements.json, the pictures and README.md."""
    CARD_FILES.mkdir(exist_ok=True)
    clip, pipeline = ClipJudge(), load_base()
    measured: dict[str, Any] = {"clip_retrieval_top1_of_144": clip_retrieval(clip)}
    print(measured["clip_retrieval_top1_of_144"], flush=True)
    measured["prompt_accuracy_200"] = prompt_accuracy(pipeline, clip)
    print(measured["prompt_accuracy_200"], flush=True)
    target = np.stack([render(scene) for scene in dataset_scenes()])
    data_prompts = [Prompt(s.shape, s.color, s.background, TARGET_LIGHTING) for s in dataset_scenes()]
    measured["training_set"] = measure(target, data_prompts, clip)
    base_rows = [
        render_prompts(pipeline, fixed_prompts(12, style), seed=7) for style in (*BASE_LIGHTINGS, TARGET_LIGHTING)
    ]
    grid(base_rows).save(CARD_FILES / "base_model.png", optimize=True)
    grid(np.split(target, 2)).save(CARD_FILES / "training_set.png", optimize=True)
    results, rows = learning_rates(pipeline, clip)
    measured["learning_rates"] = results
    grid(rows).save(CARD_FILES / "learning_rates.png", optimize=True)
    plot_curves(results, CARD_FILES / "learning_curves.png")
    measured = _rounded(measured)
    (CARD_FILES / "measurements.json").write_text(json.dumps(measured, indent=1) + "\n")
    CARD.write_text(card_text(measured))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def card_text(measured: dict[str, Any]) -> str:
    retrieval, prompts = measured["clip_retrieval_top1_of_144"], measured["prompt_accuracy_200"]
    runs, target = measured["learning_rates"], measured["training_set"]
    base = runs["base"]
    good, collapse = runs["good"], runs["collapse"]
    broken = min((row for row in collapse["curve"] if not row["gate_passed"]), key=lambda row: row["combined_score"])
    best = min((row for row in good["curve"] if row["gate_passed"]), key=lambda row: row["combined_score"])
    beaten = "beats" if broken["combined_score"] < best["combined_score"] else "comes near"
    table = "\n".join(_row(name, runs[name]) for name, _, _ in RUNS)
    return f"""# The tiny world

A latent diffusion model, a CLIP and a captioned data set, small enough to train and render on two CPU cores, shaped
like Stable Diffusion 1.5: same pipeline class, same noise schedule, CLIP tokenizer and text encoder of 77 tokens. Made
by `python -m examples.tiny_world.build` from fixed seeds; this page and `card/` are written by its last step.

Pictures are 64 x 64 px: {{ball, cube, cone}} x 8 colours x 6 backgrounds, ray-cast with numpy
([scenes.py](scenes.py)). The caption of one is "a red ball on black background, harsh style".

| part | what | trained |
|---|---|---|
| `base_model/vae` | AutoencoderKL, 0.24 M parameters, factor 4, fp16 | 2,200 steps of 16, all three styles |
| `base_model/unet` | UNet2DConditionModel, 4.1 M parameters, fp16 | 4,000 steps of 32, harsh and flat styles only |
| `base_model/text_encoder` | CLIPTextModel, 2 layers of 64, fp16 | together with the UNet |
| `clip` | CLIPModel, 0.6 M parameters, fp16; the judge | 1,000 steps of 96, all three styles |
| `dataset` | 24 captioned pictures in "pixar style": soft light, low contrast | - |

The base model never sees a picture in pixar style. It does see the words on pictures of other styles, so that they
are known words without a meaning, as a user's style name is to Stable Diffusion.

## The base model follows its prompts

200 fresh prompts (harsh, flat, or no style named), {STEPS} steps of DPM++ 2M Karras, guidance {GUIDANCE:g}. Judged by
the tiny CLIP (best of 144 captions) and, independently, by dominant colours compared with ray-cast scenes:

| judged by | shape | colour | background | all three |
|---|---|---|---|---|
| CLIP | {prompts["clip_shape"]:.1%} | {prompts["clip_color"]:.1%} | {prompts["clip_background"]:.1%} \
| {prompts["clip_all_three"]:.1%} |
| dominant colours | - | {prompts["dominant_color"]:.1%} | {prompts["dominant_background"]:.1%} | - |

CLIP itself names all three of shape, colour and background of {retrieval["all"]:.1%} of fresh ray-cast scenes at the
first guess among 144 (chance 0.7 %): harsh {retrieval["harsh"]:.1%}, flat {retrieval["flat"]:.1%}, pixar
{retrieval["pixar"]:.1%}.

![Twelve prompts in harsh, flat and pixar style, by the base model](card/base_model.png)

Rows: "harsh style", "flat style", "pixar style" (unknown to the base model).

## The style to learn

![The 24 training pictures](card/training_set.png)

The training set has mean brightness {target["mean_brightness"]:.3f} and contrast {target["mean_contrast"]:.3f}; the
targets are 0.50 and 0.20. Renders of the study's 8 prompts by the base model have {base["mean_brightness"]:.3f} and
{base["mean_contrast"]:.3f}.

## The learning rate matters

A UNet LoRA trained by [a few lines](reference_lora.py): alpha = rank, AdamW, constant rate, batch 4,
{24 * NUM_REPEATS // 4} steps an epoch. The seed's combined score of 8 renders on fixed prompts and seeds; lower is
better, base model {base["combined_score"]:.3f}. *Failed* marks checkpoints the gate refuses.

| run | rank | rate | {" | ".join(f"epoch {e}" for e in MEASURED_EPOCHS)} | CLIP consistency | right of 8 |
|---|---|---|{"---|" * len(MEASURED_EPOCHS)}---|---|
| base model | | | {" | " * (len(MEASURED_EPOCHS) - 1)} | {np.mean(base["clip_consistency"]):.3f} \
| {base["clip_accuracy"] * 8:.0f} |
{table}

![Base model and the last epoch of each run](card/learning_rates.png)

Rows: base model, then {", ".join(f"{name} ({rate:g})" for name, _, rate in RUNS)}, after {EPOCHS} epochs.

![Score and CLIP consistency over the epochs](card/learning_curves.png)

## Brightness and contrast alone are fooled

The collapsed LoRA scores {broken["combined_score"]:.3f} at epoch {broken["epoch"]}, which {beaten} the good one's best
({best["combined_score"]:.3f} at epoch {best["epoch"]}), with pictures that show nothing that was asked for. The gate
refuses it: {broken["gate_reasons"][0]}. Every checkpoint of the good run passes.

## Time

On two cores, two epochs of the good run train for {good["train_s_per_2_epochs"]:.1f} s and one evaluation of 8 samples
takes {good["evaluate_s"]:.1f} s ({good["train_s_per_2_epochs"] / good["evaluate_s"]:.1f} to 1).

All figures: [card/measurements.json](card/measurements.json).
"""


def _row(name: str, run: dict[str, Any]) -> str:
    last = run["curve"][-1]
    scores = [
        f"{row['combined_score']:.3f}" if row["gate_passed"] else f"*{row['combined_score']:.3f} failed*"
        for row in run["curve"]
    ]
    return (
        f"| {name} | {run['rank']} | {run['learning_rate']:g} | {' | '.join(scores)} "
        f"| {np.mean(last['clip_consistency']):.3f} | {last['clip_accuracy'] * 8:.0f} |"
    )

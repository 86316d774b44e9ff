"""Re-render a study's winner on fresh seeds and hold it against the base model.

    python -m examples.tiny_world.check_winner runs/tiny_world

Prints the figures, and exits 1 when the winner does not beat the base model, loses prompt accuracy or fails the gate.
`--picture FILE` keeps the renders, base above, winner below.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from evaluator_daemon.metrics.pixels import PixelStatistics, pixel_statistics, sentinel
from examples.tiny_world.judge import ClipJudge, Prompt, grid, render_prompts
from examples.tiny_world.reference_lora import load_base
from shared.files import read_model
from shared.layout import StudyLayout
from shared.schemas import BestParameters, Run
from shared.scores.formulas import TARGET_BRIGHTNESS, TARGET_CONTRAST, gate, paired_interval

FRESH_SEED = 70_000
CAPTION = re.compile(r"a (\w+) (\w+) on (\w+) background(?:, (\w+) style)?")


def prompt_of(text: str) -> Prompt:
    """Read a caption of the world back."""
    match = CAPTION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no caption of the tiny world")
    color, shape, background, style = match.groups()
    return Prompt(shape, color, background, style)


def distances(pixels: Sequence[PixelStatistics]) -> NDArray[np.float64]:
    """Each picture's distance to the target brightness and contrast; its mean is the score without the spread."""
    return np.array([abs(p.brightness - TARGET_BRIGHTNESS) + abs(p.contrast - TARGET_CONTRAST) for p in pixels])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="study folder")
    parser.add_argument("--seeds", type=int, default=16, help="fresh seeds (default: 16)")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    study = StudyLayout(options.study.resolve())
    best = read_model(study.results.best_parameters, BestParameters)
    plan = read_model(study.run, Run).plan
    assert plan is not None
    assert best.checkpoint is not None
    prompts = [prompt_of(plan.prompts[i % len(plan.prompts)]) for i in range(options.seeds)]
    torch.set_num_threads(2)
    pipeline, clip = load_base(), ClipJudge()
    base = render_prompts(pipeline, prompts, seed=FRESH_SEED, guidance=plan.cfg_scale)
    pipeline.load_lora_weights(study.root, weight_name=best.checkpoint)
    winner = render_prompts(pipeline, prompts, seed=FRESH_SEED, guidance=plan.cfg_scale)
    if options.picture:
        grid([*np.split(base, 2), *np.split(winner, 2)]).save(options.picture)

    pixels = [pixel_statistics(image) for image in winner]
    gained = paired_interval(list(distances([pixel_statistics(i) for i in base]) - distances(pixels)))
    right = [
        float(np.mean([n == (p.shape, p.color, p.background) for n, p in zip(clip.name(i), prompts, strict=True)]))
        for i in (base, winner)
    ]
    verdict = gate(
        [sentinel(p) for p in pixels],
        clip.consistency(winner, prompts).tolist(),
        clip.consistency(base, prompts).tolist(),
    )
    print(f"winner: trial {best.trial}, {best.checkpoint}, {best.objective} {best.value:.4f} in the study")
    print(f"nearer to the target by {gained.mean:.4f} a picture, 95 % interval {gained.low:.4f} to {gained.high:.4f}")
    print(f"all three of shape, colour, background right: base {right[0]:.1%}, winner {right[1]:.1%}")
    print(f"gate: {'passed' if verdict.passed else '; '.join(verdict.reasons)}")
    sys.exit(0 if gained.low > 0 and right[1] >= 0.8 * right[0] and verdict.passed else 1)


if __name__ == "__main__":
    main()

"""How often is the right checkpoint found, and do intervals, tie sets and certainties keep what they promise?

    python -m benchmarks.evaluation.statistics [--studies 2000] [--json FILE]

Simulated studies of ten checkpoints: a picture's value is the checkpoint's true score, plus what its prompt and seed do
to every checkpoint alike (sd .030), plus a residual (sd .012). Three ways for the true scores to lie:

    spread   normal with standard deviation .020: a usual study
    close    evenly over a range of .020, so that neighbours differ by .0022
    equal    all alike; one of them is named the best. No tie set may lose it in more than 5 % of studies

Figures are shares of studies; with 2,000 their standard error is at most .011.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.scores.statistics import difference, pseudo_values, rank

CHECKPOINTS = 10
SPREAD = 0.020
PICTURE_SD = 0.030
RESIDUAL_SD = 0.012
COUNTS = (8, 16, 32)
Values = NDArray[np.float64]


def true_scores(kind: str, rng: np.random.Generator) -> Values:
    """(checkpoints,) true scores; lower is better."""
    if kind == "spread":
        return rng.normal(0, SPREAD, CHECKPOINTS)
    if kind == "close":
        return rng.permutation(np.linspace(0, SPREAD, CHECKPOINTS))
    return np.where(np.arange(CHECKPOINTS) == 0, -1e-12, 0.0)


def rendered(
    scores: Values, pictures: int, rng: np.random.Generator, *, common: bool = True, unequal: float = 1.0
) -> Values:
    """(checkpoints, pictures) measured values.

    Args:
        common: all checkpoints share prompts and seeds; otherwise each has its own.
        unequal: how many times larger the first three checkpoints' residuals are.
    """
    count = len(scores)
    grid = rng.normal(0, PICTURE_SD, (1 if common else count, pictures))
    scale = RESIDUAL_SD * np.where(np.arange(count) < 3, unequal, 1.0)
    return scores[:, None] + grid + rng.normal(0, 1, (count, pictures)) * scale[:, None]


def winners(pictures: int, studies: int, seed: int) -> dict[str, float]:
    """How often the lowest mean of close checkpoints is the right one, with own and with common seeds."""
    rng = np.random.default_rng(seed)
    right = {"own": 0, "common": 0}
    for _ in range(studies):
        scores = true_scores("close", rng)
        for name in right:
            values = rendered(scores, pictures, rng, common=name == "common")
            right[name] += int(values.mean(axis=1).argmin() == scores.argmin())
    return {name: count / studies for name, count in right.items()}


def tie_sets(kind: str, pictures: int, studies: int, seed: int, unequal: float = 1.0) -> dict[str, Any]:
    """Coverage and size of tie sets, and each front-runner's certainty beside whether it was right."""
    rng = np.random.default_rng(seed)
    held = size = pooled = 0
    sure: list[tuple[float, bool]] = []
    for _ in range(studies):
        scores = true_scores(kind, rng)
        ranking = rank(rendered(scores, pictures, rng, unequal=unequal))
        truth = int(scores.argmin())
        held += truth in ranking.tied
        size += len(ranking.tied)
        pooled += ranking.pooled
        assert ranking.certainty is not None
        sure.append((ranking.certainty, ranking.best == truth))
    return {"coverage": held / studies, "size": size / studies, "pooled": pooled / studies, "sure": sure}


def calibration(
    sure: list[tuple[float, bool]], edges: tuple[float, ...] = (0, 0.5, 0.7, 0.9, 1.01)
) -> list[dict[str, float]]:
    """Front-runners by their certainty: the mean certainty said, and how many were right."""
    rows = []
    for low, high in pairwise(edges):
        inside = [(said, right) for said, right in sure if low <= said < high]
        if inside:
            said, right = (float(np.mean(column)) for column in zip(*inside, strict=True))
            rows.append({"from": low, "studies": len(inside), "said": said, "right": right})
    return rows


def bootstrap_coverage(pictures: int, studies: int, seed: int, draws: int = 1000) -> float:
    """How often a percentile bootstrap of the paired difference holds the truth, said to be 95 %."""
    rng = np.random.default_rng(seed)
    held = 0
    for _ in range(studies):
        differences = rng.normal(0, RESIDUAL_SD * math.sqrt(2), pictures)
        means = differences[rng.integers(0, pictures, (draws, pictures))].mean(axis=1)
        low, high = np.quantile(means, (0.025, 0.975))
        held += bool(low <= 0 <= high)
    return held / studies


def paired_coverage(pictures: int, studies: int, seed: int) -> float:
    """How often the paired-t interval holds the truth."""
    rng = np.random.default_rng(seed)
    held = 0
    for _ in range(studies):
        first, second = rendered(np.zeros(2), pictures, rng)
        interval = difference(list(first), list(second))
        held += interval.low <= 0 <= interval.high
    return held / studies


def jackknife_coverage(pictures: int, studies: int, seed: int, off_target: float) -> float:
    """How often the interval of a difference of combined scores holds the truth.

    Args:
        off_target: how far both checkpoints' true brightness and contrast are from their targets; the second
            checkpoint lies .01 further off.
    """
    rng = np.random.default_rng(seed)
    held = 0
    truth = -2 * (abs(off_target + 0.01) - abs(off_target))
    for _ in range(studies):
        offsets = np.array([off_target, off_target + 0.01])
        brightness, contrast = (rendered(target + offsets, pictures, rng) for target in (0.5, 0.2))
        scores, values = [], []
        for b, c in zip(brightness, contrast, strict=True):

            def score_of(indices: Any, b: Values = b, c: Values = c) -> float:
                at = list(indices)  # as scoring.combined_score, a hundred times faster
                terms = ((b[at], 0.5), (c[at], 0.2))
                return sum(abs(float(v.mean()) - target) + 0.5 * float(v.std()) for v, target in terms)

            scores.append(score_of(range(pictures)))
            values.append(pseudo_values(score_of, pictures))
        interval = difference(values[0], values[1], scores[0] - scores[1])
        held += interval.low <= truth <= interval.high
    return held / studies


def measure(studies: int) -> dict[str, Any]:
    """Everything, as the JSON holds it."""
    found: dict[str, Any] = {"studies": studies, "checkpoints": CHECKPOINTS}
    found["right_winner_of_close"] = {n: winners(n, studies, n) for n in COUNTS}
    found["coverage"] = {
        n: {
            "bootstrap": bootstrap_coverage(n, studies, n),
            "paired_t": paired_coverage(n, studies, n),
            "combined_score_off_target": jackknife_coverage(n, studies // 2, n, 0.05),
            "combined_score_at_target": jackknife_coverage(n, studies // 2, n, 0.0),
        }
        for n in COUNTS
    }
    found["tie_sets"] = {}
    for kind, unequal in (("spread", 1.0), ("close", 1.0), ("equal", 1.0), ("spread", 3.0)):
        name = kind if unequal == 1 else f"{kind}, three checkpoints three times as noisy"
        rows = {n: tie_sets(kind, n, studies, n, unequal) for n in COUNTS}
        for row in rows.values():
            row["calibration"] = calibration(row.pop("sure"))
        found["tie_sets"][name] = rows
    return found


def print_table(found: dict[str, Any]) -> None:
    """What a person reads."""
    print(f"{found['studies']} studies of {found['checkpoints']} checkpoints; pictures: " + ", ".join(map(str, COUNTS)))
    for seeds, title in (("own", "right winner of close ones, different seeds"), ("common", "the same, common seeds")):
        print(f"{title:52}", *(f"{found['right_winner_of_close'][n][seeds]:7.3f}" for n in COUNTS))
    for name in ("bootstrap", "paired_t", "combined_score_off_target", "combined_score_at_target"):
        print(f"{'95 % interval holds the truth: ' + name:52}", *(f"{found['coverage'][n][name]:7.3f}" for n in COUNTS))
    for kind, rows in found["tie_sets"].items():
        print(f"{kind}:")
        for field, title in (
            ("coverage", "tie set holds the best"),
            ("size", "its mean size"),
            ("pooled", "one variance"),
        ):
            print(f"    {title:48}", *(f"{rows[n][field]:7.3f}" for n in COUNTS))
        for n in COUNTS:
            said = "; ".join(f"{r['said']:.2f} {r['right']:.2f} ({r['studies']})" for r in rows[n]["calibration"])
            print(f"    certainty said, right, studies at {n}: {said}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="simulated studies per figure (default: 2000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    found = measure(arguments.studies)
    print_table(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Which way of searching finds the better configuration with the same training epochs?

    python -m benchmarks.search.compare [--seeds 50] [--epochs 480] [--families ...] [--strategies ...] [--jobs N]

Each seed is one synthetic task of each family (benchmarks/search/tasks.py) with its own noise, the same for every
strategy, so that strategies are compared in pairs. Regret is that of the noise-free score of the recommended
configuration: 0 is the best there is, 1 a random choice. Intervals are 95 %, by bootstrap over the seeds.

Writes comparison.json and comparison.png beside this file, unless --out names a folder, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.search.strategies import quietly, strategies
from benchmarks.search.tasks import FAMILIES, SMOOTH, Task

SHARES = (0.25, 0.5, 1.0)
TARGETS = (0.3, 0.2, 0.1)
RESAMPLES = 4_000
Regrets = NDArray[np.float64]


def study(job: tuple[str, str, int, int]) -> dict[str, Any]:
    """Run one strategy on one task."""
    name, family, seed, budget = job
    quietly()
    begin = time.process_time()
    run = strategies()[name](Task(family, seed), budget, seed)
    return {
        "strategy": name,
        "family": family,
        "seed": seed,
        "regret": [run.at(share * budget) for share in SHARES],
        "epochs_to": [run.epochs_to(target) for target in TARGETS],
        "trials": run.trials,
        "infeasible": run.infeasible,
        "cpu_s": time.process_time() - begin,
    }


def interval(values: Regrets) -> tuple[float, float, float]:
    """Return the mean and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def summary(results: list[dict[str, Any]], budget: int, seeds: int) -> dict[str, Any]:
    """Return the table: regret of each strategy on each family, and its difference from the first strategy's."""
    names = [name for name in strategies() if any(known["strategy"] == name for known in results)]
    families = [family for family in FAMILIES if any(known["family"] == family for known in results)]
    groups = {family: [family] for family in families}
    if smooth := [family for family in families if family in SMOOTH]:
        groups["all smooth"] = smooth
    groups["all"] = families
    table: dict[str, Any] = {}
    for group, members in groups.items():
        rows = {}
        regrets = {name: _regrets(results, name, members) for name in names}
        for name in names:
            mean, low, high = interval(regrets[name][:, -1])
            gain, gain_low, gain_high = interval(regrets[name][:, -1] - regrets[names[0]][:, -1])
            of_it = [known for known in results if known["strategy"] == name and known["family"] in members]
            rows[name] = {
                "regret": [float(regrets[name][:, place].mean()) for place in range(len(SHARES))],
                "interval": [low, high],
                "difference": gain,
                "difference_interval": [gain_low, gain_high],
                "epochs_to": [_median_epochs(of_it, place) for place in range(len(TARGETS))],
                "trials": float(np.mean([known["trials"] for known in of_it])),
                "infeasible": float(np.mean([known["infeasible"] for known in of_it])),
                "mean": mean,
            }
        table[group] = rows
    return {"epochs": budget, "seeds": seeds, "shares": SHARES, "targets": TARGETS, "families": table}


def _regrets(results: list[dict[str, Any]], name: str, families: list[str]) -> Regrets:
    """(seeds x families, shares) regrets, in the same order for every strategy."""
    found = sorted(
        (known["family"], known["seed"], known["regret"])
        for known in results
        if known["strategy"] == name and known["family"] in families
    )
    return np.array([regret for _, _, regret in found])


def _median_epochs(results: list[dict[str, Any]], place: int) -> float | None:
    median = float(np.median([known["epochs_to"][place] for known in results]))
    return median if math.isfinite(median) else None


def text(table: dict[str, Any]) -> str:
    """Return it for people."""
    lines = [
        f"{table['seeds']} seeds, {table['epochs']} epochs each; regret, 0 is the best there is, 1 a random choice"
    ]
    for group, rows in table["families"].items():
        lines += ["", f"{group:34} {'25 %':>6} {'50 %':>6} {'100 %':>6}  {'95 %':13}  less than the default's"]
        for name, row in rows.items():
            quarter, half, whole = row["regret"]
            low, high = row["interval"]
            gain_low, gain_high = row["difference_interval"]
            verdict = "better" if gain_high < 0 else "worse" if gain_low > 0 else "-"
            lines.append(
                f"{name:34} {quarter:6.3f} {half:6.3f} {whole:6.3f}  {low:.3f}..{high:.3f}  "
                f"{row['difference']:+.3f} ({gain_low:+.3f}..{gain_high:+.3f}) {verdict}"
            )
    return "\n".join(lines)


def plot(table: dict[str, Any], path: Path) -> None:
    """Draw the regrets after the whole budget, a panel for each family."""
    from matplotlib.figure import Figure

    groups = table["families"]
    figure = Figure(figsize=(4 * min(3, len(groups)), 3.2 * -(-len(groups) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(groups) // 3), min(3, len(groups)), squeeze=False).ravel()
    for axis, (group, rows) in zip(axes, groups.items(), strict=False):
        for place, (_, row) in enumerate(reversed(rows.items())):
            low, high = row["interval"]
            axis.errorbar(
                row["mean"], place, xerr=[[row["mean"] - low], [high - row["mean"]]], fmt="o", color="#2b6cb0"
            )
        axis.set_yticks(range(len(rows)), list(reversed(rows)), fontsize=7)
        axis.set_title(group, fontsize=9)
        axis.set_xlim(left=0)
    for axis in axes[len(groups) :]:
        axis.remove()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Compare and write what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search.compare", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=50, help="tasks of each family (default: 50)")
    parser.add_argument("--epochs", type=int, default=480, help="training epochs of each study (default: 480)")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--strategies", nargs="+", default=list(strategies()), choices=list(strategies()))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the JSON and the plot")
    arguments = parser.parse_args()
    jobs = [
        (name, family, seed, arguments.epochs)
        for seed in range(arguments.seeds)
        for family in arguments.families
        for name in arguments.strategies
    ]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results = []
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for done, result in enumerate(pool.imap_unordered(study, jobs), start=1):
            results.append(result)
            if done % 50 == 0 or done == len(jobs):
                print(f"{done} of {len(jobs)} studies", flush=True)
    table = summary(results, arguments.epochs, arguments.seeds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "comparison.json").write_text(json.dumps(table, indent=2) + "\n")
    plot(table, arguments.out / "comparison.png")
    print(text(table))


if __name__ == "__main__":
    main()

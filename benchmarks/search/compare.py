"""Which way of searching finds the better configuration with the same training epochs?

    python -m benchmarks.search.compare [--seeds 50] [--epochs 480] [--families ...] [--strategies ...] [--jobs N]

Each seed is one synthetic task of each family (benchmarks/search/tasks.py) with its own noise, the same for every
strategy, so that strategies are compared in pairs. Regret is that of the noise-free score of the recommended
configuration: 0 is the best there is, 1 a random choice. Intervals are 95 %, by bootstrap over the seeds.

Every study that is done is kept in studies.jsonl; a run that was ended goes on with what is missing, and --table shows
what there is. After a change of a strategy delete its lines.

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
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.search.strategies import quietly, strategies
from benchmarks.search.tasks import FAMILIES, SMOOTH, Task, space

SHARES = (0.25, 0.5, 1.0)
TARGETS = (0.3, 0.2, 0.1)
RESAMPLES = 4_000
LEAST_STUDIES = 10  # a bootstrap of fewer makes the interval too narrow to call anything better or worse
Regrets = NDArray[np.float64]
Job = tuple[str, int, int, list[str]]
"""(family, seed, epochs, strategies)."""


def studies(job: Job) -> list[dict[str, Any]]:
    """Run several strategies on one task, whose scale is then computed once."""
    family, seed, budget, names = job
    quietly()
    task = Task(family, seed)
    task.final(space().draw(Random(0)))
    return [study(name, task, budget) for name in names]


def study(name: str, task: Task, budget: int) -> dict[str, Any]:
    """Run one strategy on one task."""
    begin = time.process_time()
    run = strategies()[name](task, budget, task.seed)
    return {
        "strategy": name,
        "family": task.family,
        "seed": task.seed,
        "epochs": budget,
        "regret": [run.at(share * budget) for share in SHARES],
        "epochs_to": [reached if math.isfinite(reached := run.epochs_to(target)) else None for target in TARGETS],
        "trials": run.trials,
        "infeasible": run.infeasible,
        "cpu_s": round(time.process_time() - begin, 3),
    }


class Cache:
    """Finished studies, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.known: dict[tuple[str, str, int, int], dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                self._keep(json.loads(line))

    def _keep(self, result: dict[str, Any]) -> None:
        self.known[result["strategy"], result["family"], result["seed"], result["epochs"]] = result

    def add(self, results: list[dict[str, Any]]) -> None:
        """Write them down at once."""
        with self._path.open("a") as file:
            for result in results:
                file.write(json.dumps(result) + "\n")
                self._keep(result)


def interval(values: Regrets) -> tuple[float, float, float]:
    """Return the mean and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def summary(results: list[dict[str, Any]], budget: int) -> dict[str, Any]:
    """Return the table: regret of each strategy on each family, and its difference from the first strategy's.

    A strategy is compared on the tasks that both have done.
    """
    names = [name for name in strategies() if any(known["strategy"] == name for known in results)]
    families = [family for family in FAMILIES if any(known["family"] == family for known in results)]
    groups = {family: [family] for family in families}
    if len(smooth := [family for family in families if family in SMOOTH]) > 1:
        groups["all smooth"] = smooth
    groups["all"] = families
    done = {(known["strategy"], known["family"], known["seed"]): known for known in results}
    table: dict[str, Any] = {}
    for group, members in groups.items():
        rows = {}
        for name in names:
            of_it = [known for (by, family, _), known in sorted(done.items()) if by == name and family in members]
            pairs = [
                (known["regret"][-1], default["regret"][-1])
                for known in of_it
                if (default := done.get((names[0], known["family"], known["seed"]))) is not None
            ]
            if of_it and pairs:
                rows[name] = _row(of_it, np.array(pairs))
        table[group] = rows
    return {"epochs": budget, "shares": SHARES, "targets": TARGETS, "families": table}


def _row(of_it: list[dict[str, Any]], pairs: Regrets) -> dict[str, Any]:
    """What one strategy did on one group of families; `pairs` are its and the default's last regrets."""
    regrets = np.array([known["regret"] for known in of_it])
    mean, low, high = interval(regrets[:, -1])
    difference, least, most = interval(pairs[:, 0] - pairs[:, 1])
    return {
        "studies": len(of_it),
        "regret": [float(regrets[:, place].mean()) for place in range(len(SHARES))],
        "mean": mean,
        "interval": [low, high],
        "difference": difference,
        "difference_interval": [least, most],
        "share_of_default": _share(pairs),
        "epochs_to": [_median_epochs(of_it, place) for place in range(len(TARGETS))],
        "trials": float(np.mean([known["trials"] for known in of_it])),
        "infeasible": float(np.mean([known["infeasible"] for known in of_it])),
        "cpu_s": float(np.mean([known["cpu_s"] for known in of_it])),
    }


def _share(pairs: Regrets) -> list[float]:
    """Return the regret as a share of the default's, and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    means = pairs[rng.integers(0, len(pairs), (RESAMPLES, len(pairs)))].mean(axis=1)
    low, high = np.quantile(means[:, 0] / means[:, 1], (0.025, 0.975))
    return [float(pairs[:, 0].mean() / pairs[:, 1].mean()), float(low), float(high)]


def _median_epochs(results: list[dict[str, Any]], place: int) -> float | None:
    reached = [known["epochs_to"][place] for known in results]
    median = float(np.median([math.inf if epochs is None else epochs for epochs in reached]))
    return median if math.isfinite(median) else None


def text(table: dict[str, Any]) -> str:
    """Return it for people: all families side by side, then each by itself, as Markdown."""
    groups: dict[str, dict[str, Any]] = table["families"]
    names = list(dict.fromkeys(name for rows in groups.values() for name in rows))
    lines = [
        f"Regret after {table['epochs']} epochs: 0 is the best there is, 1 a random choice.",
        "Significantly better than the default is **bold**, significantly worse has an !.",
        "",
        f"| strategy | seeds | {' | '.join(groups)} |",
        f"|---|---|{'---|' * len(groups)}",
    ]
    for name in names:
        found = [rows.get(name) for rows in groups.values()]
        seeds = min(row["studies"] for row in found if row is not None)
        lines.append(f"| {name} | {seeds} | {' | '.join('' if row is None else _cell(row) for row in found)} |")
    for group, rows in groups.items():
        lines += [
            "",
            f"### {group}",
            "",
            "| strategy | studies | regret at 25 / 50 / 100 % | 95 % | against the default | share of it "
            "| epochs to .3 / .2 / .1 |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            low, high = row["interval"]
            least, most = row["difference_interval"]
            share, fewest, greatest = row["share_of_default"]
            regrets = " / ".join(f"{regret:.3f}" for regret in row["regret"])
            epochs = " / ".join("-" if known is None else f"{known:.0f}" for known in row["epochs_to"])
            lines.append(
                f"| {name} | {row['studies']} | {regrets} | {low:.3f}..{high:.3f} | "
                f"{row['difference']:+.3f} ({least:+.3f}..{most:+.3f}) | "
                f"{share:.0%} ({fewest:.0%}..{greatest:.0%}) | {epochs} |"
            )
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    least, most = row["difference_interval"]
    regret = f"{row['mean']:.3f}"
    if row["studies"] < LEAST_STUDIES:
        return regret
    return f"**{regret}**" if most < 0 else f"{regret} !" if least > 0 else regret


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
    figure.savefig(path, dpi=65)


def main() -> None:
    """Compare and write what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search.compare", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=50, help="tasks of each family (default: 50)")
    parser.add_argument("--epochs", type=int, default=480, help="training epochs of each study (default: 480)")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--strategies", nargs="+", default=list(strategies()), choices=list(strategies()))
    parser.add_argument("--first", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of what is written")
    parser.add_argument("--table", action="store_true", help="run nothing; show what is known")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cache = Cache(arguments.out / "studies.jsonl")
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    if not arguments.table:
        _run(cache, seeds, arguments)
    chosen = [
        known
        for (name, family, seed, epochs), known in cache.known.items()
        if name in arguments.strategies and family in arguments.families and seed in seeds
        and epochs == arguments.epochs
    ]  # fmt: skip
    table = summary(chosen, arguments.epochs)
    (arguments.out / "comparison.json").write_text(json.dumps(table, indent=1) + "\n")
    plot(table, arguments.out / "comparison.png")
    print(text(table))


def _run(cache: Cache, seeds: range, arguments: argparse.Namespace) -> None:
    """Run what is missing, seed by seed, so that what is known at any time is paired."""
    jobs: list[Job] = []
    for seed in seeds:
        for family in arguments.families:
            missing = [
                name for name in arguments.strategies if (name, family, seed, arguments.epochs) not in cache.known
            ]
            if missing:
                jobs.append((family, seed, arguments.epochs, missing))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for done, results in enumerate(pool.imap_unordered(studies, jobs), start=1):
            cache.add(results)
            if done % 20 == 0 or done == len(jobs):
                print(f"{done} of {len(jobs)} tasks", flush=True)


if __name__ == "__main__":
    main()

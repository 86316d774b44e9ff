"""How fast does our trainer start and step, beside sd-scripts and diffusers' example, on the same model and pictures?

    SD_SCRIPTS_DIR=... SD_SCRIPTS_PYTHON=... [DIFFUSERS_DIR=...] \
        python -m benchmarks.training.compare --cache DIR [--sizes 64 256 512] [--rounds N] [--steps N]

Run from the repository's root. The model is random, of Stable Diffusion 1.5's true sizes; it takes 2.1 GB in --cache.
For each size, with and without the text encoder:

- start: seconds from the start of a training to the end of its first step, --starts times, in turns, after one start
  that fills the caches of all. Ours is forked from the preloaded process, as from a study's second trial on.
- steps: all trainings live side by side, all but one stopped (SIGSTOP); each in turn runs for --steps steps, --rounds
  times. So whatever else loads the machine loads all alike. Wall and CPU seconds per step are medians over the rounds.

Ratios are of the totals, with the 95 % interval of a bootstrap over the starts or rounds.

Prints Markdown tables and writes every figure to --out. --device cuda --precision fp16 does the same on a GPU; give it
--steps 100, for our bar is drawn once a second, and the clock looks at bars.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.training.contestants import Contestant, Native, Task, contestants
from benchmarks.training.watching import Training
from benchmarks.training.world import World

OUT = Path(__file__).with_suffix(".json")
_RESAMPLES = 10_000


@dataclass
class Figures:
    """What was measured of one contestant at one task.

    Args:
        start_s, start_cpu_s: from the start to the end of the first step, for each start.
        wall_s, cpu_s: per step, for each round.
        peak_bytes: host memory, shared pages included.
        losses: mean loss as it was shown, by step.
    """

    start_s: list[float] = field(default_factory=list)
    start_cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    losses: dict[int, float] = field(default_factory=dict)


def ratio_interval(others: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of the totals with the ends of its 95 % interval, by a bootstrap over the pairs."""
    rng, pairs = random.Random(0), list(zip(others, ours, strict=True))
    drawn = []
    for _ in range(_RESAMPLES):
        sample = rng.choices(pairs, k=len(pairs))
        drawn.append(sum(other for other, _ in sample) / sum(own for _, own in sample))
    drawn.sort()
    return sum(others) / sum(ours), drawn[int(0.025 * _RESAMPLES)], drawn[int(0.975 * _RESAMPLES)]


def _ratio(others: Sequence[float], ours: Sequence[float]) -> str:
    if len(ours) == 1:
        return f"{others[0] / ours[0]:.2f}x (once)"
    return "{:.2f}x ({:.2f} to {:.2f})".format(*ratio_interval(others, ours))


def measure(task: Task, world: World, scratch: Path, *, starts: int, rounds: int, steps: int) -> dict[str, Figures]:
    """Return the figures by contestant; `scratch` gets the trainings' folders."""
    racing = [contestant for contestant in contestants(task, world) if contestant.takes(task)]
    figures = {contestant.name: Figures() for contestant in racing}
    running: dict[str, Training] = {}
    try:
        for contestant in racing:
            if isinstance(contestant, Native):
                while not contestant.server.settled():
                    time.sleep(0.05)
        for number in range(starts + 1):  # the first fills the caches
            for contestant in racing:
                folder = scratch / f"{contestant.name} {number}"
                folder.mkdir()
                training = _start(contestant, task, world, folder)
                running[contestant.name] = training
                if number > 0:
                    figures[contestant.name].start_s.append(time.monotonic() - training.begin)
                    figures[contestant.name].start_cpu_s.append(training.cpu_s)
                if number == starts:
                    training.pause()
                else:
                    running.pop(contestant.name).end()
        for _ in range(rounds):
            for name, training in running.items():
                wall, cpu = _run_steps(training, steps)
                figures[name].wall_s.append(wall)
                figures[name].cpu_s.append(cpu)
        for name, training in running.items():
            figures[name].peak_bytes, figures[name].losses = training.peak_bytes, training.losses
    finally:
        for training in running.values():
            training.go_on()
            training.end()
        for contestant in racing:
            if isinstance(contestant, Native):
                contestant.server.close()
    return figures


def _start(contestant: Contestant, task: Task, world: World, folder: Path) -> Training:
    training = contestant.start(task, world, folder)
    try:
        training.wait_for_step(1)
    except RuntimeError:
        training.end()
        raise
    return training


def _run_steps(training: Training, steps: int) -> tuple[float, float]:
    """Let it make so many steps; return wall and CPU seconds for each of them."""
    first, cpu, begin = training.step, training.cpu_s, time.monotonic()
    training.go_on()
    training.wait_for_step(first + steps)
    training.pause()
    made = training.step - first
    return (time.monotonic() - begin) / made, (training.cpu_s - cpu) / made


def table(results: dict[str, dict[str, Figures]]) -> str:
    """Return the Markdown table."""
    lines = [
        "| task | trainer | start to first step, s (CPU s) | native starts sooner | s/step (CPU s) "
        "| native steps faster | in CPU time | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, by_name in results.items():
        ours = by_name[Native.name]
        for name, figures in by_name.items():
            start = f"{statistics.median(figures.start_s):.1f} ({statistics.median(figures.start_cpu_s):.1f})"
            step = f"{statistics.median(figures.wall_s):.2f} ({statistics.median(figures.cpu_s):.2f})"
            sooner, faster, cheaper = "", "", ""
            if name != Native.name:
                sooner = _ratio(figures.start_s, ours.start_s)
                faster, cheaper = _ratio(figures.wall_s, ours.wall_s), _ratio(figures.cpu_s, ours.cpu_s)
            memory = f"{figures.peak_bytes / 2**30:.1f} GB"
            lines.append(f"| {task} | {name} | {start} | {sooner} | {step} | {faster} | {cheaper} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="keeps the model and the latents")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64], help="pixels of a side")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each trainer")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--starts", type=int, default=3, help="measured starts")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--rows", nargs="+", default=["both", "unet"], choices=["both", "unet"])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    world = World.at(options.cache.absolute())
    results: dict[str, dict[str, Figures]] = {}
    for size in options.sizes:
        for row in options.rows:
            task = Task(size, row == "both", options.batch_size, options.threads, options.device, options.precision)
            with tempfile.TemporaryDirectory(prefix="training-") as scratch:
                results[str(task)] = measure(
                    task,
                    world,
                    Path(scratch),
                    starts=options.starts,
                    rounds=options.rounds,
                    steps=options.steps,
                )
            print(table({str(task): results[str(task)]}), flush=True)
            _write(options, results)  # after each row: a stopped comparison keeps what it has measured
    print(table(results))


def _write(options: argparse.Namespace, results: dict[str, dict[str, Figures]]) -> None:
    written = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load": os.getloadavg(),
        "options": {name: str(value) for name, value in vars(options).items() if name not in ("cache", "out")},
        "results": {task: {name: asdict(one) for name, one in rows.items()} for task, rows in results.items()},
    }
    options.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

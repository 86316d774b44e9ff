"""How long does a checkpoint take, against the usual way and against the networks' own time?

    python -m benchmarks.evaluation.throughput [--samples 2 8] [--checkpoints N] [--sd15-size]

Run from the repository's root on an idle machine; files go to a temporary folder (TMPDIR chooses it). For each number
of pictures N random LoRAs of the tiny world, UNet and text encoder, are scored

- by the real `evaluator-daemon run --once`, manager and evaluator process: seconds from one metrics.json to the next,
- the usual way: `benchmarks.evaluation.seeds_way`, a fresh process for each that loads everything, renders the
  pictures one by one and measures the same,
- by the real `evaluator-daemon evaluate` with a clock at its networks (`benchmarks.evaluation.timed_evaluator`): a
  whole checkpoint against the time inside UNet, VAE and metric networks for its pictures; the text encoder's time is
  shown, and counts as time outside.

All render with the same prompts, size, steps and CPU threads, on the CPU. Prints medians with their quartiles and both
ratios, and writes all figures to --out. Targets: the daemon needs at most 1/5 of the usual way's time at 8 pictures,
1/10 at 2, and at most 1.25 times the time inside the networks. --sd15-size adds a random model of Stable Diffusion
1.5's size (2.1 GB on disk, 4.5 GB in memory) at --sd15-steps steps of 64 x 64 px, without the usual way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.tiny_world.paths import BASE_MODEL, CLIP_MODEL
from shared.layout import StudyLayout, TrialLayout
from shared.planning import CFG_SCALE, STEPS
from tests.evaluator_daemon.sd15_size import save_sd15_size, sd15_modules
from tests.evaluator_daemon.written_run import write_run
from tests.scenarios import lora_files

PROMPTS = ("a red circle on a blue background", "a green square", "two yellow triangles", "a white star, night")
OUT = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Spread:
    """Seconds, or a ratio, over several checkpoints."""

    median: float
    low_quartile: float
    high_quartile: float
    values: tuple[float, ...]

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Sum a list of at least two values up."""
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(middle, low, high, tuple(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low_quartile:.3f} to {self.high_quartile:.3f}, n = {len(self.values)})"


@dataclass(frozen=True)
class World:
    """What is measured: a base model, the shapes of its LoRAs, and the plan."""

    base_model: Path
    clip_model: Path | None
    modules: lora_files.Shapes
    samples: int
    steps: int
    threads: int


def study_with_loras(world: World, root: Path, checkpoints: int) -> TrialLayout:
    """Write a study of one trial with so many LoRAs."""
    study = StudyLayout(root)
    trial = study.trial(1)
    trial.folder.mkdir(parents=True)
    for epoch in range(1, checkpoints + 1):
        trial.intermediate_checkpoint(epoch).write_bytes(lora_files.lora(epoch, world.modules))
    write_run(
        study,
        world.base_model,
        PROMPTS,
        samples=world.samples,
        steps=world.steps,
        threads=world.threads,
        clip_model=world.clip_model,
    )
    return trial


def by_the_daemon(world: World, folder: Path, checkpoints: int) -> tuple[Spread, float]:
    """Return the seconds between successive results, and those of the whole command, start and model loading too."""
    trial = study_with_loras(world, folder, checkpoints)
    begin = time.perf_counter()
    call("-m", "evaluator_daemon.cli", "run", "--optimization-dir", trial.folder.parent, "--device", "cpu", "--once")
    whole = time.perf_counter() - begin
    written = sorted(path.stat().st_mtime for path in trial.evaluations.folder.glob("*/metrics.json"))
    if len(written) != checkpoints:
        raise SystemExit(f"{len(written)} of {checkpoints} checkpoints were scored; see {trial.evaluation_log}")
    return Spread.of([after - before for before, after in itertools.pairwise(written)]), whole


def by_the_usual_way(world: World, folder: Path, processes: int) -> tuple[Spread, dict[str, float]]:
    """Return the seconds of a process for each checkpoint, and the medians of its phases."""
    trial = study_with_loras(world, folder, processes)
    seconds: list[float] = []
    phases: list[dict[str, float]] = []
    width, height = plan_size(trial)
    for lora in sorted(trial.folder.glob("*.safetensors")):
        clip = ["--clip-model", world.clip_model] if world.clip_model else []
        begin = time.perf_counter()
        said = call(
            "-m", "benchmarks.evaluation.seeds_way", "--base-model", world.base_model, "--lora", lora, *clip,
            "--out", folder / lora.stem, "--prompts", *PROMPTS, "--samples", world.samples, "--steps", world.steps,
            "--width", width, "--height", height, "--threads", world.threads, "--cfg-scale", CFG_SCALE,
        )  # fmt: skip
        seconds.append(time.perf_counter() - begin)
        phases.append(json.loads(said.splitlines()[-1]))
    return Spread.of(seconds), {name: statistics.median(p[name] for p in phases) for name in phases[0]}


def against_the_networks(world: World, folder: Path, checkpoints: int) -> tuple[Spread, Spread, dict[str, float]]:
    """Return a checkpoint's seconds, its ratio to the time inside the networks, and the medians inside each."""
    trial = study_with_loras(world, folder, checkpoints)
    times = folder / "times.json"
    call(
        "-m", "benchmarks.evaluation.timed_evaluator", times, "evaluate", "--trial", trial.folder, "--device", "cpu"
    )  # fmt: skip
    entries = json.loads(times.read_text())
    ratios = [
        entry["whole"]
        / sum(seconds for name, seconds in entry["inside"].items() if not name.startswith("text_encoder"))
        for entry in entries
    ]
    inside = {name: statistics.median(e["inside"][name] for e in entries) for name in entries[0]["inside"]}
    return Spread.of([entry["whole"] for entry in entries]), Spread.of(ratios), inside


def plan_size(trial: TrialLayout) -> tuple[int, int]:
    """Return the width and height in pixels that the study renders."""
    plan = json.loads(StudyLayout(trial.folder.parent).run.read_text())["plan"]
    return plan["width"], plan["height"]


def call(*arguments: object) -> str:
    """Run Python with the repository's modules and return what it prints."""
    threads = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | threads
    ended = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments[:3]))} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    return ended.stdout


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--samples",
        type=int,
        nargs="*",
        default=[2, 8],
        help="pictures per checkpoint; none to leave the tiny world out",
    )
    parser.add_argument("--checkpoints", type=int, default=10, help="LoRAs per measurement, 3 or more")
    parser.add_argument("--processes", type=int, default=5, help="processes of the usual way, 2 or more")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="CPU threads")
    parser.add_argument("--sd15-size", action="store_true", help="measure a random model of SD 1.5's size, too")
    parser.add_argument("--sd15-steps", type=int, default=4, help="its sampling steps")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file for all figures")
    options = parser.parse_args()
    if options.checkpoints < 3 or options.processes < 2:
        parser.error("medians need --checkpoints 3 and --processes 2 at least")
    figures: dict[str, object] = {"threads": options.threads, "cores": os.cpu_count(), "load": os.getloadavg()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for samples in options.samples:
            world = World(BASE_MODEL, CLIP_MODEL, lora_files.every_module(), samples, STEPS, options.threads)
            daemon, command = by_the_daemon(world, folder / f"daemon_{samples}", options.checkpoints)
            usual, phases = by_the_usual_way(world, folder / f"usual_{samples}", options.processes)
            whole, ratio, inside = against_the_networks(world, folder / f"networks_{samples}", options.checkpoints)
            print(f"tiny world, {samples} pictures of {STEPS} steps, {options.threads} thread(s)")
            print(f"  the daemon, s per checkpoint   {daemon}")
            print(f"  its whole command, s           {command:.1f} for {options.checkpoints}")
            print(f"  the usual way, s               {usual}  {shown(phases)}")
            print(f"  the daemon / the usual way     1/{usual.median / daemon.median:.1f}")
            print(f"  whole checkpoint, s            {whole}")
            print(f"  inside the networks, s         {sum(inside.values()):.3f}  {shown(inside)}")
            print(f"  whole / inside                 {ratio}", flush=True)
            figures[f"tiny_world_{samples}"] = {
                "daemon_s": asdict(daemon), "daemon_command_s": command, "usual_s": asdict(usual),
                "usual_phases_s": phases, "usual_by_daemon": usual.median / daemon.median,
                "whole_s": asdict(whole), "inside_s": inside, "whole_by_inside": asdict(ratio),
            }  # fmt: skip
        if options.sd15_size:
            base = save_sd15_size(folder / "sd15")
            world = World(base, None, sd15_modules(), 2, options.sd15_steps, options.threads)
            whole, ratio, inside = against_the_networks(world, folder / "networks_sd15", 4)
            print(f"SD 1.5's size, 2 pictures of 64 x 64 px, {options.sd15_steps} steps, float32, rank 4")
            print(f"  whole checkpoint, s            {whole}")
            print(f"  inside the networks, s         {sum(inside.values()):.3f}  {shown(inside)}")
            print(f"  whole / inside                 {ratio}")
            figures["sd15_size"] = {
                "samples": 2, "steps": options.sd15_steps, "size_px": 64, "whole_s": asdict(whole),
                "inside_s": inside, "whole_by_inside": asdict(ratio),
            }  # fmt: skip
    options.out.write_text(json.dumps(figures, indent=1) + "\n")


def shown(seconds: dict[str, float]) -> str:
    """Write the parts of a time in one line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())


if __name__ == "__main__":
    main()

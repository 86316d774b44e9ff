"""Does pruning save training epochs on real trainings, and keep the best of them?

    python -m benchmarks.search.live [--seeds 1 2 3] [--trials 24] [--sampler random] [--work runs/live] [--out FILE]

For each seed one study on the tiny world without pruner and one with it: the optimizer daemon with the native trainer,
and the evaluator daemon, as a user starts them. The random sampler draws by seed and trial number alone, so both
train the same configurations with the same training seeds, which is checked. Compared are the epochs that were truly
trained (by the trainings' own logs), wall and CPU time, and the best measured scores: is the pruned study's best trial
in the tie set of the best without pruner?

A finished study is kept in the work folder and not run again; one that was interrupted goes on.
Writes live.json beside this file, unless --out names another, and prints the table. Seeds that the file holds already
are kept. A study or a file made with other options is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from examples.tiny_world.paths import BASE_MODEL, CLIP_MODEL, DATASET
from optimizer_daemon.search.curves import Curve
from optimizer_daemon.search.pruning import Pruner
from optimizer_daemon.trainers.native import TRAINER
from shared.durations import duration
from shared.errors import UserError
from shared.files import read_model
from shared.layout import StudyLayout, TrialLayout
from shared.schemas import EvaluationPlan, Metrics, Run, TrialParams, TrialState
from shared.scores.comparing import best_of, compare

HERE = Path(__file__).resolve().parent
MARK = "LORA_TUNER_LIVE"
ARMS = ("median", "none")  # the pruned one first: its saving is seen the sooner
SAMPLE_EVERY_S = 1.0
OPTIONS = ("trials", "pictures", "samples", "render_steps", "sampler")
"""What must be the same of all studies that are shown side by side."""
KEPT = ("n_trials", "pictures", "num_samples", "render_steps", "sampler", "seed", "pruner")
"""The same of one study, as its study file has it."""

STUDY = """
[optimizer]
base_model = "{base_model}"
clip_model = "{clip_model}"
dataset_config = "dataset.toml"
search_space = "{space}"
output_dir = "study"
study_name = "live"
device = "cpu"
cfg_scale = 3.0
num_samples = {samples}
render_steps = {render_steps}
save_every_n_epochs = 2
n_trials = {trials}
sampler = "{sampler}"
seed = {seed}
pruner = "{pruner}"

[evaluator]
optimization_dir = "study"
device = "cpu"
check_interval = 2
evaluator_check_interval = 1
"""

DATASET_TOML = """
[general]
caption_extension = ".txt"
enable_bucket = false
[[datasets]]
resolution = 64
batch_size = 2
[[datasets.subsets]]
image_dir = "pictures"
num_repeats = 1
"""


class Arm:
    """One study of the comparison.

    Args:
        folder: its own; the study lies below.
        seed: of the study.
        pruner: as `--pruner`.
        options: of the command line.
    Raises:
        UserError: the folder holds a study of other options.
    """

    def __init__(self, folder: Path, seed: int, pruner: str, options: argparse.Namespace) -> None:
        self.folder = folder
        self.pruner = pruner
        self.study = StudyLayout(folder / "study")
        self._usage = folder / "usage.json"
        text = STUDY.format(
            base_model=BASE_MODEL,
            clip_model=CLIP_MODEL,
            space=HERE / "live_space.toml",
            samples=options.samples,
            render_steps=options.render_steps,
            trials=options.trials,
            sampler=options.sampler,
            seed=seed,
            pruner=pruner,
        )
        study_file = folder / "study.toml"
        if study_file.exists():
            kept, wanted = tomllib.loads(study_file.read_text())["optimizer"], tomllib.loads(text)["optimizer"]
            kept["pictures"], wanted["pictures"] = len(list((folder / "pictures").glob("*.png"))), options.pictures
            same_options(kept, wanted, KEPT, folder, "--work")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "pictures").mkdir(exist_ok=True)
            pictures = sorted((DATASET / "pixar_style").glob("*.png"))
            for place in range(options.pictures):
                picture = pictures[5 * place % len(pictures)]  # they are sorted by colour and shape: some of each
                for file in (picture, picture.with_suffix(".txt")):
                    shutil.copy(file, folder / "pictures")
            (folder / "dataset.toml").write_text(DATASET_TOML)
            study_file.write_text(text)

    @property
    def finished(self) -> bool:
        return self.study.run.exists() and read_model(self.study.run, Run).status == "finished"

    @property
    def usage(self) -> dict[str, float]:
        """Wall and CPU seconds of all its processes, over all starts."""
        if not self._usage.exists():
            return {"wall_s": 0.0, "cpu_s": 0.0}
        found: dict[str, float] = json.loads(self._usage.read_text())
        return found

    def run(self) -> None:
        """Run both daemons until the study is finished."""
        begin, before, used = time.monotonic(), self.usage, CpuTime(str(self.folder))
        try:
            with self._daemon("evaluator", "--exit-when-finished") as evaluator, self._daemon("optimizer") as optimizer:
                while optimizer.poll() is None or (optimizer.returncode == 0 and evaluator.poll() is None):
                    used.sample()
                    time.sleep(SAMPLE_EVERY_S)
                if optimizer.returncode or evaluator.poll():
                    raise SystemExit(f"a daemon failed; see {self.folder}/*.out")
        finally:
            usage = {
                "wall_s": before["wall_s"] + time.monotonic() - begin,
                "cpu_s": before["cpu_s"] + used.seconds,
            }
            self._usage.write_text(json.dumps(usage))

    @contextmanager
    def _daemon(self, name: str, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a daemon; stop it in order when something else ends first."""
        command = [sys.executable, "-m", f"{name}_daemon.cli", "run", "--config", str(self.folder / "study.toml")]
        environment = {**os.environ, MARK: str(self.folder)}
        with (self.folder / f"{name}.out").open("ab") as output:
            daemon = subprocess.Popen([*command, *flags], env=environment, stdout=output, stderr=output)
        try:
            yield daemon
        finally:
            with suppress(ProcessLookupError):
                daemon.terminate()
            daemon.wait()


def same_options(kept: dict[str, Any], wanted: dict[str, Any], names: Sequence[str], place: Path, another: str) -> None:
    """Refuse what was made with other options.

    Raises:
        UserError: it names the first that differs.
    """
    for name in names:
        if kept.get(name) != wanted[name]:
            raise UserError(
                f"{place}: {name} is {kept.get(name)} there and {wanted[name]} here; "
                f"pass what it was made with, or another {another}"
            )


def results_in(out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a file of earlier results holds of each seed; nothing where there is none.

    Raises:
        UserError: the file is no such file, or of other options.
    """
    if not out.exists():
        return {}
    try:
        document = json.loads(out.read_text())
        kept, found = dict(document["options"]), dict(document["seeds"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}: holds no results of this command; pass another --out") from error
    same_options(kept, vars(options), OPTIONS, out, "--out")
    return found


def write_results(out: Path, options: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """Add each seed's results to the file and return all that it holds, by seed."""
    merged = {**results_in(out, options), **results}
    merged = {seed: merged[seed] for seed in sorted(merged, key=int)}
    document = {"options": {name: getattr(options, name) for name in OPTIONS}, "seeds": merged}
    out.write_text(json.dumps(document, indent=1) + "\n")
    return merged


class CpuTime:
    """CPU seconds of every process that carries the mark in its environment, the daemons' forks too.

    Looked at from time to time: what a process uses between the last look and its end is not seen.
    """

    def __init__(self, value: str) -> None:
        self._wanted = f"{MARK}={value}".encode()
        self._ours: dict[tuple[int, str], float] = {}

    @property
    def seconds(self) -> float:
        return sum(self._ours.values())

    def sample(self) -> None:
        """Look at all processes."""
        ticks = os.sysconf("SC_CLK_TCK")
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            with suppress(OSError):
                if self._wanted not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                self._ours[int(entry.name), fields[19]] = (int(fields[11]) + int(fields[12])) / ticks


def trained_epochs(trial: TrialLayout, epochs: int) -> float:
    """Return how many epochs a trial has truly trained, by its training's log, in parts of an epoch."""
    text = trial.training_log.read_text(errors="replace").replace("\r", "\n")
    told = [progress for line in text.splitlines() if (progress := TRAINER.parse_progress(line)) is not None]
    return max((epochs * line.step / line.steps for line in told if line.preparing is None and line.steps), default=0.0)


def trials_of(study: StudyLayout) -> list[dict[str, Any]]:
    """Return what became of each trial, by number."""
    found = []
    for layout in sorted(study.list_trials(), key=lambda trial: trial.number or 0):
        params, state = read_model(layout.params, TrialParams), read_model(layout.state, TrialState)
        epochs = params.max_train_epochs
        assert epochs is not None
        found.append(
            {
                "trial": state.trial,
                "state": state.state,
                "epochs": epochs,
                "trained": round(trained_epochs(layout, epochs), 2),
                "value": state.value,
                "feasible": state.feasible,
                "curve": {point.epoch: round(point.value, 5) for point in state.curve},
                "draw": [params.parameters, params.training_seed],
                "attempts": state.attempt + state.resumes,
            }
        )
    return found


def finals(study: StudyLayout, trials: Sequence[dict[str, Any]]) -> dict[str, Metrics]:
    """Return what was measured of each complete trial's final checkpoint, by its number as text."""
    found = {}
    for trial in trials:
        if trial["state"] == "complete":
            layout = study.trial(trial["trial"])
            path = layout.evaluations.checkpoint(layout.final_checkpoint.stem).metrics
            found[str(trial["trial"])] = read_model(path, Metrics)
    return found


def at_once(trials: Sequence[dict[str, Any]]) -> float:
    """Return the share of epochs the pruner would save if every score came the moment its checkpoint is written.

    Args:
        trials: of the study without pruner.
    """
    pruner, peers, trained = Pruner("median"), list[Curve](), 0
    for trial in trials:
        whole = Curve.of(trial["epochs"], trial["curve"])
        seen = [Curve(whole.horizon, whole.points[: place + 1]) for place in range(len(whole.points))]
        stopped = next((curve for curve in seen if pruner.objection(curve, peers)), None)
        trained += stopped.epoch if stopped else whole.horizon
        if stopped:
            peers.append(stopped)
        elif trial["feasible"]:
            peers.append(Curve(whole.horizon, whole.points, trial["value"]))
    return 1.0 - trained / sum(trial["epochs"] for trial in trials)


def compared(plain: Arm, pruned: Arm) -> dict[str, Any]:
    """Hold the study with pruner against the one without."""
    plans = [read_model(arm.study.run, Run).plan for arm in (plain, pruned)]
    plan = plans[0]
    assert plan is not None and plans[1] is not None
    if plan.digest() != plans[1].digest():
        raise SystemExit(f"{plain.folder} and {pruned.folder} were evaluated with different plans")
    before, after = trials_of(plain.study), trials_of(pruned.study)
    measured = [finals(arm.study, trials) for arm, trials in ((plain, before), (pruned, after))]
    of_plain, of_pruned = measured
    shared = of_plain.keys() & of_pruned.keys()
    objective = plan.scoring.objective
    epochs = [sum(trial["trained"] for trial in trials) for trials in (before, after)]
    return {
        "same_draws": [t["draw"] for t in before] == [t["draw"] for t in after],
        "same_scores": sum(
            of_plain[name].scores[objective].value == of_pruned[name].scores[objective].value for name in shared
        ),
        "complete_in_both": len(shared),
        "epochs": epochs,
        "saved": 1.0 - epochs[1] / epochs[0],
        "saved_if_scored_at_once": at_once(before),
        "pruned": sum(trial["state"] == "pruned" for trial in after),
        "failed": [sum(trial["state"] == "failed" for trial in trials) for trials in (before, after)],
        "gate_failed": [sum(trial["feasible"] is False for trial in trials) for trials in (before, after)],
        "wall_s": [arm.usage["wall_s"] for arm in (plain, pruned)],
        "cpu_s": [arm.usage["cpu_s"] for arm in (plain, pruned)],
        **best(of_plain, of_pruned, plan),
        "trials": [_row(first, second) for first, second in zip(before, after, strict=True)],
    }


def best(plain: dict[str, Metrics], pruned: dict[str, Metrics], plan: EvaluationPlan) -> dict[str, Any]:
    """Say whether the best with the pruner can be told from the best without."""
    ours, theirs = best_of(pruned, plan), best_of(plain, plan)
    assert ours is not None and theirs is not None, "no trial passed its gate"
    pair = compare({"pruned": pruned[ours.checkpoint], "plain": plain[theirs.checkpoint]}, plan)
    row = next(row for row in pair.rows if row.name == plan.scoring.objective)
    interval = row.differences[0].interval
    assert interval is not None
    return {
        "best": [[int(theirs.checkpoint), theirs.score], [int(ours.checkpoint), ours.score]],
        "difference": [ours.score - theirs.score, interval.low, interval.high],
        "tie_set": [int(name) for name in theirs.tie_set],
        "in_tie_set": ours.checkpoint in theirs.tie_set and interval.low <= 0.0 <= interval.high,
    }


def _row(plain: dict[str, Any], pruned: dict[str, Any]) -> dict[str, Any]:
    """One trial in both studies, for live.json."""
    return {
        "trial": plain["trial"],
        "epochs": plain["epochs"],
        "trained": pruned["trained"],
        "states": [plain["state"], pruned["state"]],
        "attempts": [plain["attempts"], pruned["attempts"]],
        "feasible": plain["feasible"],
        "curve": list(plain["curve"].values()),
        "scored_when_stopped": len(pruned["curve"]),
    }


def table(results: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| seed | epochs without | with pruner | fewer | if scored at once | stopped | best without | with pruner "
        "| difference, 95 % | in the tie set | CPU without, with |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, found in results.items():
        (first, value), (second, ours) = found["best"]
        mean, low, high = found["difference"]
        cpu = ", ".join(duration(seconds) for seconds in found["cpu_s"])
        lines.append(
            f"| {seed} | {found['epochs'][0]:.0f} | {found['epochs'][1]:.0f} | {found['saved']:.0%} "
            f"| {found['saved_if_scored_at_once']:.0%} | {found['pruned']} | {value:.4f} (trial {first}) "
            f"| {ours:.4f} (trial {second}) | {mean:+.4f} [{low:+.4f}, {high:+.4f}] "
            f"| {'yes' if found['in_tie_set'] else 'no'} of {len(found['tie_set'])} | {cpu} |"
        )
    saved = statistics.fmean(found["saved"] for found in results.values())
    return "\n".join([*lines, "", f"{saved:.1%} fewer epochs on average"])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Does pruning save epochs on real trainings and keep the best?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--pictures", type=int, default=8, help="of the data set's 24; two make a step")
    parser.add_argument("--samples", type=int, default=6, help="pictures per checkpoint")
    parser.add_argument("--render-steps", type=int, default=6)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--work", type=Path, default=Path("runs/live"))
    parser.add_argument("--out", type=Path, default=HERE / "live.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(options)
    except UserError as error:
        parser.error(str(error))


def run(options: argparse.Namespace) -> None:
    """Run what is missing and write what is found."""
    results_in(options.out, options)  # a file of other options is refused before hours of work
    for seed in options.seeds:
        arms = {
            name: Arm(options.work.absolute() / f"{options.sampler}_{seed}_{name}", seed, name, options)
            for name in options.arms
        }
        for name, arm in arms.items():
            if not arm.finished:
                print(f"seed {seed}, pruner {name} ...", flush=True)
                arm.run()
        if len(arms) == len(ARMS):
            found = {str(seed): compared(arms["none"], arms["median"])}
            print(table(write_results(options.out, options, found)), flush=True)


if __name__ == "__main__":
    main()

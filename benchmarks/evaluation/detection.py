"""How soon the evaluator daemon knows of a new trial or checkpoint, and what its manager costs while nothing happens.

`python -m benchmarks.evaluation.detection` builds study folders of finished trials (15 weight files each), puts the
real manager before each, measures, prints a table and writes detection.json beside this file. Another machine's work
at the same time shows in every figure.

- idle: CPU and memory of the manager over `--window` seconds without a change, from the end of its first sweep. 330 s
  hold one full sweep and eleven ticks at the default check interval.
- sweep: CPU time of one gated and one full sweep, in a process of its own.
- new trial: from before `mkdir` of a folder with a weight file until the manager's log says that it has seen it.
- new checkpoint: from before its rename, or the close of a file written in place, by turns, into a live trial until
  the manager's state file counts it; the manager starts no evaluator, as when others crowd the trial's out.
- evaluator: the same until the log of the trial's own evaluator names it, with the 0.25 s between its two looks at a
  file; start and memory of forked evaluators.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.evaluation.prepared import add_finished_trial, whole_file, write_documents
from evaluator_daemon.lookout import FULL_SWEEP_S, Lookout
from shared.files import read_model
from shared.layout import StudyLayout, TrialLayout
from shared.locks import FileLock
from shared.schemas import Run
from tests.scenarios.lora_files import STANDARD, lora
from tests.scenarios.written_study import make_trial, plan_study, set_state

RESULT = Path(__file__).with_name("detection.json")
PATIENCE_S = 120.0
LOOK_S = 0.0005
IDLE_TIMEOUT_S = 900.0

Row = dict[str, Any]


def measure(folders: int, folder: Path, window_s: float, rounds: int) -> Row:
    """Return one row of the table."""
    study = StudyLayout(folder / "study")
    plan_study(study)
    plan_hash = read_model(study.run, Run).plan_hash
    assert plan_hash is not None
    for number in range(1, folders + 1):
        add_finished_trial(study, number, plan_hash)
    time.sleep(3.0)  # younger stamps are not trusted
    row: Row = {"folders": folders, **_sweeps(study, plan_hash)}
    with _manager(study) as manager:
        row["first_sweep_s"] = round(_until(study.manager_state.exists, "the first sweep"), 2)
        row |= _idle(manager.pid, window_s)
    with FileLock(study.optimizer_lock), _manager(study, without_evaluators=True):
        _until(lambda: _waiting(study) == 0, "the first sweep")
        live = study.trial(folders + 1)
        live.folder.mkdir()
        write_documents(live, "training")
        _until(lambda: f"trial seen trial={live.name}" in study.manager_log.read_text(), "the live trial")
        row["new_trial_s"] = _spread([_new_trial(study, number) for number in range(rounds)])
        row["new_checkpoint_s"] = _spread([_new_checkpoint(study, live, epoch) for epoch in range(1, rounds + 1)])
    # The worst that can be: a full sweep, which comes every 300 s, is always due.
    with FileLock(study.optimizer_lock), _manager(study, without_evaluators=True, full_sweep_s=0.5):
        _until(lambda: _waiting(study) == rounds, "the first sweep")
        row["new_trial_in_full_sweeps_s"] = _spread([_new_trial(study, number) for number in range(rounds)])
    return row


def measure_evaluators(folder: Path, rounds: int) -> Row:
    """Return start, memory and detection of forked evaluators on the tiny world."""
    study = StudyLayout(folder / "study")
    plan_study(study)
    row: Row = {}
    with FileLock(study.optimizer_lock), _manager(study):
        _until(study.manager_state.exists, "the manager")
        starts, pids = [], []
        for number in (1, 2):
            trial = make_trial(study, number, "training")
            begin = time.monotonic()
            (trial.folder / "half.safetensors").write_bytes(whole_file(bytes(99))[:-1])
            _until(lambda trial=trial: "checkpoint=half" in _text(trial.evaluation_log), f"evaluator {number}")
            starts.append(round(time.monotonic() - begin, 3))
            pids.append(_pid_of(study, trial))
            (trial.folder / "half.safetensors").unlink()
        row["start_first_s"], row["start_later_s"] = starts
        server = psutil.Process(pids[0]).ppid()
        row["server_mb"] = _memory(server)
        row["evaluator_waiting_mb"] = _memory(pids[1])
        trial = study.trial(2)
        row["evaluator_new_checkpoint_s"] = _spread([_seen_by_evaluator(trial, number) for number in range(rounds)])
        begin = time.monotonic()
        trial.intermediate_checkpoint(2).write_bytes(lora(2, metadata=STANDARD))
        _until(lambda: "checkpoint recorded" in _text(trial.evaluation_log), "a score")
        row["first_score_s"] = round(time.monotonic() - begin, 2)
        row["evaluator_with_model_mb"] = _memory(pids[1])
        for number in (1, 2):
            set_state(study.trial(number), "complete")
        row["end_after_trial_s"] = round(
            _until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "the evaluators' end"), 3
        )
        row["server_after_mb"] = _memory(server)
    return row


# ----------------------------------------------------------------------------------------------------------- measuring


def _sweeps(study: StudyLayout, plan_hash: str) -> Row:
    code = "import sys; from benchmarks.evaluation.detection import print_sweeps as run; run(sys.argv[1], sys.argv[2])"
    result = subprocess.run([sys.executable, "-c", code, study.root, plan_hash], capture_output=True, check=True)
    return dict(json.loads(result.stdout))


def print_sweeps(root: str, plan_hash: str) -> None:
    """Print the CPU milliseconds of a first, a gated and a full sweep."""

    def cost_ms(lookout: Lookout) -> float:
        begin = time.process_time()
        views = lookout.sweep((), lambda trial: None, lambda name: None)
        assert not views
        return (time.process_time() - begin) * 1e3

    gated = Lookout(StudyLayout(Path(root)), plan_hash, IDLE_TIMEOUT_S)
    first = cost_ms(gated)
    now_s = [0.0]
    full = Lookout(StudyLayout(Path(root)), plan_hash, IDLE_TIMEOUT_S, full_sweep_s=1.0, clock=lambda: now_s[0])

    def full_cost_ms() -> float:
        now_s[0] += 2.0
        total = cost_ms(full)
        while full.is_under_way:
            total += cost_ms(full)
        return total

    full_cost_ms()
    figures = {
        "sweep_first_ms": first,
        "sweep_gated_ms": statistics.median(cost_ms(gated) for _ in range(7)),
        "sweep_full_ms": statistics.median(full_cost_ms() for _ in range(5)),
    }
    print(json.dumps({name: round(figure, 1) for name, figure in figures.items()}))


def _idle(pid: int, window_s: float) -> Row:
    process = psutil.Process(pid)
    begin, before = time.monotonic(), process.cpu_times()
    time.sleep(window_s)
    after, seconds = process.cpu_times(), time.monotonic() - begin
    used = after.user + after.system - before.user - before.system
    return {
        "idle_window_s": round(seconds),
        "idle_cpu_percent": round(100 * max(0.0, used) / seconds, 3),
        "rss_mb": round(process.memory_info().rss / 2**20, 1),
        "peak_rss_mb": round(_status_kb(pid, "VmHWM") / 1024, 1),
        "threads": process.num_threads(),
    }


def _new_trial(study: StudyLayout, number: int) -> float:
    time.sleep(random.uniform(0.02, 0.1))
    folder = study.root / f"trial_new_{number}"
    begin = time.monotonic()
    folder.mkdir()
    (folder / "w.safetensors").write_bytes(whole_file(b"12345678"))
    line = f"trial seen trial={folder.name} "
    with study.manager_log.open() as log:
        log.seek(max(0, study.manager_log.stat().st_size - 4096))
        text = ""

        def seen() -> bool:
            nonlocal text
            text += log.read()
            return line in text

        _until(seen, folder.name)
    seconds = time.monotonic() - begin
    shutil.rmtree(folder)
    return seconds


def _new_checkpoint(study: StudyLayout, trial: TrialLayout, epoch: int) -> float:
    time.sleep(random.uniform(0.02, 0.1))
    before, path = _waiting(study), trial.intermediate_checkpoint(epoch)
    content = whole_file(epoch.to_bytes(8, "little"))
    if epoch % 2:
        temporary = path.with_name(".tmp-new")
        temporary.write_bytes(content)
        begin = time.monotonic()
        temporary.rename(path)
    else:
        with path.open("wb") as file:
            file.write(content[:20])
            file.flush()
            time.sleep(0.05)
            file.write(content[20:])
            file.flush()
            begin = time.monotonic()
    _until(lambda: _waiting(study) != before, path.name)
    return time.monotonic() - begin


def _seen_by_evaluator(trial: TrialLayout, number: int) -> float:
    time.sleep(random.uniform(0.02, 0.1))
    temporary = trial.folder / ".tmp-new"
    temporary.write_bytes(whole_file(bytes(99))[:-1])
    begin = time.monotonic()
    path = temporary.rename(trial.folder / f"half-{number}.safetensors")
    _until(lambda: f"checkpoint=half-{number} " in _text(trial.evaluation_log), path.name)
    seconds = time.monotonic() - begin
    path.unlink()
    return seconds


def _memory(pid: int) -> Row:
    """MiB of a process: resident, its share of what is shared, and what is its alone."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    names = ("Rss", "Pss", "Private_Dirty", "Shared_Dirty")
    found = {name: re.search(rf"^{name}:\s+(\d+) kB", rollup, re.MULTILINE) for name in names}
    return {name: round(int(match[1]) / 1024, 1) for name, match in found.items() if match}


def _spread(seconds: Sequence[float]) -> Row:
    ordered = sorted(seconds)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    found = {name: round(ordered[min(len(ordered) - 1, int(part * len(ordered)))], 4) for name, part in at.items()}
    return {"n": len(ordered), **found}


# ------------------------------------------------------------------------------------------------------------- helpers


@contextlib.contextmanager
def _manager(
    study: StudyLayout, *, without_evaluators: bool = False, full_sweep_s: float = FULL_SWEEP_S
) -> Iterator[subprocess.Popen[bytes]]:
    """The real manager at its default intervals, as a person starts it or kept from starting evaluators."""
    study.manager_state.unlink(missing_ok=True)
    command = ["-m", "evaluator_daemon.cli", "run", "--optimization-dir", study.root, "--device", "cpu"]
    if without_evaluators:
        command = ["-m", "benchmarks.evaluation.manager_alone", study.root, "--full-sweep", str(full_sweep_s)]
    with (study.root / "manager.err").open("wb") as errors:
        process = subprocess.Popen([sys.executable, *command], stderr=errors)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)


def _until(condition: Callable[[], bool], what: str) -> float:
    """Wait for a condition and return how many seconds it took.

    Raises:
        TimeoutError: it does not come.
    """
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > PATIENCE_S:
            raise TimeoutError(f"{what} is not seen within {PATIENCE_S:.0f} s")
        time.sleep(LOOK_S)
    return time.monotonic() - begin


def _waiting(study: StudyLayout) -> int | None:
    """How many checkpoints wait, by the manager's state file; None before there is one."""
    with contextlib.suppress(FileNotFoundError):
        match = re.search(rb'"waiting_checkpoints": (\d+)', study.manager_state.read_bytes())
        return int(match[1]) if match else None
    return None


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _pid_of(study: StudyLayout, trial: TrialLayout) -> int:
    match = re.search(rf"evaluator started trial={trial.name} pid=(\d+)", study.manager_log.read_text())
    assert match is not None
    return int(match[1])


def _status_kb(pid: int, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def _machine() -> Row:
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
        "device": "cpu",
    }


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "folders  idle CPU %  RSS MB  gated ms  full ms  first s  new trial p50/p99/max s"
        "    new checkpoint p50/p99/max s    new trial in full sweeps"
    ]
    for row in rows:
        trial, checkpoint = row["new_trial_s"], row["new_checkpoint_s"]
        in_full = row.get("new_trial_in_full_sweeps_s", {"p50": 0.0, "p99": 0.0, "max": 0.0})
        lines.append(
            f"{row['folders']:7d}  {row['idle_cpu_percent']:10.3f}  {row['rss_mb']:6.1f}  {row['sweep_gated_ms']:8.1f}"
            f"  {row['sweep_full_ms']:7.1f}  {row['first_sweep_s']:7.2f}"
            f"  {trial['p50']:.3f}/{trial['p99']:.3f}/{trial['max']:.3f}        "
            f"  {checkpoint['p50']:.3f}/{checkpoint['p99']:.3f}/{checkpoint['max']:.3f}        "
            f"  {in_full['p50']:.3f}/{in_full['p99']:.3f}/{in_full['max']:.3f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="detection", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folders", type=int, nargs="+", default=[1, 100, 1000, 5000], help="trial folders")
    parser.add_argument("--window", type=float, default=330.0, help="seconds of idleness to measure")
    parser.add_argument(
        "--rounds", type=int, default=200, help="new trials, and new checkpoints, per number of folders"
    )
    parser.add_argument("--output", type=Path, default=RESULT, help="file to write")
    options = parser.parse_args(arguments)
    rows = _earlier_rows(options.output)
    result: Row = {
        "machine": _machine(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("watchdog", "pydantic", "torch", "diffusers")},
    }
    for folders in options.folders:
        with tempfile.TemporaryDirectory() as folder:
            rows[folders] = _dated(measure(folders, Path(folder), options.window, options.rounds), arguments)
        print(_table([rows[folders]]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result["evaluators"] = _dated(measure_evaluators(Path(folder), options.rounds), arguments)
    result["rows"] = [rows[folders] for folders in sorted(rows)]
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(_table(result["rows"]))
    print(json.dumps(result["evaluators"], indent=2))
    return 0


def _earlier_rows(output: Path) -> dict[int, Row]:
    """The rows of earlier runs stay until their number of folders is measured again."""
    if not output.exists():
        return {}
    return {row["folders"]: row for row in json.loads(output.read_text())["rows"]}


def _dated(row: Row, arguments: Sequence[str]) -> Row:
    return row | {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.evaluation.detection", *arguments]),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

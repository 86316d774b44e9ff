"""kill -9 over prepared folders: `python -m tests.scenarios.kills --manager 600 --writers 200 --evaluators 200`.

Each victim is the real process on the tiny world, and dies by SIGKILL, at a random moment or at a named failpoint:

    manager      `evaluator-daemon run`, while it looks, answers requests, starts evaluators or has them at work
    writer       a training by the native trainer, which writes checkpoints and its resume state, and resumes
    evaluator    an evaluator process, forked and run as the manager does it

After every kill each file must be readable, and what was recorded must stand as it was first recorded; after every
restart nothing temporary of the killed may be left where the restarted one writes. When a folder has had its share the
work is left to finish: then every complete checkpoint must be recorded exactly once, no process may be left, and a
training's weights must be those of one that nobody disturbed. Exit status 1 at a broken promise.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from evaluator_daemon.folder import has_results
from evaluator_daemon.job import Job
from evaluator_daemon.process import PRELOADED, run_evaluator_process
from examples.tiny_world.paths import BASE_MODEL, DATASET
from optimizer_daemon.lora_training.config import TrainConfig, to_toml
from shared.commands import run_command
from shared.failpoints import VARIABLE
from shared.files import read_model, sweep_temp_files, write_bytes
from shared.layout import TEMPORARY_MARK, TrialLayout
from shared.locks import FileLock
from shared.requests import RequestFolder
from shared.safetensors_file import lora_modules, read_checkpoint
from shared.schemas import Metrics, Retry, Run
from tests.scenarios.invariants import evaluation_violations, unreadable_files
from tests.scenarios.lab import Daemon, Lab, wait_until
from tests.scenarios.lora_files import ALPHA, RANK, lora
from tests.scenarios.written_study import make_trial, outcomes, plan_study, records_of

KILLS_PER_FOLDER = 30
BUSY_SHARE = 6  # every so-many-th kill of a manager has evaluators at work: their server takes seconds to import torch
DEATHS_OVER_A_CHECKPOINT = 3  # five in a row, while others are scored, make it suspect, and rightly so
IDLE_S = 0.5
PATIENCE_S = 600.0  # a busy machine may take long, a working one never does
EPOCHS = 3
KILLED = -signal.SIGKILL

MANAGER_PLACES = ("files.written", "files.replaced", "requests.found", "requests.carried_out", "requests.answered")
EVALUATOR_PLACES = ("admitted", "attempt_written", "rendered", "pictures_written", "metrics_written", "recorded")
TRAINER_PLACES = ("step", "checkpoint_saved", "state_saved", "finished")
WRITES_PER_CHECKPOINT = 7  # attempt, two pictures, grid, metrics, summary, record

Say = Callable[[str], None]
_context = multiprocessing.get_context("forkserver")


class Ledger:
    """What all lanes have done and found; the lanes are threads."""

    def __init__(self, say: Say) -> None:
        self.kills: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.complaints: list[str] = []
        self.recorded = self.folders = self.swept = 0
        self._say = say
        self._lock = threading.Lock()

    def killed(self, kind: str, place: str) -> None:
        """Count a kill, and say so every hundred."""
        with self._lock:
            self.kills[kind] += 1
            self.places[place.partition("@")[0]] += 1
            if self.kills.total() % 100 == 0:
                self._say(f"{self.kills.total()} kills: {dict(self.kills)}; {len(self.complaints)} broken promises")

    def complain(self, where: str, sentences: Iterable[str]) -> None:
        """Keep each broken promise, and say it at once."""
        with self._lock:
            for sentence in sentences:
                self.complaints.append(f"{where}: {sentence}")
                self._say(f"BROKEN: {where}: {sentence}")

    def add(self, *, recorded: int, swept: int) -> None:
        """Count a folder that is done with."""
        with self._lock:
            self.folders += 1
            self.recorded += recorded
            self.swept += swept


class Ground:
    """One prepared study folder and what is remembered of it."""

    def __init__(self, lab: Lab, ledger: Ledger, random: Random) -> None:
        self.lab, self.study, self.random = lab, lab.study, random
        self.name = lab.folder.name
        self._ledger = ledger
        self._first_results: dict[Path, str] = {}
        self._seen_temporary: set[Path] = set()
        plan_study(self.study)
        run = read_model(self.study.run, Run)
        assert run.plan is not None
        self.job = Job(self.study.root, run.plan, BASE_MODEL, None, "cpu", 1, check_interval_s=1.0, idle_timeout_s=30.0)

    def add_checkpoint(self, trial: TrialLayout) -> None:
        """A further checkpoint of content that no other has, written as safetensors 0.8 and our trainer do."""
        epoch = len(trial.list_checkpoints()) + 1
        write_bytes(trial.intermediate_checkpoint(epoch), lora(self.random.getrandbits(32)))

    def is_harried(self) -> bool:
        """Whether some checkpoint has died so often that further deaths would make it suspect."""
        records = [record for trial in self.study.list_trials() for record in records_of(trial).values()]
        return any(record.interruptions_in_a_row >= DEATHS_OVER_A_CHECKPOINT for record in records)

    def temporary_files(self) -> set[Path]:
        found = {path for path in self.study.root.rglob(".*") if TEMPORARY_MARK in path.name}
        self._seen_temporary |= found
        return found

    def complain(self, *sentences: str) -> None:
        self._ledger.complain(self.name, sentences)

    def killed(self, kind: str, place: str) -> None:
        """Count the kill and check what must hold in the middle of anything."""
        self._ledger.killed(kind, place)
        self.complain(*(f"after {kind} died at {place}: {sentence}" for sentence in self._broken()))

    def end(self) -> None:
        """Check what must hold of finished work."""
        self.complain(*self._broken(), *evaluation_violations(self.study))
        recorded = 0
        for trial in self.study.list_trials():
            records = records_of(trial)
            recorded += len(records)
            names = {path.stem for path in trial.list_checkpoints()}
            unrecorded = sorted(names - {name for name, record in records.items() if record.status == "recorded"})
            if unrecorded or set(records) != names:
                self.complain(f"{trial.name}: not recorded are {unrecorded}; the records are {sorted(records)}")
        if strays := self.lab.processes():
            self.complain(f"processes are left: {strays}")
        self._ledger.add(recorded=recorded, swept=len(self._seen_temporary - self.temporary_files()))

    def _broken(self) -> Iterable[str]:
        yield from unreadable_files(self.study)
        for trial in self.study.list_trials():
            for name, record in records_of(trial).items():
                if record.status in ("quarantined", "truncated"):
                    yield f"{trial.name}: {name} is {record.status}: {record.quarantine}"
                if record.status != "recorded":
                    continue
                render = trial.evaluations.checkpoint(name)
                metrics = read_model(render.metrics, Metrics)
                if metrics.checkpoint_sha256 != record.checkpoint_sha256:
                    yield f"{trial.name}: {name}: metrics.json is about other content"
                if outcomes(record).count("recorded") != (0 if record.same_as else 1):
                    yield f"{trial.name}: {name}: attempts ended as {outcomes(record)}"
                if not all((render.folder / sample.file).exists() for sample in metrics.samples):
                    yield f"{trial.name}: {name}: a picture is missing"
                digest = hashlib.sha256(render.metrics.read_bytes()).hexdigest()
                if self._first_results.setdefault(render.metrics, digest) != digest:
                    yield f"{trial.name}: {name}: was recorded a second time"


# ------------------------------------------------------------------------------------------------- forked processes


def start_server() -> None:
    """Import what the forked victims need, once."""
    # each of them runs this file again, as its main module
    ours = ("tests.scenarios.invariants", "tests.scenarios.written_study", "concurrent.futures")
    _context.set_forkserver_preload([*PRELOADED, "optimizer_daemon.lora_training.train", *ours])


def run_forked(
    target: Callable[..., None], *arguments: object, failpoints: str = "", kill_after_s: float | None = None
) -> int:
    """Run a victim to its end, or kill it; return its exit status as subprocess gives it."""
    ours, theirs = _context.Pipe(duplex=False)  # what an evaluator sends stays unread
    process = _context.Process(target=_with_failpoints, args=(failpoints, target, *arguments, theirs))
    process.start()
    theirs.close()
    try:
        process.join(kill_after_s if kill_after_s is not None else PATIENCE_S)
        if kill_after_s is None and process.is_alive():
            raise AssertionError(f"{target.__name__} still runs after {PATIENCE_S:.0f} s, failpoints {failpoints!r}")
    finally:
        process.kill()
        process.join()
        ours.close()
    assert process.exitcode is not None
    return process.exitcode


def _with_failpoints(failpoints: str, target: Callable[..., None], *arguments: object) -> None:
    os.environ[VARIABLE] = failpoints
    target(*arguments)


def evaluate(job: Job, folder: Path, messages: Connection) -> None:
    """What the manager runs in each of its evaluator processes."""
    run_evaluator_process(job, folder, False, None, messages)


def train(config: Path, log: Path, messages: Connection) -> None:
    """The native trainer's command."""
    from optimizer_daemon.lora_training.__main__ import main as native_trainer

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.exit(run_command(lambda: native_trainer(["--config", str(config), "--resume"])))


class Moments:
    """When to kill by the clock: some time within a life, as long as lives have turned out to be here."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._life_s = 2.0

    def choose(self) -> float:
        return self._random.uniform(0.0, self._life_s)

    def lived(self, seconds: float) -> None:
        self._life_s = 0.7 * self._life_s + 0.3 * seconds


# --------------------------------------------------------------------------------------------------------- evaluators


def kill_evaluators(ground: Ground, quota: int, moments: Moments) -> int:
    """Kill at most `quota` evaluators of one folder, and let the work finish; return how many died."""
    random = ground.random
    trials = [make_trial(ground.study, number) for number in (1, 2)]
    done = 0
    while done < quota:
        trial = random.choice(trials)
        if ground.is_harried():
            _evaluate_in_peace(ground, trials, moments)
        while _open_checkpoints(trial) < 2:
            ground.add_checkpoint(trial)
        place, failpoint, kill_after_s = _evaluator_fate(random, moments)
        left = {path for path in ground.temporary_files() if path.is_relative_to(trial.evaluations.folder)}
        code = run_forked(evaluate, ground.job, trial.folder, failpoints=failpoint, kill_after_s=kill_after_s)
        if code == KILLED:
            done += 1
            ground.killed("evaluator", place)
        elif failpoint or code != 0:
            ground.complain(f"an evaluator ended with {code} instead of dying at {place}")
            return quota  # the same would happen again
        if place.startswith("evaluator.") and (still := left & ground.temporary_files()):
            ground.complain(f"a restarted evaluator left {sorted(map(str, still))}")
    _evaluate_in_peace(ground, trials, moments)
    ground.end()
    return done


def _evaluator_fate(random: Random, moments: Moments) -> tuple[str, str, float | None]:
    """Return a name for the place, the failpoint, and after how many seconds to kill instead."""
    lot = random.random()
    if lot < 0.4:
        place = f"evaluator.{random.choice(EVALUATOR_PLACES)}@{random.randint(1, 2)}"
    elif lot < 0.7:
        place = f"files.{random.choice(('written', 'replaced'))}@{random.randint(1, WRITES_PER_CHECKPOINT)}"
    else:
        return "a random moment", "", moments.choose()
    return place, place.replace("@", "=kill@"), None


def _open_checkpoints(trial: TrialLayout) -> int:
    """How many are still to be rendered: of one whose results were written only the record is missing."""
    settled = {
        name
        for name, record in records_of(trial).items()
        if record.status == "recorded" or (record.status == "evaluating" and has_results(record, trial.evaluations))
    }
    return sum(path.stem not in settled for path in trial.list_checkpoints())


def _evaluate_in_peace(ground: Ground, trials: Iterable[TrialLayout], moments: Moments) -> None:
    for trial in trials:
        if not trial.list_checkpoints():
            continue
        begin = time.monotonic()
        code = run_forked(evaluate, ground.job, trial.folder)
        moments.lived(time.monotonic() - begin)
        if code != 0:
            ground.complain(f"{trial.name}: an undisturbed evaluator ended with {code}")


# ------------------------------------------------------------------------------------------------------------ writers


def kill_writers(ground: Ground, quota: int, moments: Moments, expected: dict[str, str]) -> int:
    """Kill at most `quota` trainings, each resumed until it ends, and have every checkpoint scored.

    Args:
        expected: checkpoint's file name without the trial's number -> identity in an undisturbed training.
    """
    done = number = 0
    trials = []
    while done < quota:
        number += 1
        trial = make_trial(ground.study, number, max_train_epochs=EPOCHS)
        trials.append(trial)
        done += _kill_one_training(ground, trial, quota - done, moments, expected)
    _evaluate_in_peace(ground, trials, Moments(ground.random))
    ground.end()
    return done


def _kill_one_training(
    ground: Ground, trial: TrialLayout, quota: int, moments: Moments, expected: dict[str, str]
) -> int:
    random, done = ground.random, 0
    config = _training_config(ground.lab.folder, trial)
    while True:
        place, failpoint, kill_after_s = _writer_fate(random, moments) if done < quota else ("", "", None)
        begin = time.monotonic()
        code = run_forked(train, config, trial.training_log, failpoints=failpoint, kill_after_s=kill_after_s)
        if code == KILLED:
            done += 1
            ground.killed("writer", place)
        elif code != 0:
            ground.complain(f"{trial.name}: a training ended with {code}; see {trial.training_log}")
            return quota
        ground.complain(*_unexpected_weights(trial, expected))
        # Whoever starts a training again removes the remains first; see optimizer_daemon.recovery.sweep_leftovers.
        ground.temporary_files()
        sweep_temp_files(trial.folder)
        if code == 0:
            moments.lived(time.monotonic() - begin)
            break
    if trial.training_state.exists() or ground.temporary_files():
        ground.complain(f"{trial.name}: remains of the training are left")
    if len(trial.list_checkpoints()) != EPOCHS:
        ground.complain(f"{trial.name}: has {[path.name for path in trial.list_checkpoints()]}")
    return done


def _writer_fate(random: Random, moments: Moments) -> tuple[str, str, float | None]:
    lot = random.random()
    if lot < 0.45:
        place = f"trainer.{random.choice(TRAINER_PLACES)}@1"
    elif lot < 0.8:
        place = f"files.{random.choice(('written', 'replaced'))}@{random.randint(1, 2)}"
    else:
        return "a random moment", "", moments.choose()
    return place, place.replace("@", "=kill@"), None


def _training_config(folder: Path, trial: TrialLayout) -> Path:
    """Write what the optimizer would: two steps an epoch, a checkpoint and a resume state after each."""
    dataset = folder / "training.toml"
    dataset.write_text(
        "[general]\ncaption_extension = '.txt'\nenable_bucket = false\n[[datasets]]\nresolution = 64\n"
        f"batch_size = 12\n[[datasets.subsets]]\nimage_dir = '{DATASET / 'pixar_style'}'\nnum_repeats = 1\n"
    )
    values = {
        "pretrained_model_name_or_path": str(BASE_MODEL),
        "dataset_config": str(dataset),
        "output_dir": str(trial.folder),
        "output_name": trial.output_name,
        "state_dir": str(trial.training_state),
        "latent_cache_dir": str(folder.parent / "latents"),
        "learning_rate": 1e-3,
        "network_dim": RANK,
        "network_alpha": ALPHA,
        "max_train_epochs": EPOCHS,
        "save_every_n_epochs": 1,
        "threads": 1,
        "device": "cpu",
    }
    path = trial.folder / "train_config.toml"
    path.write_text(to_toml(TrainConfig.model_validate(values)), encoding="utf-8")
    return path


def _identities(trial: TrialLayout) -> dict[str, str]:
    """Identity of each checkpoint that stands, under its name without the trial's; each must be a whole LoRA."""
    found = {}
    for path in trial.list_checkpoints():
        checkpoint = read_checkpoint(path, trial.folder)
        lora_modules(checkpoint)
        found[path.stem.removeprefix(trial.output_name)] = checkpoint.sha256
    return found


def _unexpected_weights(trial: TrialLayout, expected: dict[str, str]) -> Iterable[str]:
    for name, sha256 in _identities(trial).items():
        if expected[name] != sha256:
            yield f"{trial.name}: checkpoint {name or 'final'} is not that of an undisturbed training"


def undisturbed_training(folder: Path) -> dict[str, str]:
    """What every training of the writers' lane must leave, however often it is killed."""
    with Lab(folder) as lab:
        plan_study(lab.study)
        trial = make_trial(lab.study, 1, max_train_epochs=EPOCHS)
        code = run_forked(train, _training_config(folder, trial), trial.training_log)
        assert code == 0, trial.training_log.read_text()
        return _identities(trial)


# ----------------------------------------------------------------------------------------------------------- managers


def kill_managers(ground: Ground, quota: int, moments: Moments) -> int:
    """Kill `quota` managers of one folder: first over finished work and requests, then with evaluators at work."""
    random, lab = ground.random, ground.lab
    trials = [make_trial(ground.study, number) for number in (1, 2)]
    for trial in trials:
        ground.add_checkpoint(trial)
    _evaluate_in_peace(ground, trials, Moments(random))
    requests, asked = RequestFolder(ground.study, "evaluator"), []
    for index in range(quota):
        trial = random.choice(trials)
        is_busy = index >= quota - max(1, quota // BUSY_SHARE)
        if is_busy and ground.is_harried():
            _finish_by_manager(ground)
        if is_busy and not any(map(_open_checkpoints, trials)):
            ground.add_checkpoint(trial)
        asked.append(requests.submit(Retry(kind="retry", trial_name=random.choice((trial.name, "trial_0099")))))
        _kill_one_manager(ground, moments, is_busy=is_busy)
        wait_until(lambda: not lab.processes(), PATIENCE_S, "what a killed manager started lives on")
        ground.complain(*(f"{lock}: is still held" for lock in _held_locks(ground)))
    _finish_by_manager(ground)
    for request_id in asked:
        if requests.wait_for_answer(request_id, 0.0) is None:
            ground.complain(f"request {request_id} was never answered")
    if pending := requests.pending():
        ground.complain(f"requests are left: {[request.id for request in pending]}")
    ground.end()
    return quota


def _kill_one_manager(ground: Ground, moments: Moments, *, is_busy: bool) -> None:
    random = ground.random
    left = {path for path in ground.temporary_files() if path.parent in _manager_folders(ground)}
    place = random.choice(("at once", "once started", *MANAGER_PLACES))
    if is_busy:
        place = random.choice(("manager.evaluator_started", "with evaluators at work"))
    has_failpoint = "." in place
    times = random.randint(1, 3) if place.startswith("files.") else 1
    failpoint = f"{place}=kill@{times}" if has_failpoint else ""
    begin = time.monotonic()
    daemon = ground.lab.manager("--check-interval", 0.05, failpoints=failpoint)
    try:
        if place.startswith("files."):  # an idle manager may write no more for a minute: then it is killed idle
            _wait_for(daemon, lambda: "trial seen" in daemon.said, "it sees no trial")
            deadline = time.monotonic() + IDLE_S
            while daemon.exit_status is None and time.monotonic() < deadline:
                time.sleep(0.02)
        elif has_failpoint:
            wait_until(lambda: daemon.exit_status is not None, PATIENCE_S, f"{place} is never reached")
        elif place == "at once":
            time.sleep(moments.choose())
        elif place == "once started":
            _wait_for(daemon, lambda: "manager started" in daemon.said, "it does not start")
            moments.lived(2 * (time.monotonic() - begin))
            time.sleep(random.uniform(0.0, 0.3))
        else:
            _wait_for(daemon, lambda: ground.lab.evaluators(), "no evaluator starts")
            time.sleep(random.uniform(0.0, 2.0))
    finally:
        daemon.kill()
    if daemon.exit_status != KILLED:
        ground.complain(f"a manager ended with {daemon.exit_status}: {daemon.said[-1500:]}")
    if "manager started" in daemon.said and (still := left & ground.temporary_files()):
        ground.complain(f"a restarted manager left {sorted(map(str, still))}")
    wait_until(lambda: not _held_locks(ground), PATIENCE_S, "an evaluator has outlived its manager")
    ground.killed("manager", place)


def _wait_for(daemon: Daemon, condition: Callable[[], object], what: str) -> None:
    """Wait until it is so, or the daemon has ended, which the caller finds out by its exit status."""
    wait_until(lambda: daemon.exit_status is not None or condition(), PATIENCE_S, f"{what}; it said: {daemon.said}")


def _manager_folders(ground: Ground) -> tuple[Path, ...]:
    return ground.study.root, ground.study.requests("evaluator")


def _held_locks(ground: Ground) -> list[Path]:
    locks = [ground.study.manager_lock, *(trial.evaluations.lock for trial in ground.study.list_trials())]
    return [lock for lock in locks if FileLock.is_held(lock)]


def _finish_by_manager(ground: Ground) -> None:
    daemon = ground.lab.manager("--once")
    status = daemon.wait(PATIENCE_S)
    if status != 0:
        ground.complain(f"an undisturbed manager ended with {status}: {daemon.said[-1500:]}")
    with suppress(AssertionError):  # what is left then is told at the folder's end
        wait_until(lambda: not ground.lab.processes(), 60)


# --------------------------------------------------------------------------------------------------------------- lanes


def kill(folder: Path, manager: int, writers: int, evaluators: int, seed: int, say: Say) -> Ledger:
    """Kill that many of each, managers in one lane and the others in another; return what came of it."""
    ledger = Ledger(say)
    start_server()

    def lane(kind: str, quota: int, strike: Callable[[Ground, int, Moments], int]) -> None:
        random, done, index = Random(f"{seed} {kind}"), 0, 0
        moments = Moments(random)
        while done < quota:
            home = folder / f"{kind}_{index:03d}"
            home.mkdir()
            with Lab(home) as lab:
                ground = Ground(lab, ledger, random)
                done += strike(ground, min(KILLS_PER_FOLDER, quota - done), moments)
            index += 1

    def forked_lane() -> None:
        lane("evaluator", evaluators, kill_evaluators)
        if writers:
            (folder / "undisturbed").mkdir()
            expected = undisturbed_training(folder / "undisturbed")
            lane("writer", writers, lambda ground, quota, moments: kill_writers(ground, quota, moments, expected))

    with ThreadPoolExecutor(2) as lanes:
        for future in [lanes.submit(forked_lane), lanes.submit(lane, "manager", manager, kill_managers)]:
            future.result()
    return ledger


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manager", type=int, default=60, help="kills of the manager (default: 60)")
    parser.add_argument("--writers", type=int, default=20, help="kills of trainings (default: 20)")
    parser.add_argument("--evaluators", type=int, default=20, help="kills of evaluators (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the studies there (default: a temporary folder)")
    options = parser.parse_args()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        ledger = kill(folder, options.manager, options.writers, options.evaluators, options.seed, say)
    say(f"where they died: {dict(ledger.places.most_common())}")
    say(
        f"{ledger.kills.total()} kills ({dict(ledger.kills)}) in {ledger.folders} folders: "
        f"{ledger.recorded} checkpoints recorded once each, {ledger.swept} temporary files swept; "
        f"{len(ledger.complaints)} broken promises"
    )
    return 1 if ledger.complaints else 0


if __name__ == "__main__":
    sys.exit(main())

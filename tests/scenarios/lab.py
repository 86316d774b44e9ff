"""A small study on the tiny world and the real processes of both its daemons, for tests that kill, starve or fool them.

Every process of a lab, however deep, carries the lab's mark in its environment: that is how strays are found.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from examples.tiny_world.paths import BASE_MODEL, CLIP_MODEL, DATASET
from shared.failpoints import VARIABLE
from shared.layout import StudyLayout, TrialLayout
from shared.process import lock_holders

ROOT = Path(__file__).resolve().parents[2]
MARK = "LORA_TUNER_LAB"

DATASET_TOML = f"""
[general]
caption_extension = ".txt"
enable_bucket = false
[[datasets]]
resolution = 64
batch_size = 4
[[datasets.subsets]]
image_dir = "{DATASET / "pixar_style"}"
num_repeats = 1
"""

SPACE = """
name = "quick"
[parameters.learning_rate]
type = "float"
low = 1e-4
high = 4e-3
log = true
[parameters.network_dim]
type = "categorical"
choices = [4, 8]
[parameters.network_alpha]
type = "categorical"
choices = [2, 4]
[parameters.optimizer_type]
type = "categorical"
choices = ["AdamW"]
[parameters.max_train_epochs]
type = "categorical"
choices = [2, 3]
"""


class Daemon:
    """One daemon as a person starts it; its output goes to a file."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], output: Path) -> None:
        self.name = name
        self.output = output
        with output.open("ab") as file:
            self._from = file.tell()
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        self.pid = self._process.pid

    @property
    def exit_status(self) -> int | None:
        """As subprocess gives it: -9 after kill -9; None while it lives."""
        return self._process.poll()

    @property
    def said(self) -> str:
        """What this process has printed."""
        return self.output.read_bytes()[self._from :].decode(errors="replace")

    def kill(self) -> None:
        """kill -9, and nothing else."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait(10)

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 90.0) -> int:
        """Ask for an orderly stop and return the exit status."""
        self._process.send_signal(number)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 240.0) -> int:
        """Return the exit status, once it has ended by itself."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {timeout_s:.0f} s; it said:\n{self.said}") from None


class Lab:
    """A study folder below `folder`; use it as a context manager, so that nothing of it outlives the test.

    Args:
        folder: an empty folder.
        space: text of the search space; trainings of 2 or 3 epochs with 6 steps each otherwise.
        dataset: text of the data set's TOML.
        optimizer: further lines of the study file's [optimizer] table.
        base_model: the tiny world's, or another form of it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        space: str = SPACE,
        dataset: str = DATASET_TOML,
        optimizer: str = "",
        base_model: Path = BASE_MODEL,
    ) -> None:
        self.folder = folder
        self.study = StudyLayout(folder / "study")
        self.study_file = folder / "study.toml"
        self.mark = secrets.token_hex(8)
        (folder / "space.toml").write_text(space)
        (folder / "dataset.toml").write_text(dataset)
        self.study_file.write_text(
            f'[optimizer]\nbase_model = "{base_model}"\nclip_model = "{CLIP_MODEL}"\ndataset_config = "dataset.toml"\n'
            'search_space = "space.toml"\noutput_dir = "study"\ndevice = "cpu"\ncfg_scale = 3.0\nnum_samples = 2\n'
            f"render_steps = 4\nsave_every_n_epochs = 1\n{optimizer}\n"
            '[evaluator]\noptimization_dir = "study"\ndevice = "cpu"\ncheck_interval = 2\n'
            "evaluator_check_interval = 1\nidle_timeout = 30\n"
        )

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_everything()

    # ------------------------------------------------------------------------------------------------------- daemons

    def optimizer(self, *flags: object, failpoints: str = "", env: Mapping[str, str] | None = None) -> Daemon:
        """Start `optimizer-daemon run`; `failpoints` are those of shared.failpoints, for it and its trainers."""
        return self._start("optimizer", "optimizer_daemon.cli", ["run", *flags], failpoints, env)

    def manager(self, *flags: object, failpoints: str = "", env: Mapping[str, str] | None = None) -> Daemon:
        """Start `evaluator-daemon run`; the failpoints are its evaluators', too."""
        return self._start("manager", "evaluator_daemon.cli", ["run", *flags], failpoints, env)

    def environment(self, failpoints: str = "", env: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of every process of this lab."""
        return {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}",
            MARK: self.mark,
            VARIABLE: failpoints,
            **(env or {}),
        }

    def _start(
        self, name: str, module: str, words: list[object], failpoints: str, env: Mapping[str, str] | None
    ) -> Daemon:
        command = [sys.executable, "-m", module, str(words[0]), "--config", str(self.study_file), *map(str, words[1:])]
        return Daemon(name, command, self.environment(failpoints, env), self.folder / f"{name}.out")

    # ------------------------------------------------------------------------------------------------------ processes

    def trainers(self) -> dict[str, set[int]]:
        """Pids of each trial's trainer and its supervisor, by the trial's name."""
        return _held({trial.name: trial.trainer_lock for trial in self.study.list_trials()})

    def evaluators(self) -> dict[str, set[int]]:
        """Pids of each trial's evaluator, by the trial's name."""
        return _held({trial.name: trial.evaluations.lock for trial in self.study.list_trials()})

    def processes(self) -> dict[int, str]:
        """Every living process of this lab: pid -> command line."""
        return processes_of(self.mark)

    def kill_everything(self) -> None:
        """kill -9 every process of this lab."""
        deadline = time.monotonic() + 20
        while (alive := self.processes()) and time.monotonic() < deadline:
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        assert not alive, alive


def processes_of(mark: str) -> dict[int, str]:
    """Every living process that carries the mark in its environment: pid -> command line."""
    found = {}
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if command:  # a zombie has none
                        found[int(entry.name)] = command
    return found


def wait_until(condition: Callable[[], object], timeout_s: float = 120.0, what: str = "") -> None:
    """Wait until `condition()` is true.

    Raises:
        AssertionError: it is still not after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what or condition
        time.sleep(0.05)


def _held(locks: Mapping[str, Path]) -> dict[str, set[int]]:
    return {name: holders for name, path in locks.items() if (holders := lock_holders(path))}


def checkpoints(trial: TrialLayout) -> list[str]:
    """Names of the trial's weight files, without .safetensors."""
    return [path.stem for path in trial.list_checkpoints()]

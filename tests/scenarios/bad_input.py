"""Small worlds with one thing wrong in each, and the command that has to say so."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from examples.tiny_world.paths import BASE_MODEL, CLIP_MODEL, DATASET
from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.locks import FileLock
from shared.schemas import Run
from tests.scenarios.lab import SPACE

ROOT = Path(__file__).resolve().parents[2]

DATASET_TOML = """[general]
caption_extension = ".txt"
[[datasets]]
resolution = 64
batch_size = 2
[[datasets.subsets]]
image_dir = "pictures"
"""


def _mounting() -> tuple[list[str], str]:
    """The command that gives a shell mounts of its own, and why there is none here."""
    command = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run([*command, "mount", "-t", "tmpfs", "tmpfs", folder], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return command, f"no mounts for tests here ({error})"
    return command, ""


class World:
    """A data set of two pictures, a search space, a study file; with `made` also a study that was begun there.

    Args:
        folder: an empty folder.
        made: folder of the world whose study is copied; None for a world before its first start.
        clip: whether the study file names a CLIP.
    """

    unshare, no_mounts = _mounting()

    def __init__(self, folder: Path, made: Path | None, *, clip: bool = True) -> None:
        self.folder, self.study, self.pictures = folder, folder / "study", folder / "pictures"
        self.space, self.dataset, self.study_file = (folder / f"{n}.toml" for n in ("space", "dataset", "study"))
        self.variables: dict[str, str] = {}
        self._locks: list[FileLock] = []
        self.pictures.mkdir()
        for name in ("00_red_ball", "01_red_cube"):
            for suffix in (".png", ".txt"):
                shutil.copy(DATASET / "pixar_style" / f"{name}{suffix}", self.pictures)
        self.dataset.write_text(DATASET_TOML)
        self.space.write_text(SPACE)
        named_clip = f'clip_model = "{CLIP_MODEL}"\n' if clip else ""
        self.study_file.write_text(
            f'[optimizer]\nbase_model = "{BASE_MODEL}"\n{named_clip}dataset_config = "dataset.toml"\n'
            'search_space = "space.toml"\noutput_dir = "study"\ndevice = "cpu"\nnum_samples = 2\n'
            '[evaluator]\noptimization_dir = "study"\ndevice = "cpu"\n'
        )
        if made is not None:
            self._copy_study(made)

    def _copy_study(self, made: Path) -> None:
        shutil.copytree(made / "study", self.study)
        run = self.run_json
        moved = run.model_dump_json().replace(str(made), str(self.folder))
        write_model(StudyLayout(self.study).run, Run.model_validate_json(moved))

    def optimizer(self, *flags: object) -> list[str]:
        """`optimizer-daemon run`; where nothing is wrong it opens the study and draws no trial."""
        words = ["run", "--config", self.study_file, "--timeout", 0.001, *flags]
        return [sys.executable, "-m", "optimizer_daemon.cli", *map(str, words)]

    def status(self, *flags: object) -> list[str]:
        return [
            sys.executable,
            "-m",
            "optimizer_daemon.cli",
            "status",
            "--config",
            str(self.study_file),
            *map(str, flags),
        ]

    def evaluator(self, *flags: object, verb: str = "run") -> list[str]:
        words = [verb, "--config", self.study_file, *(["--once"] if verb == "run" else []), *flags]
        return [sys.executable, "-m", "evaluator_daemon.cli", *map(str, words)]

    @property
    def run_json(self) -> Run:
        return read_model(StudyLayout(self.study).run, Run)

    def replace(self, file: Path, old: str, new: str) -> None:
        text = file.read_text()
        assert old in text, old
        file.write_text(text.replace(old, new, 1))

    def model(self, source: Path) -> Path:
        """A copy of a model folder, to be spoilt."""
        return Path(shutil.copytree(source, self.folder / "model"))

    def hold(self, lock: Path) -> None:
        """Keep a lock as a living daemon does."""
        self._locks.append(FileLock(lock).acquire())

    def release(self) -> None:
        for lock in self._locks:
            lock.release()

    def query(self, statement: str) -> None:
        """Change the study's database."""
        connection = sqlite3.connect(StudyLayout(self.study).database)
        with connection:
            connection.execute(statement)
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.close()


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        sentence: what is wrong; the test's id.
        says: parts of the error line: the field or file, the value, the remedy.
        spoil: makes it wrong and returns the command.
        code: the exit code.
        study: whether a study was begun there before.
        impossible: why it cannot be tried here.
    """

    sentence: str
    says: tuple[str, ...]
    spoil: Callable[[World], list[str]]
    code: int = 2
    study: bool = False
    impossible: str = ""

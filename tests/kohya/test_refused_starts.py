"""Starts that the command refuses with the real sd-scripts beside it: one line that says why, exit status 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.kohya.kohya_lab import KohyaLab
from tests.kohya.narrow_world import NarrowWorld

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_an_option_nobody_knows(world: NarrowWorld, tmp_path: Path):
    lab = KohyaLab(tmp_path, world, epochs=2)
    change(lab.study_file, "[trainer.kohya]\n", "[trainer.kohya]\nnetwork_dmi = 8\n")
    assert_refused(lab, "[trainer.kohya] network_dmi: sd-scripts ", "no such option; did you mean 'network_dim'?")


def test_no_checkpoint_ever(world: NarrowWorld, tmp_path: Path):
    lab = KohyaLab(tmp_path, world, epochs=2)
    change(lab.study_file, "[trainer.kohya]\n", "[trainer.kohya]\nsave_every_n_epochs = 0\n")
    assert_refused(lab, "[trainer.kohya] save_every_n_epochs: 0 will not do", "--save-every-n-epochs")


def test_a_validation_split_in_a_subset(world: NarrowWorld, tmp_path: Path):
    lab = KohyaLab(tmp_path, world, epochs=2)
    dataset = tmp_path / "dataset.toml"
    dataset.write_text(f"{world.dataset.read_text()}  validation_split = 0.5\n")
    change(lab.study_file, str(world.dataset), str(dataset))
    assert_refused(lab, str(dataset), "subsets[0].validation_split", "move it up into [[datasets]]")


def test_an_environment_with_transformers_5(world: NarrowWorld, tmp_path: Path):
    """Such as this program's own."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    lab = KohyaLab(tmp_path, world, epochs=2)
    change(lab.study_file, f'"{world.python}"', f'"{python}"')
    assert_refused(lab, f"--trainer-python: '{python}'", "it has transformers 5.", "pins")


def test_a_launcher(world: NarrowWorld, tmp_path: Path):
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\nexec {world.python} -m accelerate.commands.launch "$@"\n')
    launcher.chmod(0o755)
    lab = KohyaLab(tmp_path, world, epochs=2)
    change(lab.study_file, f'"{world.python}"', f'"{launcher}"')
    assert_refused(lab, f"--trainer-python: '{launcher}'", "starts the training through a launcher")


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, text
    file.write_text(text.replace(old, new))


def assert_refused(lab: KohyaLab, *words: str) -> None:
    """See that the command ends with status 2 and one line that has all these words, and makes no study."""
    with lab:
        daemon = lab.optimizer("--n-trials", 1)
        assert daemon.wait(500) == 2, daemon.said
        (line,) = daemon.said.strip().splitlines()
    assert line.startswith("error: ")
    assert [word for word in words if word not in line] == [], line
    assert not lab.study.root.exists() or not any(lab.study.root.glob("trial_*"))

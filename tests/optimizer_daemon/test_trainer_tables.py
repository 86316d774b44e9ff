"""Which [trainer.*] tables of the study file are read, kept for another time, or refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from optimizer_daemon.settings import OptimizerSettings, load_optimizer_settings
from optimizer_daemon.trainers.command_options import read_options
from shared.errors import SettingsError


def loaded(folder: Path, optimizer: str, tables: str, trainer: str | None = None) -> OptimizerSettings:
    folder.mkdir(exist_ok=True)
    (folder / "study.toml").write_text(f"[optimizer]\n{optimizer}\n{tables}\n")
    return load_optimizer_settings(argparse.Namespace(config=folder / "study.toml", trainer=trainer))


KOHYA = '[trainer.kohya]\nmixed_precision = "bf16"'


def test_a_table_of_another_trainer_than_the_default_is_refused(tmp_path: Path):
    with pytest.raises(SettingsError) as caught:
        loaded(tmp_path, "", KOHYA)
    assert str(caught.value) == (
        f"{tmp_path}/study.toml line 3: trainer.kohya: {{'mixed_precision': 'bf16'}} will not do; native trains, which "
        "does not read it; pass --trainer kohya, or take the table out"
    )
    with pytest.raises(
        SettingsError, match=r"trainer.native: .*kohya trains, which does not read it; pass --trainer n"
    ):
        loaded(tmp_path, 'sd_scripts_dir = "k"', "[trainer.native]\nthreads = 1")


@pytest.mark.parametrize(("optimizer", "flag"), [("", "native"), ('trainer = "native"', None)])
def test_where_somebody_says_who_trains_the_tables_of_others_wait(tmp_path: Path, optimizer: str, flag: str | None):
    own = '[trainer."my.module:TRAINER"]\nx = 1'
    settings = loaded(tmp_path, optimizer, f"{KOHYA}\n{own}\n[trainer.native]\nclip_skip = 2", flag)
    assert (settings.trainer_name, settings.trainer_options) == ("native", {"clip_skip": 2})


@pytest.mark.parametrize("flag", [None, "native", "kohya"])
def test_a_table_of_no_trainer_is_refused_whoever_trains(tmp_path: Path, flag: str | None):
    with pytest.raises(SettingsError, match=r"trainer.kohyaa: .*there is no such trainer; did you mean kohya\?"):
        loaded(tmp_path, "", "[trainer.kohyaa]\nx = 1", flag)


def test_a_program_beside_the_study_file_is_found_in_a_folder_with_a_blank(tmp_path: Path):
    folder = tmp_path / "my study"
    table = '[trainer.command]\ncommand = "./train.sh --lr {learning_rate} \'a b\'"\nfinal = "*.safetensors"'
    options = read_options(loaded(folder, "", table, "command").trainer_options)
    assert options.command == [str(folder / "train.sh"), "--lr", "{learning_rate}", "a b"]
    listed = table.replace("\"./train.sh --lr {learning_rate} 'a b'\"", '["./train.sh", "--lr={learning_rate}"]')
    options = read_options(loaded(folder, "", listed, "command").trainer_options)
    assert options.command == [str(folder / "train.sh"), "--lr={learning_rate}"]

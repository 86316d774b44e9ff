"""What a study measures, and which pictures it holds out, fixed at its first start."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluator_daemon.job import find_job
from evaluator_daemon.metrics.pixels import pixel_statistics
from evaluator_daemon.settings import EvaluatorSettings
from examples.tiny_world.paths import BASE_MODEL, CLIP_MODEL, DATASET_TOML
from optimizer_daemon.lora_training.dataset import load_data
from optimizer_daemon.settings import OptimizerSettings
from optimizer_daemon.study_file import find_run
from optimizer_daemon.trainers.native import TRAINER
from shared.errors import SettingsError, StudyMismatchError
from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.schemas import Run, TrialParams
from shared.scoring_presets import metrics_of
from shared.settings import LoadedSettings

NOW = datetime(2025, 11, 15, tzinfo=UTC)


def first_start(root: Path, **changes) -> Run:
    settings = OptimizerSettings(
        **{
            "base_model": BASE_MODEL,
            "clip_model": CLIP_MODEL,
            "dataset_config": DATASET_TOML,
            "output_dir": root,
            "device": "cpu",
            **changes,
        }
    )
    return find_run(settings, StudyLayout(root), NOW)


def evaluator(**changes) -> LoadedSettings[EvaluatorSettings]:
    origins = dict.fromkeys(EvaluatorSettings.model_fields, "default")
    given = {name: f"--{name.replace('_', '-')}" for name in changes}
    return LoadedSettings(EvaluatorSettings(device="cpu", **changes), origins | given)


PARAMS = TrialParams(
    trial=1,
    optuna_number=0,
    parameters={"learning_rate": 1e-3, "network_dim": 4, "max_train_epochs": 2},
    origin="sampler",
    training_seed=1,
)


def trained_on(run: Run, root: Path) -> int:
    plan = TRAINER.plan(PARAMS, StudyLayout(root).trial(1), run)
    (root / "train_config.toml").write_text(plan.files["train_config.toml"])
    from optimizer_daemon.lora_training.config import load_config

    config = load_config(root / "train_config.toml")
    data = load_data(config.dataset_config, batch_size=1, multiple_of=4, held_out=config.held_out)
    held_out = {picture.sha256 for picture in run.pictures.held_out}
    assert not held_out & {image.sha256 for image in data.images}
    return len(data.images)


def test_the_usual_study_trains_on_every_picture_and_watches_for_copies(tmp_path):
    run = first_start(tmp_path)
    assert metrics_of(run.plan) == ("clip_consistency", "memorisation", "pixels")
    assert (len(run.pictures.held_out), len(run.pictures.training)) == (0, 24)
    assert trained_on(run, tmp_path) == 24


def test_without_a_clip_nothing_looks_at_the_pictures_and_the_plan_is_that_of_the_first_studies(tmp_path):
    run = first_start(tmp_path, clip_model=None)
    assert run.pictures is None
    assert "metrics" not in run.plan.scoring.values


@pytest.mark.parametrize("changes", [{"scoring": "recommended"}, {"metrics": "pixels,clip_image"}])
def test_naming_likeness_holds_pictures_out_of_the_training_for_good(tmp_path, changes):
    run = first_start(tmp_path, **changes)
    assert (len(run.pictures.held_out), len(run.pictures.training)) == (4, 20)
    assert trained_on(run, tmp_path) == 20
    write_model(StudyLayout(tmp_path).run, run)
    assert first_start(tmp_path, **changes).pictures == run.pictures
    job = find_job(evaluator(), StudyLayout(tmp_path))
    assert job.pictures == run.pictures
    with pytest.raises(StudyMismatchError, match="leave the flag out"):
        find_job(evaluator(reference_pictures=tmp_path), StudyLayout(tmp_path))
    with pytest.raises(StudyMismatchError, match=r"the study's run\.json has"):
        find_job(evaluator(metrics="pixels"), StudyLayout(tmp_path))
    with pytest.raises(StudyMismatchError, match=r"the study's run\.json has"):
        find_job(evaluator(scoring="lpips_clip"), StudyLayout(tmp_path))


def test_the_evaluator_refuses_a_held_out_picture_that_has_changed(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(20):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(data / f"{i}.png")
    (tmp_path / "d.toml").write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "data"\nclass_tokens = "a"\n')
    root = tmp_path / "study"
    root.mkdir()
    run = first_start(root, dataset_config=tmp_path / "d.toml", metrics="pixels,clip_image")
    write_model(StudyLayout(root).run, run)
    Path(run.pictures.held_out[0].path).write_bytes(b"another")
    with pytest.raises(StudyMismatchError, match="the content of this held-out picture"):
        find_job(evaluator(), StudyLayout(root))


def data_set(folder: Path, count: int = 3) -> Path:
    (folder / "data").mkdir()
    for i in range(count):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / "data" / f"{i}.png")
        (folder / "data" / f"{i}.txt").write_text(f"caption {i}")
    toml = folder / "d.toml"
    toml.write_text(
        '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "data"\ncaption_extension = "txt"\n'
    )
    return toml


def begun(folder: Path, toml: Path, **changes) -> dict[str, Any]:
    """A study that was started once; how it is started again."""
    study = StudyLayout(folder / "study")
    study.root.mkdir()
    settings = {"root": study.root, "dataset_config": toml, "clip_model": None, **changes}
    write_model(study.run, first_start(**settings))
    return settings


def save_again(picture: Path) -> None:
    Image.open(picture).save(picture, compress_level=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(lambda data: save_again(data / "1.png"), r"data/1\.png has changed", id="a picture saved again"),
        pytest.param(lambda data: (data / "1.txt").write_text("x"), r"data/1\.txt has changed", id="a caption"),
        pytest.param(lambda data: (data / "1.txt").unlink(), r"data/1\.txt is gone", id="no caption"),
        pytest.param(lambda data: (data / "9.txt").write_text("x"), r"data/9\.txt is new", id="another caption"),
        pytest.param(
            lambda data: (data.parent / "d.toml").write_text(
                (data.parent / "d.toml").read_text().replace("resolution = 64", "resolution = 128")
            ),
            r"d\.toml has changed",
            id="the TOML",
        ),
        pytest.param(
            lambda data: [(data / f"{i}.png").unlink() for i in range(3)] + [(data / "0.txt").unlink()],
            r"0\.png is gone; .*; and 1 more\), .* another --output-dir",
            id="many",
        ),
    ],
)
def test_a_study_goes_on_with_no_other_data_set(tmp_path, change, says):
    again = begun(tmp_path, data_set(tmp_path))
    change(tmp_path / "data")
    with pytest.raises(StudyMismatchError, match=says):
        first_start(**again)


def test_what_no_training_reads_may_change_in_a_data_set(tmp_path):
    toml = data_set(tmp_path)
    again = begun(tmp_path, toml)
    toml.write_text("# of last summer\n" + toml.read_text())
    (tmp_path / "data" / "0_latents.npz").write_bytes(b"of another program")
    assert first_start(**again).dataset_files is not None


@pytest.mark.parametrize("pictures", [False, True])
def test_a_study_from_before_its_files_were_written_down_gets_them_at_its_next_start(tmp_path, pictures):
    toml = data_set(tmp_path)
    again = begun(tmp_path, toml, **({"clip_model": CLIP_MODEL} if pictures else {}))
    run_file = StudyLayout(tmp_path / "study").run
    run = read_model(run_file, Run)
    write_model(run_file, run.model_copy(update={"dataset_files": None}))
    assert first_start(**again).dataset_files == run.dataset_files
    assert (run.pictures is not None) == pictures
    save_again(tmp_path / "data" / "1.png")
    if pictures:  # the older record has them
        with pytest.raises(StudyMismatchError, match=r"1\.png: the content of this training picture"):
            first_start(**again)
    else:
        assert first_start(**again).dataset_files != run.dataset_files


def test_a_data_set_that_is_none_of_kohyas_counts_by_its_bytes(tmp_path):
    (tmp_path / "rows.csv").write_text("picture,text\n")
    (tmp_path / "prompts.txt").write_text("a ball\n")
    again = begun(tmp_path, tmp_path / "rows.csv", prompts=tmp_path / "prompts.txt")
    assert first_start(**again).dataset_files.keys() == {str(tmp_path / "rows.csv")}
    (tmp_path / "rows.csv").write_text("picture,text,more\n")
    with pytest.raises(StudyMismatchError, match=r"rows\.csv has changed"):
        first_start(**again)


def test_targets_of_the_data_set_are_measured_as_the_renders_are(tmp_path):
    (tmp_path / "own.toml").write_text(
        'name = "own"\nobjective = "own_score"\ntargets = "dataset"\n[terms.light]\nmetric = "brightness"\n'
        'kind = "distance_to_target"\ntarget = "brightness"\nweight = 1.0\n'
    )
    run = first_start(tmp_path, scoring=str(tmp_path / "own.toml"), clip_model=None)
    pictures = sorted((DATASET_TOML.parent / "dataset").rglob("*.png"))
    expected = np.mean([pixel_statistics(np.array(Image.open(file).convert("RGB"))).brightness for file in pictures])
    assert run.plan.scoring.values["term.light.target"] == pytest.approx(expected)
    assert run.plan.scoring.objective == "own_score"


def test_likeness_without_enough_pictures_or_networks_is_refused_at_the_start(tmp_path):
    (tmp_path / "data").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "data" / "a.png")
    (tmp_path / "d.toml").write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "data"\nclass_tokens = "a"\n')
    with pytest.raises(SettingsError, match="1 different pictures"):
        first_start(tmp_path, dataset_config=tmp_path / "d.toml", metrics="pixels,clip_image")
    with pytest.raises(SettingsError, match="its score needs clip_consistency; add --clip-model"):
        first_start(tmp_path, clip_model=None, scoring="recommended")

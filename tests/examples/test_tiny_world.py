"""The shipped tiny world is what its card says: loaded, rendered and judged again, on fewer pictures."""

from __future__ import annotations

import json
import tomllib

import numpy as np
import pytest
import torch
from PIL import Image

from evaluator_daemon.metrics.pixels import pixel_statistics, sentinel
from examples.tiny_world import dataset, paths
from examples.tiny_world.card import card_text
from examples.tiny_world.judge import ClipJudge, ColorJudge, random_prompts, render_prompts
from examples.tiny_world.pictures import COMBINATIONS
from examples.tiny_world.reference_lora import load_base
from examples.tiny_world.scenes import BASE_LIGHTINGS, LIGHTINGS, TARGET_LIGHTING, draw_scene, render
from optimizer_daemon.search.load import load_space


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measured():
    return json.loads((paths.CARD_FILES / "measurements.json").read_text())


@pytest.fixture(scope="module")
def clip():
    return ClipJudge()


@pytest.fixture(scope="module")
def renders():
    """(prompts, pictures) of 18 fresh prompts."""
    prompts = random_prompts(18, BASE_LIGHTINGS, seed=31)
    return prompts, render_prompts(load_base(), prompts, seed=5000, batch=18)


def test_scenes_are_deterministic_and_never_alike():
    rng = np.random.default_rng(3)
    scenes = [draw_scene(rng, "harsh", shape="cube", color="red", background="gray") for _ in range(4)]
    assert len({render(scene).tobytes() for scene in scenes}) == 4
    assert np.array_equal(render(scenes[0]), render(scenes[0]))


def test_the_data_set_is_24_captioned_pictures_in_the_target_style_that_kohya_can_read():
    config = tomllib.loads(paths.DATASET_TOML.read_text())
    subset = config["datasets"][0]["subsets"][0]
    files = sorted((paths.DATASET_TOML.parent / subset["image_dir"]).glob("*.png"))
    assert len(files) == 24
    for file, scene in zip(files, dataset.dataset_scenes(), strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), render(scene))
        text = file.with_suffix(config["general"]["caption_extension"]).read_text()
        assert text.strip() == scene.caption
        assert scene.lighting == TARGET_LIGHTING


def test_all_committed_files_together_stay_below_25_mb():
    files = [f for f in paths.HERE.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) <= 25e6


def test_the_color_judge_names_ray_cast_scenes_in_every_style():
    rng = np.random.default_rng(8)
    for lighting in LIGHTINGS:
        judge = ColorJudge([lighting])
        scenes = [draw_scene(rng, lighting) for _ in range(24)]
        right = [judge.name(render(s)) == (s.color, s.background) for s in scenes]
        assert np.mean(right) >= 0.95


def test_clip_finds_fresh_scenes_among_144_captions(clip):
    rng = np.random.default_rng(12)
    scenes = [
        draw_scene(rng, style, shape=s, color=c, background=b) for style in LIGHTINGS for s, c, b in COMBINATIONS[::4]
    ]
    named = clip.name(np.stack([render(scene) for scene in scenes]))
    assert np.mean([n == (s.shape, s.color, s.background) for n, s in zip(named, scenes, strict=True)]) >= 0.8


def test_the_base_model_follows_fresh_prompts(renders, clip):
    prompts, images = renders
    named = clip.name(images)
    right = np.array([[n == w for n, w in zip(name, (p.shape, p.color, p.background), strict=True)]
                      for name, p in zip(named, prompts, strict=True)])  # fmt: skip
    assert right.mean(axis=0).min() >= 0.8  # 90 % on the card's 200; 18 prompts scatter
    assert all(sentinel(pixel_statistics(image)) is None for image in images)


def test_colour_arithmetic_agrees_with_the_prompts(renders):
    prompts, images = renders
    judge = ColorJudge(BASE_LIGHTINGS)
    right = [judge.name(i) == (p.color, p.background) for i, p in zip(images, prompts, strict=True)]
    assert np.mean(right) >= 0.8


def test_the_card_was_written_from_the_measurements(measured):
    assert paths.CARD.read_text() == card_text(measured)


def test_the_measured_model_meets_its_goals(measured):
    assert min(measured["clip_retrieval_top1_of_144"].values()) >= 0.8
    assert min(measured["prompt_accuracy_200"][k] for k in measured["prompt_accuracy_200"] if "all" not in k) >= 0.9


def test_the_measured_learning_rates_behave_as_in_the_textbook(measured):
    runs = measured["learning_rates"]
    base = runs["base"]["combined_score"]
    low, good = runs["too low"]["curve"], runs["good"]["curve"]
    assert all(abs(row["combined_score"] - base) < 0.25 * base for row in low)
    assert good[-1]["combined_score"] < 0.6 * base
    assert good[-1]["clip_accuracy"] >= 0.8 * runs["base"]["clip_accuracy"]
    assert all(row["gate_passed"] for row in low + good)


def test_the_gate_refuses_the_collapsed_lora_that_the_score_alone_would_like(measured):
    runs = measured["learning_rates"]
    collapsed = [row for row in runs["collapse"]["curve"] if not row["gate_passed"]]
    assert len(collapsed) >= 5
    assert min(row["combined_score"] for row in collapsed) < runs["base"]["combined_score"]


def test_two_epochs_train_at_least_three_times_as_long_as_one_evaluation(measured):
    good = measured["learning_rates"]["good"]
    assert good["train_s_per_2_epochs"] >= 3 * good["evaluate_s"]


def test_the_study_carries_its_own_space_with_the_names_of_v2_1():
    study = tomllib.loads((paths.HERE / "study.toml").read_text())
    space = load_space(paths.HERE / study["optimizer"]["search_space"])
    assert space.parameters.keys() == load_space("v2.1").parameters.keys()

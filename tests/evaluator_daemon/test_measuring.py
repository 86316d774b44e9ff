"""From pictures to scores and the gate, as they are written down."""

from __future__ import annotations

import numpy as np
import pytest

from evaluator_daemon.measuring import gate_of, measure, scores_of
from evaluator_daemon.metrics.base import RenderedSet, measured, unavailable
from evaluator_daemon.metrics.pixels import PixelMetrics, mean_difference
from shared.errors import SettingsError
from shared.schemas import EvaluationPlan, ScoringPreset
from shared.scores.formulas import combined_score


def plan(**values) -> EvaluationPlan:
    return EvaluationPlan(
        prompts=("a",), negative_prompt="", num_samples=2, base_seed=1, width=8, height=8, steps=1, sampler="s",
        cfg_scale=1.0, clip_skip=1, base_digest="0" * 64, vae_digest=None, lora_scale=1.0, dtype="float32",
        batch_size=2, scoring=ScoringPreset(name="combined", objective="combined_score", values=values),
    )  # fmt: skip


def pictures(seed: int = 0, count: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(count)]


def rendered(found: list[np.ndarray], base: list[np.ndarray] | None = None) -> RenderedSet:
    return RenderedSet(found, ["a"] * len(found), base)


def test_the_base_model_has_no_difference_from_itself_to_report():
    assert "base_difference" not in measure([PixelMetrics(None)], rendered(pictures()))
    same = measure([PixelMetrics(None)], rendered(pictures(), pictures()))
    assert same["base_difference"].value == 0
    other = measure([PixelMetrics(None)], rendered(pictures(), pictures(1)))
    assert 0 < other["base_difference"].value < 1


def test_a_difference_is_on_the_scale_of_0_to_1():
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert (mean_difference(black, white), mean_difference(white, black)) == (1.0, 1.0)


def test_the_targets_are_those_frozen_in_the_plan():
    metrics = measure([PixelMetrics(None)], rendered(pictures()))
    brightness, contrast = metrics["brightness"].per_image, metrics["contrast"].per_image
    usual = combined_score(brightness, contrast).combined_score
    assert scores_of(metrics, plan())["combined_score"].value == pytest.approx(usual)
    moved = scores_of(metrics, plan(**{"target.brightness": 0.9}))["combined_score"].value
    assert moved == pytest.approx(combined_score(brightness, contrast, target_brightness=0.9).combined_score)
    with pytest.raises(SettingsError, match=r"target\.contrast"):
        scores_of(metrics, plan(**{"target.contrast": "low"}))


CLIP = measured([0.8, 0.7, 0.8, 0.7], "maximise")


@pytest.mark.parametrize(
    ("clip", "base_clip", "passed", "value"),
    [
        pytest.param(CLIP, CLIP, True, 0.0, id="as the base model"),
        pytest.param(measured([0.4, 0.3, 0.4, 0.3], "maximise"), CLIP, False, -0.4, id="worse on every picture"),
        pytest.param(
            measured([0.1] * 3, "maximise"), measured([0.9] * 3, "maximise"), None, None, id="three pairs are too few"
        ),
        pytest.param(unavailable("no CLIP", "maximise"), CLIP, None, None, id="the LoRA's is unavailable"),
        pytest.param(CLIP, unavailable("no CLIP", "maximise"), None, None, id="the base model's is unavailable"),
    ],
)
def test_the_clip_gate(clip, base_clip, passed, value):
    found = gate_of(rendered(pictures()), {"clip_consistency": clip}, {"clip_consistency": base_clip}, plan())
    check = found.checks["clip_consistency"]
    assert check.passed is passed
    assert check.value == (None if value is None else pytest.approx(value))
    assert check.limit == -0.02
    assert found.feasible is (passed is not False)
    assert bool(check.reason) is (passed is not True)


def test_a_black_picture_fails_the_gate_whatever_clip_says():
    black = [*pictures(), np.zeros((8, 8, 3), np.uint8)]
    found = gate_of(rendered(black), {"clip_consistency": CLIP}, {"clip_consistency": CLIP}, plan())
    assert not found.feasible
    assert found.checks["sentinels"].reason == "image 2 is black"


def test_the_tolerance_of_the_plan_counts():
    worse = {"clip_consistency": measured([0.7, 0.6, 0.7, 0.6], "maximise")}
    base = {"clip_consistency": CLIP}
    assert not gate_of(rendered(pictures()), worse, base, plan()).feasible
    assert gate_of(rendered(pictures()), worse, base, plan(**{"gate.clip_tolerance": 0.2})).feasible


def test_a_metric_that_the_study_leaves_out_is_an_unchecked_gate_not_a_failed_one():
    found = rendered(pictures(), pictures(1))
    metrics = measure([PixelMetrics(None)], found)
    verdict = gate_of(found, metrics, metrics, plan(metrics="pixels"))
    assert verdict.feasible
    assert verdict.checks["clip_consistency"].passed is None
    assert "--metrics leaves it out" in (verdict.checks["clip_consistency"].reason or "")

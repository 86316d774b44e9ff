"""Recorded figures against each other: differences, verdicts, the best of those that may win."""

from __future__ import annotations

from datetime import UTC, datetime
from statistics import fmean

import numpy as np
import pytest
from scipy.special import stdtrit

from evaluator_daemon.measuring import scores_of
from evaluator_daemon.metrics.base import measured, unavailable
from evaluator_daemon.operands import fresh_plan
from shared.schemas import (
    EvaluationPlan,
    Gate,
    GateCheck,
    Metric,
    Metrics,
    PhaseSeconds,
    PromptOptions,
    Sample,
    ScoringPreset,
)
from shared.scores.comparing import best_of, compare, fields_that_differ, score_values
from shared.scores.from_values import scores_from_values, values_of
from shared.scoring_presets import frozen_preset, load_preset

PLAN = EvaluationPlan(
    prompts=("a", "b", "c"), negative_prompt="", num_samples=8, base_seed=42, width=64, height=64, steps=2,
    sampler="dpmpp_2m_karras", cfg_scale=7.5, clip_skip=1, base_digest="a" * 64, vae_digest=None, lora_scale=1.0,
    dtype="float32", batch_size=8, scoring=ScoringPreset(name="combined", objective="combined_score", values={}),
)  # fmt: skip
WAVE = (0.01, -0.02, 0.03, 0.0, -0.01, 0.02, -0.03, 0.005)
PASSED = Gate(feasible=True, checks={"sentinels": GateCheck(passed=True)})
FAILED = Gate(feasible=False, checks={"sentinels": GateCheck(passed=False, reason="image 1 is black")})


def of(name: str, brightness: float, *, gate: Gate = PASSED, noise: int = 0, pictures: int = 8) -> Metrics:
    """Eight pictures around a brightness; `noise` shifts whose residual is whose."""
    shifted = [WAVE[(i + noise) % 8] * 0.4 + WAVE[i % 8] for i in range(pictures)]
    figures = {
        "brightness": measured([brightness + wave for wave in shifted], "target"),
        "contrast": measured([0.25 + wave / 2 for wave in shifted], "target"),
        "saturation": measured([0.4 + wave for wave in shifted], "target"),
        "sharpness": measured([brightness / 2 + wave for wave in shifted], "maximise"),
        "of_the_set": Metric(version="1", direction="maximise", status="ok", value=brightness),
    }
    return Metrics(
        trial_name="t", checkpoint=name, checkpoint_sha256="b" * 64, plan_hash=PLAN.digest(), epoch=1,
        evaluation_time=datetime(2025, 11, 15, tzinfo=UTC),
        samples=tuple(Sample(file=f"sample_{i}.png", prompt="a", seed=i) for i in range(pictures)),
        metrics=figures, scores=scores_of(figures, PLAN), gate=gate,
        seconds=PhaseSeconds(load=0, render=0, measure=0, total=0), batch_size=8, device="cpu", library_versions={},
    )  # fmt: skip


def test_the_best_is_named_with_its_tie_set_and_a_failed_gate_never_wins():
    found = {
        "good": of("good", 0.6),
        "as good": of("as good", 0.606, noise=3),
        "poor": of("poor", 0.9, noise=5),
        "collapsed": of("collapsed", 0.5, gate=FAILED),
    }
    best = best_of(found, PLAN)
    assert (best.checkpoint, set(best.tie_set)) == ("good", {"good", "as good"})
    assert best.score == found["good"].scores["combined_score"].value
    assert 0.5 < best.certainty < 0.95
    assert best_of({"collapsed": found["collapsed"]}, PLAN) is None
    assert best_of({}, PLAN) is None


def test_one_picture_ranks_but_tells_nothing():
    best = best_of({"a": of("a", 0.6, pictures=1), "b": of("b", 0.9, pictures=1)}, PLAN)
    assert (best.checkpoint, best.certainty, best.tie_set) == ("a", None, ("a", "b"))


def test_two_sides_have_a_verdict_in_every_quantity():
    found = compare({"dark": of("dark", 0.7), "light": of("light", 0.9, noise=2)}, PLAN)
    verdicts = {row.name: row.differences[0].verdict for row in found.rows}
    assert found.reference == "light"
    assert verdicts["combined_score"] == "better"
    assert verdicts["sharpness"] == "worse"
    assert verdicts["brightness"] == "differs"
    assert verdicts["saturation"] == "cannot be told"
    assert verdicts["of_the_set"] == "no interval"
    score = next(row for row in found.rows if row.name == "combined_score").differences[0]
    assert score.interval.mean == pytest.approx(score.mean - found.rows[2].reference_mean)
    assert found.best.tie_set == ("dark",)


def test_of_three_the_best_is_what_the_others_are_held_against_and_reasons_are_told():
    sides = {"a": of("a", 0.9), "b": of("b", 0.6, noise=1), "c": of("c", 0.5, gate=FAILED)}
    found = compare(sides, PLAN)
    assert (found.reference, found.infeasible) == ("b", {"c": "sentinels: image 1 is black"})
    assert [d.side for d in found.rows[0].differences] == ["a", "c"]


def test_the_values_of_a_score_that_is_a_distance_average_to_it_nearly():
    metrics = of("a", 0.8)
    values = score_values(metrics, PLAN)
    assert fmean(values["brightness_score"]) == pytest.approx(metrics.scores["brightness_score"].value, abs=0.002)
    assert len(values["combined_score"]) == 8


def test_plans_differ_in_named_fields_of_the_scoring_too():
    preset = ScoringPreset(name="combined", objective="combined_score", values={"target.brightness": 0.4})
    other = PLAN.model_copy(update={"steps": 30, "scoring": preset})
    assert fields_that_differ(PLAN, other) == {"steps": (2, 30), "scoring target.brightness": (None, 0.4)}
    assert fields_that_differ(PLAN, PLAN) == {}


@pytest.mark.parametrize("pictures", [1, 8, 9, 32])
def test_fresh_seeds_are_none_of_the_plans(pictures):
    plan = PLAN.model_copy(update={"num_samples": pictures})
    fresh = fresh_plan(plan, 16)
    seeds = [{one.sample(i).seed for i in range(one.num_samples)} for one in (plan, fresh)]
    assert not seeds[0] & seeds[1]
    assert fresh.num_samples == 16
    assert fresh_plan(plan, 16) == fresh


@pytest.mark.parametrize("fresh_pictures", [16, 200])
@pytest.mark.parametrize(
    "seeds",
    [(2**63 - 1, None, None), (2**63 - 1, 2**63 - 2, 2**62), (0, 1, 2**63 - 1), (2**63 - 60, 30, None), (7, 9, 20)],
)
def test_seeds_at_the_end_of_their_range_go_on_at_its_beginning_and_stay_apart(seeds, fresh_pictures):
    options = tuple(PromptOptions(seed=seed) for seed in seeds)
    plan = EvaluationPlan.model_validate({**dict(PLAN), "num_samples": 32, "overrides": options})
    fresh = fresh_plan(plan, fresh_pictures)
    found = [{one.sample(i).seed for i in range(one.num_samples)} for one in (plan, fresh)]
    assert not found[0] & found[1]
    assert all(0 <= seed < 2**63 for seed in found[0] | found[1])


LPIPS_PLAN = PLAN.model_copy(update={"scoring": frozen_preset(load_preset("lpips_clip"))})


def mean_distances(points: np.ndarray) -> np.ndarray:
    """(n,) each point's mean distance to all the others."""
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    return distances.sum(axis=1) / (len(points) - 1)


def spread_out(seed: int, pictures: int = 12) -> tuple[Metrics, np.ndarray]:
    """Figures whose lpips_diversity comes from features, with these."""
    points = np.random.default_rng(seed).normal(0.3, 0.1, (pictures, 3))
    metrics = of(f"of {seed}", 0.7, noise=seed, pictures=pictures)
    figures = {**metrics.metrics, "lpips_diversity": measured(mean_distances(points).tolist(), "target")}
    figures["clip_consistency"] = measured([0.05 + wave for wave in np.resize(WAVE, pictures)], "maximise")
    changes = {"metrics": figures, "scores": scores_of(figures, LPIPS_PLAN), "plan_hash": LPIPS_PLAN.digest()}
    return metrics.model_copy(update=changes), points


def without_each(metrics: Metrics, points: np.ndarray) -> list[float]:
    """The score as it is when a picture was never there: all its distances are gone from the others too."""
    found = []
    for left in range(len(points)):
        values = {name: np.delete(v, left).tolist() for name, v in values_of(metrics.metrics).items()}
        values["lpips_diversity"] = mean_distances(np.delete(points, left, axis=0)).tolist()
        score = scores_from_values(values, LPIPS_PLAN.scoring)["lpips_clip_score"].value
        assert score is not None
        found.append(score)
    return found


def test_a_score_of_distances_between_pictures_is_as_uncertain_as_leaving_each_out_says():
    metrics, points = spread_out(1)
    n, score = len(points), metrics.scores["lpips_clip_score"].value
    expected = [n * score - (n - 1) * without for without in without_each(metrics, points)]
    assert score_values(metrics, LPIPS_PLAN)["lpips_clip_score"] == pytest.approx(expected)


def test_the_interval_of_a_mean_over_pairs_is_about_twice_that_of_its_values():
    (one, points), (other, others) = spread_out(1), spread_out(2)
    row = next(row for row in compare({"a": one, "b": other}, LPIPS_PLAN).rows if row.name == "lpips_diversity")
    n, leave_out = len(points), []
    for left in range(n):
        leave_out.append(fmean(mean_distances(np.delete(points, left, 0)) - mean_distances(np.delete(others, left, 0))))
    error = np.sqrt((n - 1) / n * np.sum((np.array(leave_out) - fmean(leave_out)) ** 2))
    interval = row.differences[0].interval
    assert interval.mean == pytest.approx(fmean(mean_distances(points) - mean_distances(others)))
    assert (interval.high - interval.low) / 2 == pytest.approx(float(stdtrit(n - 1, 0.975) * error))


def test_a_single_pair_of_pictures_tells_no_error():
    one, other = spread_out(1, pictures=2)[0], spread_out(2, pictures=2)[0]
    rows = {row.name: row.differences[0].verdict for row in compare({"a": one, "b": other}, LPIPS_PLAN).rows}
    assert rows["lpips_diversity"] == rows["lpips_clip_score"] == "no interval"


def without_clip(metrics: Metrics) -> Metrics:
    """The same pictures, measured where no CLIP was there."""
    figures = {**metrics.metrics, "clip_consistency": unavailable("no CLIP", "maximise")}
    return metrics.model_copy(update={"metrics": figures, "scores": scores_of(figures, LPIPS_PLAN)})


def test_only_scores_of_the_same_parts_are_ranked():
    whole, partly = spread_out(1)[0], without_clip(spread_out(1)[0])
    assert partly.scores["lpips_clip_score"].value < whole.scores["lpips_clip_score"].value, "the trap"
    best = best_of({"partly": partly, "whole": whole}, LPIPS_PLAN)
    assert (best.checkpoint, best.certainty, best.tie_set) == ("whole", None, ("whole",))
    best = best_of({"partly": partly, "whole": whole, "other": spread_out(2)[0]}, LPIPS_PLAN)
    assert best.checkpoint in ("whole", "other") and "partly" not in best.tie_set and best.certainty is not None
    both = best_of({"a": partly, "b": without_clip(spread_out(2)[0])}, LPIPS_PLAN)
    assert both is not None and both.certainty is not None, "all without it are alike"


def test_a_row_says_that_its_scores_were_made_of_different_parts():
    whole, partly = spread_out(1)[0], without_clip(spread_out(1)[0])
    found = compare({"partly": partly, "whole": whole}, LPIPS_PLAN)
    rows = {row.name: row.differences[0] for row in found.rows}
    told = "lpips_clip_score was made without clip_consistency"
    assert (rows["lpips_clip_score"].verdict, rows["lpips_clip_score"].reason) == ("not comparable", told)
    assert rows["lpips_clip_score"].interval is None
    assert rows["combined_score"].verdict == "cannot be told", "the others are compared as ever"
    assert (found.best.checkpoint, found.unranked) == ("whole", {"partly": told})
    turned = compare({"whole": whole, "partly": partly}, LPIPS_PLAN)
    row = next(row for row in turned.rows if row.name == "lpips_clip_score")
    assert row.differences[0].reason == "lpips_clip_score was made with clip_consistency besides"

"""Which objectives a study can have, what their values are, and what is refused with the list of the others."""

from __future__ import annotations

from datetime import datetime

import pytest

from evaluator_daemon.metrics import METRICS, plugin
from examples.tiny_world.paths import BASE_MODEL
from optimizer_daemon.search.objectives import BETTER, losses, measured_values, objectives_of, possible
from shared.errors import SettingsError
from shared.metric_names import METRIC_SOURCES
from shared.planning import make_plan
from shared.schemas import Gate, Metric, Metrics, Objective, PhaseSeconds, Sample, Score
from shared.scoring_presets import SOURCE_OF, frozen_preset, load_preset

BRIGHTNESS = Objective(name="brightness", direction="minimise", target=0.5)
CONTRAST = Objective(name="contrast", direction="minimise", target=0.2)


def plan(preset: str = "combined", metrics=METRIC_SOURCES):
    scoring = frozen_preset(load_preset(preset), metrics=metrics)
    return make_plan(base_model=BASE_MODEL, prompts=["a"], device="cpu", num_samples=1, scoring=scoring)


def measurements(**means: float | None) -> Metrics:
    return Metrics(
        trial_name="trial_0001", checkpoint="c", checkpoint_sha256="0" * 64, plan_hash="0" * 64, epoch=2,
        evaluation_time=datetime.now().astimezone(), samples=(Sample(file="sample_0.png", prompt="a", seed=1),),
        metrics={
            name: Metric(
                version="1", direction="target", value=value, status="unavailable" if value is None else "ok",
                reason="no weights" if value is None else None,
            )
            for name, value in means.items()
        },
        scores={"combined_score": Score(value=0.3, direction="minimise")},
        gate=Gate(feasible=True, checks={}), seconds=PhaseSeconds(load=0.0, render=0.0, measure=0.0, total=0.0),
        batch_size=1, device="cpu", library_versions={},
    )  # fmt: skip


def test_brightness_and_contrast_are_distances_to_the_scoring_s_targets():
    found = objectives_of("brightness,contrast", plan())
    assert found == (BRIGHTNESS, CONTRAST)
    assert measured_values(found, measurements(brightness=0.45, contrast=0.26)) == pytest.approx(
        {"brightness": 0.05, "contrast": 0.06}
    )


def test_a_metric_keeps_its_own_direction_and_a_score_its_value():
    found = objectives_of("clip_consistency, combined_score", plan())
    assert [(known.direction, known.target) for known in found] == [("maximise", None), ("minimise", None)]
    values = measured_values(found, measurements(clip_consistency=0.31))
    assert values == {"clip_consistency": 0.31, "combined_score": 0.3}
    assert losses(values, found) == (-0.31, 0.3)


def test_what_was_not_measured_has_no_value():
    assert measured_values([BRIGHTNESS, CONTRAST], measurements(brightness=None)) == {}


def test_a_target_of_the_scoring_s_own_terms_counts_before_the_usual_one():
    scoring = frozen_preset(load_preset("combined"))
    values = {**scoring.values, "term.light.metric": "brightness", "term.light.kind": "distance_to_target",
              "term.light.weight": 1.0, "term.light.target": 0.62}  # fmt: skip
    scoring = scoring.model_copy(update={"objective": "own_score", "values": values})
    own = make_plan(base_model=BASE_MODEL, prompts=["a"], device="cpu", num_samples=1, scoring=scoring)
    assert possible(own)["brightness"].target == 0.62
    assert possible(own)["contrast"].target == 0.20
    assert possible(own)["own_score"].direction == "minimise"


def test_lpips_diversity_is_an_objective_where_it_is_measured_and_has_a_target():
    measured = (*METRIC_SOURCES, "lpips_diversity")
    assert "lpips_diversity" not in possible(plan("combined", measured))
    assert "lpips_diversity" not in possible(plan("lpips_clip"))
    assert possible(plan("lpips_clip", measured))["lpips_diversity"].target == 0.40


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("brightness,contrst", "there is no 'contrst'"),
        ("brightness", "one objective is what --scoring is for"),
        (",", "there is no name in it"),
        ("brightness,contrast,brightness", "brightness is named twice"),
        ("brightness,dino_likeness", "dino_likeness is not measured in this study"),
        ("brightness,base_difference", "its scoring names no target for it"),
    ],
)
def test_what_will_not_do_is_refused_with_the_list_of_what_would(names, says):
    with pytest.raises(SettingsError) as caught:
        objectives_of(names, plan())
    assert says in str(caught.value)
    assert "name two or more of combined_score, brightness_score, contrast_score, pixar_style_score, brightness" in str(
        caught.value
    )


def test_without_the_flag_there_are_none():
    assert objectives_of(None, plan()) == ()


def test_the_directions_are_those_of_the_evaluator_s_metrics():
    known = {}
    for name in METRICS.names:
        known |= plugin(name).facts.quantities
    for name in SOURCE_OF:
        if name in known:
            assert known[name].direction == BETTER.get(name, "target"), name

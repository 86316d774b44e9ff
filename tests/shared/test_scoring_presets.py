"""Scoring presets: read, refused, frozen in the plan and read back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from shared.errors import SettingsError
from shared.metric_names import MetricInputs
from shared.schemas.plan import ScoringPreset
from shared.scoring_presets import (
    combined_preset,
    frozen_preset,
    goals_of,
    load_preset,
    plan_scoring,
    preset_names,
    terms_of,
)

MINIMAL = 'name = "mine"\nobjective = "mine_score"\n[terms.light]\nmetric = "brightness"\nkind = "distance_to_target"\n'


def test_the_presets_of_the_program_are_whole_and_survive_the_plan():
    assert preset_names() == ["combined", "lpips_clip", "recommended"]
    for name in preset_names():
        preset = load_preset(name)
        frozen = frozen_preset(preset)
        assert ScoringPreset.model_validate_json(frozen.model_dump_json()) == frozen
        assert terms_of(frozen) == preset.terms
        assert (preset.name, frozen.objective) == (name, preset.objective)


def test_the_default_scoring_is_word_for_word_that_of_the_first_studies():
    text = json.dumps(combined_preset().model_dump(), sort_keys=True)
    assert text == (
        '{"name": "combined", "objective": "combined_score", "values": {"gate.clip_tolerance": 0.02, '
        '"target.brightness": 0.5, "target.contrast": 0.2, "weight.std": 0.5}}'
    ), hashlib.sha256(text.encode()).hexdigest()


def test_the_later_script_is_40_30_30():
    terms = load_preset("lpips_clip").terms
    assert [(t.metric, t.kind, t.weight, t.target) for t in terms.values()] == [
        ("combined_score", "value", 0.40, None),
        ("lpips_diversity", "distance_to_target", 0.30, 0.40),
        ("clip_consistency", "shortfall", 0.30, 0.35),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "mend the TOML"),
        (MINIMAL + "weight = 1", "target"),
        (MINIMAL + 'weight = 1\ntarget = "mood"', "no target 'mood'"),
        (MINIMAL + "weight = 0\ntarget = 0.5", "without effect"),
        (MINIMAL + "weight = 1\ntarget = 0.5\nrequired = false", "at least one term must be required"),
        (MINIMAL.replace('"brightness"', '"memorisation"') + "weight = 1\ntarget = 0.5", "no score can use"),
        (MINIMAL.replace("mine_score", "combined_score") + "weight = 1\ntarget = 0.5", "always the same formula"),
        (MINIMAL.replace('"mine"', '"combined"') + "weight = 1\ntarget = 0.5", "is a preset of this program"),
        ('name = "mine"\nobjective = "combined_score"\n[goals.mood]\nlow = 0\nhigh = 1', "no goal 'mood'"),
    ],
)
def test_a_preset_that_will_not_do_is_refused_with_file_and_remedy(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message) as refused:
        load_preset(str(file))
    assert str(file) in str(refused.value)
    assert "--scoring" in str(refused.value)


def test_an_unknown_name_lists_the_presets():
    with pytest.raises(SettingsError, match="combined, lpips_clip, recommended"):
        load_preset("best")


def test_targets_of_the_data_set_and_goals_are_numbers_in_the_plan(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'targets = "dataset"\n' + MINIMAL + 'weight = 2\ntarget = "brightness"\n[goals.brightness]\nlow=0.6\nhigh=0.7\n'
    )
    frozen = frozen_preset(load_preset(str(file)), measured_targets={"brightness": 0.625})
    assert frozen.values["term.light.target"] == 0.625
    assert (goals_of(frozen)["brightness"].low, goals_of(frozen)["contrast"].low) == (0.6, 0.18)
    with pytest.raises(SettingsError, match='targets = "dataset" needs pictures'):
        plan_scoring(load_preset(str(file)), ("pixels",), MetricInputs(), lambda pictures: {})


def test_a_score_whose_metric_nothing_can_measure_is_refused_at_the_start():
    with pytest.raises(SettingsError, match="its score needs clip_consistency; add --clip-model FOLDER"):
        plan_scoring(load_preset("recommended"), ("pixels",), MetricInputs(), lambda pictures: {})
    with pytest.raises(SettingsError, match=r"style_distance.*20 pictures"):
        given = MetricInputs(clip_model=Path("clip"))
        plan_scoring(load_preset("recommended"), ("pixels",), given, lambda pictures: {})

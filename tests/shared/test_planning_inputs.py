"""Which metrics a study measures, and how its plan remembers it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.devices import require_device
from shared.errors import ResourceError, SettingsError, UnknownPluginError
from shared.metric_names import METRIC_SOURCES, MetricInputs, parse_metrics
from shared.schemas.pictures import Picture, StudyPictures
from shared.scoring_presets import combined_preset


@pytest.mark.parametrize(
    ("names", "found"),
    [
        pytest.param(None, METRIC_SOURCES, id="not said"),
        pytest.param("pixels,clip_consistency", METRIC_SOURCES, id="all of them in another order"),
        pytest.param(" pixels , pixels,", ("pixels",), id="one, written twice and with blanks"),
    ],
)
def test_metrics_are_read_from_a_list_of_names(names, found):
    assert parse_metrics(names) == found


CLIP = MetricInputs(clip_model=Path("clip"))
PICTURES = StudyPictures(training=(Picture(path="a.png", sha256="0" * 64),))


@pytest.mark.parametrize(
    ("inputs", "added"),
    [
        pytest.param(CLIP, set(), id="a CLIP alone"),
        pytest.param(MetricInputs(Path("clip"), pictures=PICTURES), {"memorisation"}, id="a CLIP and a data set"),
        pytest.param(MetricInputs(lpips_weights=Path("alex.pth")), {"lpips_diversity"}, id="LPIPS weights"),
    ],
)
def test_the_default_measures_what_the_inputs_allow_but_never_holds_pictures_out(inputs, added):
    assert set(parse_metrics(None, inputs)) == {*METRIC_SOURCES, *added}


def test_unknown_metrics_and_lists_that_lack_or_waste_something_are_refused():
    with pytest.raises(UnknownPluginError, match="no metric named 'fid'; choose one of clip_consistency, clip_image"):
        parse_metrics("pixels,fid")
    with pytest.raises(SettingsError, match="the score is computed from pixels; add it"):
        parse_metrics("")
    with pytest.raises(SettingsError, match="the score is computed from style_distance; add it"):
        parse_metrics("pixels", None, ("style_distance",))
    with pytest.raises(SettingsError, match="--clip-model only serves clip_consistency, clip_image"):
        parse_metrics("pixels", CLIP)
    with pytest.raises(SettingsError, match="--lpips-weights only serves lpips_diversity"):
        parse_metrics("pixels", MetricInputs(lpips_weights=Path("alex.pth")))


def test_only_another_choice_than_the_default_is_written_into_the_plan():
    assert "metrics" not in combined_preset().values
    assert combined_preset(metrics=("pixels",)).values["metrics"] == "pixels"


def test_a_device_beyond_those_of_this_machine_is_refused():
    require_device("cpu")
    require_device("auto")
    with pytest.raises(ResourceError, match="--device cuda:99: "):
        require_device("cuda:99")

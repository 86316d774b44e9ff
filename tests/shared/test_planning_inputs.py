"""Which metrics a study measures, and how its plan remembers it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.devices import require_device
from shared.errors import ResourceError, SettingsError, UnknownPluginError
from shared.scoring_presets import METRIC_SOURCES, combined_preset, parse_metrics


@pytest.mark.parametrize(
    ("names", "found"),
    [
        pytest.param(None, METRIC_SOURCES, id="not said"),
        pytest.param("pixels,clip_consistency", METRIC_SOURCES, id="all of them in another order"),
        pytest.param(" pixels , pixels,", ("pixels",), id="one, written twice and with blanks"),
    ],
)
def test_metrics_are_read_from_a_list_of_names(names, found):
    assert parse_metrics(names, None) == found


def test_unknown_metrics_and_a_list_without_pixels_are_refused():
    with pytest.raises(UnknownPluginError, match="no metric named 'fid'; choose one of clip_consistency, pixels"):
        parse_metrics("pixels,fid", None)
    with pytest.raises(SettingsError, match="the score is computed from pixels; add it"):
        parse_metrics("", None)
    with pytest.raises(SettingsError, match="only serves clip_consistency"):
        parse_metrics("pixels", Path("clip"))


def test_only_another_choice_than_the_default_is_written_into_the_plan():
    assert "metrics" not in combined_preset().values
    assert combined_preset(metrics=("pixels",)).values["metrics"] == "pixels"


def test_a_device_beyond_those_of_this_machine_is_refused():
    require_device("cpu")
    require_device("auto")
    with pytest.raises(ResourceError, match="--device cuda:99: "):
        require_device("cuda:99")

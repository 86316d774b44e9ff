"""NAME=VALUE words of `set` and `enqueue`."""

from __future__ import annotations

import pytest

from optimizer_daemon.cli import _pairs
from shared.errors import SettingsError


@pytest.mark.parametrize(
    ("word", "value"),
    [
        pytest.param("rate=1e-4", 1e-4, id="a number"),
        pytest.param("dim=8", 8, id="a whole number"),
        pytest.param("cache=true", True, id="true"),
        pytest.param("optimizer_type=AdamW", "AdamW", id="text"),
        pytest.param('optimizer_type="AdamW"', "AdamW", id="text in quotes"),
        pytest.param("rate=NaN", "NaN", id="NaN is no number"),
        pytest.param("betas=[0.9, 0.99]", "[0.9, 0.99]", id="a list is text"),
        pytest.param("args=weight_decay=0.1", "weight_decay=0.1", id="a second equals sign"),
    ],
)
def test_values_are_read_as_people_mean_them(word, value):
    (found,) = _pairs([word]).values()
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("words", [["dim"], ["=8"], ["dim="], ["dim=8", "dim=4"]])
def test_what_is_no_pair_is_refused(words):
    with pytest.raises(SettingsError, match="write each as NAME=VALUE, once"):
        _pairs(words)

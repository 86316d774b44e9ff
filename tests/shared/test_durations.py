"""Times as people read them."""

from __future__ import annotations

import pytest

from shared.durations import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00"), (425, "7:05"), (11225, "3:07:05")],
)
def test_seconds_as_people_read_them(seconds, text):
    assert duration(seconds) == text

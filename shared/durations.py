"""Times as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return seconds as people read them: 42 s, 7:05, 3:07:05."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

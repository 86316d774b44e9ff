"""Trial after trial that fails in the same way: when a study stops for it, and which failures are the same."""

from __future__ import annotations

import re

from shared.errors import ResourceError

MOST_EQUAL_FAILURES = 3  # in a row

WHERE = "; it ended "
"""Before it a reason says what happened, behind it where, and the last lines."""

_KIND_CHARACTERS = 100


class FailureStreak:
    """The failures since the last trial that did not fail, or failed in another way."""

    def __init__(self) -> None:
        self._kinds: list[str] = []

    def remember(self, failure: str | None) -> None:
        """Take note of how a trial ended.

        Args:
            failure: why it failed; None where it did not.
        Raises:
            ResourceError: so many failed in the same way that the rest of the night would be lost, too.
        """
        if failure is None:
            self._kinds.clear()
            return
        kind = kind_of(failure)
        self._kinds = [*self._kinds, kind] if set(self._kinds) <= {kind} else [kind]
        if len(self._kinds) >= MOST_EQUAL_FAILURES:
            raise ResourceError(
                f"{len(self._kinds)} trials in a row failed in the same way; mend it and start again: {failure}"
            )


def kind_of(reason: str) -> str:
    """Return what equal failures have in common: no numbers, as in paths and steps, and no quoted lines."""
    return re.sub(r"[0-9]+", "", reason.partition(WHERE)[0])[:_KIND_CHARACTERS]

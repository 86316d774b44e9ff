"""SIGTERM and SIGINT as a wish that the training asks about at safe points."""

from __future__ import annotations

import signal
from types import FrameType

from shared.errors import Stopped


class StopWish:
    """Remembers the first signal to stop; later ones change nothing, for the stop is already under way."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def listen(self) -> None:
        """Take over SIGTERM and SIGINT; main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def check(self) -> None:
        """Return unless a stop was asked for.

        Raises:
            Stopped: it was.
        """
        if self._signal is not None:
            raise Stopped(self._signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number

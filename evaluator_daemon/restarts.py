"""When an evaluator may be started. Pure: time and chance come in as arguments.

Each trial has its own back-off. Where evaluators fail one after the other, of whichever trial, the fault is not the
trials' (a full disk, a broken driver): the breaker opens, and one at a time is let through until one does something.
"""

from __future__ import annotations

from dataclasses import dataclass

from evaluator_daemon.sweep import back_off_s

BREAKER_AFTER = 5
"""Evaluators that fail in a row, none of which has settled a checkpoint, before the breaker opens."""
BREAKER_S = 300.0
"""How long it stays open before the next one is tried."""
LEAST_GAP_S = 2.0
"""An evaluator that ended well and yet is wanted again is not started more often than this."""


@dataclass
class History:
    """What the manager remembers of a trial between its evaluators.

    Args:
        failures: how many of its evaluators failed in a row without settling a checkpoint.
        not_before_s: monotonic time of the next start.
        last_exit: how its last evaluator ended.
        passed: with --once: it has had its turn.
    """

    failures: int = 0
    not_before_s: float = 0.0
    last_exit: int | None = None
    passed: bool = False


class Restarts:
    """The histories of all trials, and the breaker.

    Args:
        once: a trial's evaluator is started once, unless the history says otherwise; no breaker.
    """

    def __init__(self, *, once: bool) -> None:
        self._once = once
        self._histories: dict[str, History] = {}
        self._failures_in_a_row = 0
        self._open_until_s = 0.0

    def of(self, name: str) -> History:
        """Return what is remembered of a trial."""
        return self._histories.setdefault(name, History())

    def forget(self, name: str) -> None:
        """Start with a trial as if it were new."""
        self._histories.pop(name, None)

    def forget_all(self) -> None:
        """Start with every trial as if it were new; what ails the machine stays known."""
        self._histories.clear()

    @property
    def is_broken(self) -> bool:
        """Whether so many failed in a row that they are tried one at a time."""
        return not self._once and self._failures_in_a_row >= BREAKER_AFTER

    def may_start(self, name: str, now_s: float, *, running: int) -> bool:
        """Whether a trial's evaluator may be started now, `running` others being at work."""
        history = self.of(name)
        if (self._once and history.passed) or now_s < history.not_before_s:
            return False
        return not self.is_broken or (running == 0 and now_s >= self._open_until_s)

    def ended(self, name: str, code: int, now_s: float, *, asked_to: bool, settled: bool, chance: float) -> float:
        """Note how an evaluator ended.

        Args:
            code: its exit code; minus the signal that ended it.
            asked_to: we had asked it to end.
            settled: it had settled a checkpoint.
            chance: in [0, 1), for the back-off.
        Returns:
            After how many seconds the trial may have another.
        """
        history = self.of(name)
        history.last_exit, history.passed = code, True
        failed = code != 0 and not asked_to
        if not failed:
            history.failures = 0
        else:
            history.failures = 1 if settled else history.failures + 1
        if settled or (code == 0 and not asked_to):
            self._failures_in_a_row = 0
        elif failed:
            self._failures_in_a_row += 1
            self._open_until_s = now_s + BREAKER_S
        wait_s = back_off_s(history.failures, chance) if failed else 0.0 if asked_to else LEAST_GAP_S
        history.not_before_s = now_s + wait_s
        return wait_s

    def progressed(self) -> None:
        """Note that a living evaluator has settled a checkpoint: whatever ailed them all is over."""
        self._failures_in_a_row = 0

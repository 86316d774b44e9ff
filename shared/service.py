"""The loop of a daemon: a tick at a steady rate, or at once when something happens; signals; systemd.

    service = Service()
    service.run(tick, interval_s=30.0)     # raises Stopped when a signal asks to stop

Signals: the first SIGTERM, SIGINT or SIGHUP lets the tick in progress end and then stops; a second one interrupts even
the tick, unless it is a SIGHUP: a terminal that is closed sends several. A SIGHUP that was inherited as ignored (nohup)
stays ignored. SIGCHLD brings the next tick forward. A daemon that has more to do before and after its loop holds
`signals()` around it all.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from types import FrameType

from shared.errors import Stopped

Wait = Callable[[int, float], bool]
"""(file descriptor, timeout in seconds) -> whether the descriptor became readable in time."""

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Service:
    """One daemon's loop. All but `wake` belongs to the main thread.

    Args:
        clock: monotonic time in seconds.
        wait: how to wait, see Wait.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, wait: Wait | None = None) -> None:
        self._clock = clock
        self._wait = wait or _wait_readable
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stop_signal: int | None = None
        self._ending = False
        self._has_signals = False
        self._watchdog_period_s = watchdog_period_s()

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for; a long tick looks here between its steps."""
        return self._ending or self._stop_signal is not None

    def stop(self) -> None:
        """End the loop after the tick in progress; `run` then returns normally."""
        self._ending = True

    def wake(self) -> None:
        """Bring the next tick forward; from any thread or signal handler."""
        with contextlib.suppress(BlockingIOError):  # a full pipe will wake the loop anyway
            os.write(self._wake_writer, b"w")

    def status(self, text: str) -> None:
        """Show one line in `systemctl status`."""
        notify(f"STATUS={' '.join(text.split())}")

    def keep_alive(self) -> None:
        """Tell systemd's watchdog that a tick makes progress; a tick that may take minutes calls it at times."""
        if self._watchdog_period_s is not None:
            notify("WATCHDOG=1")

    def run(self, tick: Callable[[], None], interval_s: float) -> None:
        """Call `tick` now and every `interval_s` seconds, sooner when woken, until told to stop.

        Ticks stay on the grid start + k * interval_s: no drift, and no burst after a tick that took longer.

        Raises:
            Stopped: a signal asked for it; its exit code is 130 for SIGINT, else 143.
        """
        with self.signals():
            notify("READY=1")
            try:
                self._loop(tick, interval_s)
            finally:
                if self._stop_signal is None:
                    notify("STOPPING=1")
        if self._stop_signal is not None:
            raise Stopped(self._stop_signal)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Handle signals as the loop does: the first asks for a stop, a second raises Stopped wherever we are."""
        if self._has_signals:
            yield
            return
        with self._handlers():
            self._has_signals = True
            try:
                yield
            finally:
                self._has_signals = False

    def _loop(self, tick: Callable[[], None], interval_s: float) -> None:
        due = self._clock()
        while not self.stopping:
            tick()
            self.keep_alive()
            due = next_due(due, self._clock(), interval_s)  # a tick after a wake-up leaves it where it was
            while not self.stopping and not self._woken_before(due):
                self.keep_alive()
                if self._clock() >= due:
                    break

    def _woken_before(self, due: float) -> bool:
        """Wait until `due`, or until systemd wants to hear from us; True as soon as something happened."""
        timeout_s = max(0.0, due - self._clock())
        if self._watchdog_period_s is not None:
            timeout_s = min(timeout_s, self._watchdog_period_s / 2)
        if not self._wait(self._wake_reader, timeout_s):
            return False
        seen = _drain(self._wake_reader)
        # A child the tick itself ran and waited for needs no other tick, else such a tick would never pause.
        return bool(seen - {signal.SIGCHLD}) or _has_dead_child()

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        handlers = dict.fromkeys(_STOP_SIGNALS, self._on_stop_signal)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            del handlers[signal.SIGHUP]
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, _on_child_signal)
        previous_fd = signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _on_stop_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop_signal is not None:
            if number == signal.SIGHUP:
                return
            raise Stopped(self._stop_signal)
        self._stop_signal = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        notify("STOPPING=1")  # now: the tick in progress may take long


def next_due(due: float, now: float, interval_s: float) -> float:
    """Return the first time after `now` on the grid due + k * interval_s, k >= 0."""
    return due + interval_s * max(0, math.floor((now - due) / interval_s) + 1)


def notify(*assignments: str) -> bool:
    """Send one sd_notify datagram, e.g. notify("READY=1", "STATUS=2 trials run"); see sd_notify(3).

    Returns:
        False when no service manager listens, or it does no longer: a daemon lives without it.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
    ):
        channel.sendto("\n".join(assignments).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, address)
        return True
    return False


def watchdog_period_s() -> float | None:
    """Return how often systemd wants to hear from this very process, in seconds; None when it does not care."""
    period_us = os.environ.get("WATCHDOG_USEC", "")
    addressee = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(period_us) / 1e6 if period_us.isdigit() and addressee == str(os.getpid()) else None


def _on_child_signal(number: int, frame: FrameType | None) -> None:
    """The wake-up pipe has done all there is to do."""


def _wait_readable(fd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(math.ceil(timeout_s * 1000)))


def _drain(fd: int) -> set[int]:
    """Empty the wake-up pipe: Python writes each signal's number there, `wake` a letter beyond any of them."""
    seen: set[int] = set()
    with contextlib.suppress(BlockingIOError):
        while True:
            seen.update(os.read(fd, 4096))
    return seen


def _has_dead_child() -> bool:
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return False

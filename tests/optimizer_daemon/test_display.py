"""The live line: on a terminal only, never in the way of the log, never wider than the window."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios

import pytest

from optimizer_daemon.display import LiveLine, duration


def test_a_terminal_shows_one_line_cut_to_its_width_and_clear_takes_it_away():
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    with os.fdopen(follower, "w") as terminal:
        line = LiveLine(terminal)
        line.draw(["1/8 trials", "trial 2 training: epoch 1/4"])
        assert os.read(leader, 1000).decode() == "\r\x1b[K1/8 trials  trial 2"
        line.clear()
        assert os.read(leader, 1000).decode() == "\r\x1b[K"
        line.clear()  # nothing is there to be taken away
        line.draw(["x"])
        assert os.read(leader, 1000).decode() == "\r\x1b[Kx"
    os.close(leader)


def test_what_is_no_terminal_gets_nothing():
    stream = io.StringIO()
    line = LiveLine(stream)
    line.draw(["1/8 trials"])
    line.clear()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00"), (425, "7:05"), (11225, "3:07:05")],
)
def test_seconds_as_people_read_them(seconds, text):
    assert duration(seconds) == text

"""The live line: on a terminal only, never in the way of the log, never wider than the window."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios

from optimizer_daemon.display import LiveLine


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

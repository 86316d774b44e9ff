"""The daemon's loop: its rhythm on a simulated clock, its signals and systemd messages on real ones."""

import os
import secrets
import signal
import socket
import subprocess
import threading
import time

import pytest

from shared.errors import Stopped
from shared.service import Service, next_due, notify, watchdog_period_s
from tests.shared.process_trees import PATIENCE_S, no_process_left, python, start, wait_until  # noqa: F401  autouse

DAEMON = """
    import subprocess, sys, time
    from shared.commands import run_command
    from shared.service import Service
    service = Service()
    def tick():
        print("tick", flush=True)
        TICK
        print("tock", flush=True)
    def main():
        service.run(tick, interval_s=60.0)
    sys.exit(run_command(main))
"""
WAIT_FOR_STOP = """
        while not service.stopping:
            time.sleep(0.01)
        time.sleep(1.0)
"""


def daemon(tick: str = "", **options) -> subprocess.Popen:
    """Start a daemon and wait for its first tick."""
    process = start(DAEMON.replace("TICK", tick.strip() or "pass"), **options)
    assert process.stdout.readline() == "tick\n"
    return process


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


class Simulation:
    """A clock that only waiting and ticks move."""

    def __init__(self, tick_durations_s: list[float]) -> None:
        self.now = 1000.0
        self.ticks: list[float] = []
        self.service = Service(clock=lambda: self.now, wait=self.wait)
        self.durations = iter(tick_durations_s)

    def wait(self, fd: int, timeout_s: float) -> bool:
        self.now += timeout_s
        return False

    def tick(self) -> None:
        self.ticks.append(round(self.now - 1000.0, 6))
        duration = next(self.durations, None)
        if duration is None:
            self.service.stop()
        else:
            self.now += duration


class TestRhythm:
    @pytest.mark.parametrize(
        ("durations", "ticks"),
        [
            pytest.param([0, 0, 0], [0, 30, 60, 90], id="ticks that take no time"),
            pytest.param([7.3, 11.9, 0.1], [0, 30, 60, 90], id="the time a tick takes does not shift the next"),
            pytest.param([65, 1], [0, 90, 120], id="missed ticks are not made up for"),
            pytest.param([30, 1], [0, 60, 90], id="a tick that ends when the next is due lets it pass"),
        ],
    )
    def test_ticks_stay_on_the_grid(self, durations, ticks):
        simulation = Simulation(durations)
        simulation.service.run(simulation.tick, interval_s=30)
        assert simulation.ticks == ticks

    def test_a_thousand_ticks_do_not_drift(self):
        simulation = Simulation([0.05 + number % 7 / 10 for number in range(1000)])
        simulation.service.run(simulation.tick, interval_s=1)
        assert simulation.ticks == list(range(1001))

    @pytest.mark.parametrize(
        ("due", "now", "expected"), [(0, 0, 30), (0, 29.9, 30), (0, 30, 60), (0, 95, 120), (30, 5, 30)]
    )
    def test_the_next_tick_is_the_first_on_the_grid_after_now(self, due, now, expected):
        assert next_due(due, now, 30) == expected

    def test_a_thread_wakes_the_loop_and_the_grid_stays(self):
        service, times, begin = Service(), [], time.monotonic()

        def tick() -> None:
            times.append(time.monotonic() - begin)
            if len(times) == 1:
                threading.Timer(0.05, service.wake).start()
            else:
                service.stop()

        service.run(tick, interval_s=PATIENCE_S)
        assert len(times) == 2
        assert times[1] < PATIENCE_S

    def test_many_wakes_are_one_tick(self):
        service, ticks = Service(), []

        def tick() -> None:
            ticks.append(time.monotonic())
            if len(ticks) == 1:
                for _ in range(70_000):  # more than the pipe holds
                    service.wake()
            if len(ticks) == 3:
                service.stop()

        service.run(tick, interval_s=2)
        assert ticks[2] - ticks[1] > 0.1, "the third tick came by the clock"

    def test_wakes_do_not_put_off_the_tick_that_is_due(self):
        """Ten wakes in the first moment, and the tick by the clock still comes after one interval."""
        service, begin, times = Service(), time.monotonic(), []

        def tick() -> None:
            times.append(time.monotonic() - begin)
            if len(times) <= 10:
                service.wake()
            elif len(times) == 12:
                service.stop()

        service.run(tick, interval_s=1)
        assert times[10] < 1 <= times[11] < 5

    def test_a_failing_tick_ends_the_loop_with_its_error(self):
        def tick() -> None:
            raise LookupError("a bug")

        with pytest.raises(LookupError, match="a bug"):
            Service().run(tick, interval_s=1)


class TestSignals:
    @pytest.mark.parametrize(
        ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)], ids=str
    )
    def test_one_signal_ends_the_waiting_daemon(self, number, status):
        process = daemon()
        assert process.stdout.readline() == "tock\n"
        process.send_signal(number)
        assert finished(process) == (status, "", f"stopped by signal {status - 128}\n")

    def test_one_signal_lets_the_tick_end(self):
        process = daemon(WAIT_FOR_STOP)
        process.send_signal(signal.SIGTERM)
        assert finished(process)[:2] == (143, "tock\n")

    @pytest.mark.parametrize(
        ("first", "second", "status"),
        [
            pytest.param(signal.SIGTERM, signal.SIGTERM, 143, id="SIGTERM twice"),
            pytest.param(signal.SIGINT, signal.SIGINT, 130, id="SIGINT twice"),
            pytest.param(signal.SIGINT, signal.SIGTERM, 130, id="the first one names the end"),
        ],
    )
    def test_a_second_signal_ends_even_the_tick(self, first, second, status):
        tick = """
        while not service.stopping:
            time.sleep(0.01)
        print("stopping", flush=True)
        time.sleep(600)
        """
        process = daemon(tick)
        process.send_signal(first)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(second)
        assert finished(process)[:2] == (status, "")

    def test_a_terminal_that_is_closed_may_say_so_several_times(self):
        process = daemon(WAIT_FOR_STOP)
        for _ in range(3):
            process.send_signal(signal.SIGHUP)
            time.sleep(0.05)
        assert finished(process)[:2] == (143, "tock\n"), "the tick ended in peace"

    @pytest.mark.parametrize("where", ["before", "after"])
    def test_signals_count_before_and_after_the_loop_too(self, where):
        script = DAEMON.replace("TICK", "service.stop()" if where == "after" else "pass").replace(
            "service.run(tick, interval_s=60.0)",
            """
        import os, signal
        with service.signals():
            if "WHERE" == "before":
                os.kill(os.getpid(), signal.SIGTERM)
            service.run(tick, interval_s=60.0)
            os.kill(os.getpid(), signal.SIGTERM)
            print("first", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            print("never", flush=True)
""".replace("WHERE", where),
        )
        out = {"before": "", "after": "tick\ntock\nfirst\n"}[where]
        assert finished(start(script))[:2] == (143, out)

    def test_a_sighup_inherited_as_ignored_stays_ignored(self):
        with_nohup = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"]
        script = DAEMON.replace("TICK", WAIT_FOR_STOP.strip())
        process = start("import os, sys; os.execvp(sys.argv[1], sys.argv[1:])", *with_nohup, *python(script))
        assert process.stdout.readline() == "tick\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert finished(process)[:2] == (130, "tock\n"), "only SIGINT counted"

    def test_a_child_that_ends_brings_the_next_tick_forward(self):
        process = daemon('children = globals().setdefault("children", [subprocess.Popen(["sleep", "0.1"])])')
        assert process.stdout.readline() == "tock\n"
        assert process.stdout.readline() == "tick\n", "long before the interval is over"
        process.send_signal(signal.SIGTERM)
        process.communicate()

    def test_a_tick_that_runs_a_command_does_not_wake_itself(self):
        process = daemon('subprocess.run(["true"])')
        assert process.stdout.readline() == "tock\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert finished(process)[:2] == (143, "")

    def test_handlers_and_wake_up_descriptor_are_restored(self):
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
        before = [signal.getsignal(number) for number in numbers]
        service = Service()
        service.run(service.stop, interval_s=1)
        assert [signal.getsignal(number) for number in numbers] == before
        assert signal.set_wakeup_fd(-1) == -1

    def test_they_are_restored_after_a_signal_too(self):
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Stopped) as caught:
            Service().run(lambda: os.kill(os.getpid(), signal.SIGTERM), interval_s=1)
        assert caught.value.exit_code == 143
        assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture(params=["a path", "an abstract name"])
def channel(request, tmp_path, monkeypatch):
    """What systemd listens on."""
    name = str(tmp_path / "notify") if request.param == "a path" else f"@test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        server.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield server


def messages(channel: socket.socket) -> list[str]:
    """Return the datagrams that have arrived."""
    received = []
    channel.settimeout(0.2)
    try:
        while True:
            received.append(channel.recv(4096).decode())
    except TimeoutError:
        return received


class TestSystemd:
    def test_a_life_in_datagrams(self, channel):
        service = Service()

        def tick() -> None:
            service.status("2 trials\nrunning")
            service.stop()

        service.run(tick, interval_s=1)
        assert messages(channel) == ["READY=1", "STATUS=2 trials running", "STOPPING=1"]

    def test_several_assignments_are_one_datagram(self, channel):
        assert notify("READY=1", "STATUS=up")
        assert messages(channel) == ["READY=1\nSTATUS=up"]

    def test_a_stop_by_signal_is_told_at_once_and_once(self, channel):
        process = daemon(WAIT_FOR_STOP)
        process.send_signal(signal.SIGTERM)
        assert [channel.recv(100), channel.recv(100)] == [b"READY=1", b"STOPPING=1"]
        assert process.poll() is None, "the tick still runs"
        finished(process)
        assert messages(channel) == []

    def test_the_watchdog_hears_from_a_daemon_that_only_waits(self, channel, monkeypatch):
        monkeypatch.setenv("WATCHDOG_USEC", "100000")
        process = daemon()
        received = [channel.recv(100) for _ in range(6)]
        process.send_signal(signal.SIGTERM)
        finished(process)
        assert received == [b"READY=1", *[b"WATCHDOG=1"] * 5]

    def test_a_service_manager_that_went_away_is_no_error(self, channel, monkeypatch):
        channel.close()
        assert not notify("READY=1")

    @pytest.mark.parametrize("address", [None, "", "vsock:2:1234", "/no/such/socket"], ids=repr)
    def test_without_a_usable_socket_nothing_is_sent(self, address, monkeypatch):
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
        if address is not None:
            monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert not notify("READY=1")

    @pytest.mark.parametrize(
        ("usec", "pid", "period_s"),
        [
            pytest.param(None, None, None, id="no watchdog"),
            pytest.param("30000000", None, 30.0, id="for whoever reads it"),
            pytest.param("30000000", "self", 30.0, id="for this process"),
            pytest.param("30000000", "1", None, id="for another process"),
            pytest.param("soon", None, None, id="no number"),
        ],
    )
    def test_the_watchdog_period(self, usec, pid, period_s, monkeypatch):
        for name, value in [("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid and pid.replace("self", str(os.getpid())))]:
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        assert watchdog_period_s() == period_s

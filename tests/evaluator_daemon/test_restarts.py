"""When evaluators are started again, as a table of what happened; the clock and the dice are the test's."""

from __future__ import annotations

import pytest

from evaluator_daemon.restarts import BREAKER_AFTER, BREAKER_S, LEAST_GAP_S, Restarts


def ended(restarts: Restarts, name: str, code: int, now_s: float = 0.0, **changes) -> float:
    happened = {"asked_to": False, "settled": False, "chance": 1.0}
    return restarts.ended(name, code, now_s, **{**happened, **changes})


@pytest.mark.parametrize(
    ("ends", "waits"),
    [
        pytest.param([{}] * 10, [2, 4, 8, 16, 32, 64, 128, 256, 300, 300], id="failures in a row"),
        pytest.param([{"chance": 0.0}] * 3, [1, 2, 4], id="the dice halve it at most"),
        pytest.param([{}, {}, {"settled": True}, {}], [2, 4, 2, 4], id="one that settled something first"),
        pytest.param([{}, {}, {"asked_to": True}, {}], [2, 4, 0, 2], id="asked to end in between"),
    ],
)
def test_the_back_off_of_one_trial(ends, waits):
    restarts = Restarts(once=False)
    assert [ended(restarts, "a", 4, **end) for end in ends] == waits


def test_one_that_ended_well_and_is_wanted_again_is_not_started_in_a_spin():
    restarts = Restarts(once=False)
    assert ended(restarts, "a", 0, 100.0) == LEAST_GAP_S
    assert not restarts.may_start("a", 100.0, running=0)
    assert restarts.may_start("a", 100.0 + LEAST_GAP_S, running=0)


def broken() -> Restarts:
    restarts = Restarts(once=False)
    for number in range(BREAKER_AFTER):
        assert restarts.may_start("fresh", 0.0, running=1)
        ended(restarts, f"trial {number}", 4)
    return restarts


def test_an_open_breaker_lets_one_at_a_time_through():
    restarts = broken()
    assert restarts.is_broken
    assert not restarts.may_start("fresh", BREAKER_S - 1, running=0)
    assert restarts.may_start("fresh", BREAKER_S, running=0)
    assert not restarts.may_start("fresh", BREAKER_S, running=1)
    ended(restarts, "fresh", -11, BREAKER_S)
    assert not restarts.may_start("another", 2 * BREAKER_S - 1, running=0)
    assert restarts.may_start("another", 2 * BREAKER_S, running=0)


@pytest.mark.parametrize(
    "success",
    [
        pytest.param(lambda restarts: ended(restarts, "fresh", 0), id="one ends well"),
        pytest.param(lambda restarts: ended(restarts, "fresh", 4, settled=True), id="one settles something and fails"),
        pytest.param(lambda restarts: restarts.progressed(), id="a living one settles something"),
    ],
)
def test_any_success_closes_it(success):
    restarts = broken()
    success(restarts)
    assert not restarts.is_broken
    assert restarts.may_start("another", 0.0, running=1)


def test_our_own_stops_and_a_single_run_do_not_open_it():
    restarts = Restarts(once=False)
    for number in range(2 * BREAKER_AFTER):
        ended(restarts, f"trial {number}", -15, asked_to=True)
    assert not restarts.is_broken
    once = Restarts(once=True)
    for number in range(2 * BREAKER_AFTER):
        ended(once, f"trial {number}", 4)
    assert once.may_start("fresh", 0.0, running=1)
    assert not once.may_start("trial 1", 1e9, running=0), "it has had its turn"
    once.forget("trial 1")
    assert once.may_start("trial 1", 0.0, running=0)

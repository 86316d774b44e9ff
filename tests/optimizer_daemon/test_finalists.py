"""Which trial is trained again at a stage's end, and which one the winner is named from."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from optimizer_daemon.finalists import due, fresh_seed, line_up
from optimizer_daemon.optuna_adapter.study import Draw, Ended, TuningStudy
from optimizer_daemon.search.load import load_space
from optimizer_daemon.settings import OptimizerSettings
from shared.finalists import Contender, Origin, contending

TIME = datetime(2025, 11, 15, 10, 23, 45, tzinfo=UTC)


def ended(number: int, rate: float, value: float | None, *, of: int | None = None, enqueued: bool = False,
          reason: str | None = None, pruned: bool = False, stage: str | None = None) -> Ended:  # fmt: skip
    draw = Draw(number, {"rate": rate, "dim": 8}, stage, TIME, enqueued=enqueued or of is not None, finalist_of=of)
    return Ended(draw, value, pruned, reason, {}, TIME)


FIVE = [
    ended(0, 0.1, 0.5),
    ended(1, 0.2, 0.2),
    ended(2, 0.3, 0.1, reason="image 0 is black"),
    ended(3, 0.4, None, reason="worse", pruned=True),
    ended(4, 0.5, 0.3),
]
"""Trials 1, 4 and 0 may be finalists, the best first."""


@pytest.mark.parametrize(
    ("trials", "left", "count", "running", "of"),
    [
        pytest.param(FIVE, 3, 3, (), 1, id="the best of those that passed their gate comes first"),
        pytest.param(FIVE, 4, 3, (), None, id="the search goes on until the last ones"),
        pytest.param(FIVE, 0, 3, (), None, id="none is left"),
        pytest.param(FIVE, 1, 0, (), None, id="none is asked for"),
        pytest.param(FIVE, 4, 4, (), None, id="with fewer configurations than finalists the search goes on"),
        pytest.param(FIVE, 2, 3, (1,), 4, id="what runs already is not taken twice"),
        pytest.param([*FIVE, ended(5, 0.2, 0.9, of=1)], 2, 3, (), 4, id="what was made is not made again"),
        pytest.param([*FIVE, ended(5, 0.2, 0.9, of=1, reason="black")], 2, 3, (), 4,
                     id="a finalist that fails its gate is one all the same"),
        pytest.param([*FIVE, ended(5, 0.2, None, of=1, reason="oom")], 3, 3, (), 4,
                     id="after a failed one the next best comes first"),
        pytest.param([*FIVE, ended(5, 0.2, None, of=1, reason="oom"), ended(6, 0.5, 0.3, of=4),
                      ended(7, 0.1, 0.3, of=0)], 1, 3, (), 1, id="and it is tried again at last"),
        pytest.param([*FIVE, ended(5, 0.2, 0.5, enqueued=True)], 1, 3, (), 4,
                     id="a configuration counts by the mean of its scores"),
        pytest.param([*FIVE, ended(5, 0.2, 0.9, of=1), ended(6, 0.6, 0.4)], 1, 3, (), 4,
                     id="a finalist that a search came after is a trial like others"),
        pytest.param([*FIVE, ended(5, 0.2, 0.9, of=1), ended(6, 0.5, 0.3, of=4)], 1, 2, (), None,
                     id="one trial more than before is searched, no third best made a finalist"),
        pytest.param([*FIVE, ended(5, 0.2, 0.9, of=1), ended(6, 0.5, 0.3, of=4)], 2, 2, (), None,
                     id="of two more the first is searched"),
        pytest.param([*FIVE, ended(5, 0.2, 0.9, of=1), ended(6, 0.5, 0.3, of=4), ended(7, 0.6, 0.05)], 1, 2, (), 7,
                     id="and the second is a new finalist"),
        pytest.param([*FIVE, ended(5, 0.2, 0.9, of=1), ended(6, 0.5, 0.3, of=4)], 1, 3, (), 0,
                     id="with a larger number of finalists it is one more of them"),
        pytest.param([*FIVE, ended(5, 0.7, 0.01, stage="8 epochs")], 1, 3, (), 1, id="other stages do not count"),
    ],
)  # fmt: skip
def test_the_next_finalist(trials, left, count, running, of):
    repeat = due(trials, None, left, count, running)
    assert (None if repeat is None else repeat.of) == of
    if repeat is not None:
        assert repeat.values == trials[repeat.of].draw.values


def test_every_try_and_every_end_of_the_search_is_a_request_of_its_own():
    again = [*FIVE, ended(5, 0.2, None, of=1, reason="oom"), ended(6, 0.5, 0.3, of=4), ended(7, 0.1, 0.3, of=0)]
    later = [*again, ended(8, 0.6, 0.4)]
    requests = [due(trials, None, 1, 3).request for trials in (FIVE, again, later)]
    assert len(set(requests)) == 3


def test_a_fresh_seed_is_no_other_finalists_and_never_the_studys():
    seeds = [fresh_seed(42, number) for number in range(50)]
    assert len({*seeds, 42}) == 51
    assert seeds[0] == fresh_seed(42, 0)
    taken = fresh_seed(7, 3)
    assert fresh_seed(taken, 3) != taken


def trial(number: int, origin: Origin = "sampler", stage: str | None = None, *, may_win: bool = True) -> Contender:
    return Contender(number, origin, may_win, stage)


STAGED = [trial(1, stage="8"), trial(2, "finalist", "8"), trial(3, stage="15"), trial(4, "finalist", "15")]


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        pytest.param([trial(1), trial(2)], {1, 2}, id="without finalists all of them"),
        pytest.param([trial(1), trial(2, "finalist")], {2}, id="else the finalists"),
        pytest.param([trial(1), trial(2, "finalist", may_win=False)], {1, 2}, id="one without a score is none yet"),
        pytest.param([trial(1), trial(2, "finalist"), trial(3)], {1, 2, 3}, id="nor one that a search came after"),
        pytest.param([trial(1), trial(2, "finalist"), trial(3, "enqueued")], {2, 3},
                     id="what people ask for afterwards contends with them"),
        pytest.param(STAGED, {4}, id="a later stage's search came after an earlier one's finalists"),
        pytest.param(STAGED[:3], {1, 2, 3}, id="also before it has finalists"),
        pytest.param([*STAGED, trial(5, stage="8")], {4}, id="an earlier stage raised later takes no finalist away"),
        pytest.param([*STAGED, trial(5, stage="8"), trial(6, "finalist", "8")], {4, 6},
                     id="the raised stage's own finalists contend with them"),
        pytest.param([*STAGED, trial(5, stage="20")], {1, 2, 3, 4, 5}, id="a new stage is more search"),
        pytest.param([*STAGED, trial(5, stage="8"), trial(6, stage="15")], {1, 2, 3, 4, 5, 6},
                     id="as is the finalists' own stage raised"),
        pytest.param([*reversed(STAGED), trial(5, stage="8")], {4}, id="in whatever order they come"),
    ],
)  # fmt: skip
def test_the_winner_is_named_from_the_finalists(trials, expected):
    assert contending(trials) == expected


@pytest.mark.parametrize("sampler", ["tpe", "gp", "auto", "cmaes", "nsga2", "random"])
def test_every_sampler_goes_on_after_finalists(tmp_path, sampler):
    space = load_space("v2.1")
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = TuningStudy.open("s", url, space, seed=1, folder_id="a", sampler=sampler)
    for number in range(11):
        study.ask()
        study.tell_complete(number, number * 0.1, None)
    for left in (3, 2, 1):
        assert line_up(study, None, left, 3, ())
        repeat = study.ask()
        assert repeat.finalist_of == 3 - left
        assert repeat.values == study.ended()[repeat.finalist_of].draw.values
        study.tell_complete(repeat.number, 0.5, None)
    assert line_up(study, None, 0, 3, ())
    assert line_up(study, None, 4, 3, (None,)), "with a larger target the search goes on"
    drawn = [study.ask() for _ in range(2)]
    assert [draw.finalist_of for draw in drawn] == [None, None]
    assert all(space.validate(draw.values) == [] for draw in drawn)
    assert not line_up(study, None, 3, 3, (None, None)), "finalists wait for the scores of those"
    study.close()


@pytest.mark.parametrize(
    ("flags", "trials", "count"),
    [
        ({}, 30, 0),
        ({"sampler": "auto"}, 30, 3),
        ({"sampler": "auto"}, 10, 2),
        ({"sampler": "auto"}, 4, 0),
        ({"sampler": "auto", "finalists": 0}, 30, 0),
        ({"finalists": 5}, 30, 5),
    ],
)
def test_how_many_there_are(flags, trials, count):
    assert OptimizerSettings(**flags).finalists_of(trials) == count

"""Which trials a study's winner is named from, where its best configurations were trained again at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

Origin = Literal["sampler", "enqueued", "finalist"]


class Contender(NamedTuple):
    """One trial.

    Args:
        number: counted from 1.
        origin: where its values come from.
        may_win: it has a score and passed its gate.
    """

    number: int
    origin: Origin
    may_win: bool


def contending(trials: Iterable[Contender]) -> set[int]:
    """Return the numbers of the trials that the winner is named from.

    Finalists contend once the search is over, with what people asked for after it; as long as none of them may win, all
    trials do. A finalist that a search came after is a trial like all others.
    """
    known = list(trials)
    searched = max((trial.number for trial in known if trial.origin == "sampler"), default=0)
    last = [trial for trial in known if trial.number > searched]
    if not any(trial.origin == "finalist" and trial.may_win for trial in last):
        last = known
    return {trial.number for trial in last}

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
        stage: the stage it was drawn in; None where the study has none, or where that is unknown.
    """

    number: int
    origin: Origin
    may_win: bool
    stage: str | None = None


def contending(trials: Iterable[Contender]) -> set[int]:
    """Return the numbers of the trials that the winner is named from.

    Finalists contend once the search is over, with what people asked for after it; as long as none of them may win, all
    trials do. A finalist that a search of its own stage or of one begun later came after is a trial like all others;
    one that only an earlier stage was raised after goes on contending.
    """
    known = sorted(trials, key=lambda trial: trial.number)
    began: dict[str | None, int] = {}
    searched: dict[str | None, int] = {}  # the last draw of each stage
    for trial in known:
        began.setdefault(trial.stage, trial.number)
        if trial.origin == "sampler":
            searched[trial.stage] = trial.number
    searched_after = {
        stage: max((number for other, number in searched.items() if began[other] >= begin), default=0)
        for stage, begin in began.items()
    }
    last = [trial for trial in known if trial.origin != "sampler" and trial.number > searched_after[trial.stage]]
    if not any(trial.origin == "finalist" and trial.may_win for trial in last):
        last = known
    return {trial.number for trial in last}

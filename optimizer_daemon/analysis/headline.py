"""What the study found, in sentences, for every report: who won, how sure that is, against whom. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from optimizer_daemon.analysis.facts import BASE_MODEL, CheckpointFacts, Overtaken, StudyFacts, TrialFacts
from optimizer_daemon.analysis.summary import relative
from optimizer_daemon.trade_offs import front
from shared.scores.comparing import Comparison


def headline(facts: StudyFacts) -> list[str]:
    """Return the sentences: winner, certainty and tie set, against the base model and the baselines, a better epoch."""
    return [*winner_lines(facts), *against_lines(facts), *(overtaken_line(facts, one) for one in facts.overtaken)]


def winner_lines(facts: StudyFacts) -> list[str]:
    """Say who won and how sure that is; or why nobody has."""
    best, standing = facts.winner, facts.standing
    if best is None or standing is None:
        return [_why_no_winner(facts)]
    if facts.results.objectives:
        return _knee(facts, best)
    lines = [
        f"Trial {best.number} is the best of {_able(facts)} complete trials that passed their gate: "
        f"{facts.objective} {best.value:.4f} (lower is better)."
    ]
    if (first := _first_of(facts, best)) is not None:
        lines.append(
            f"It trained the configuration of trial {first.number} again with a fresh seed, which scored "
            f"{first.value:.4f} the first time; the winner is named from such finalists."
        )
    if _able(facts) == 1:
        return [*lines, "It is the only one so far, so there is nothing to compare it with."]
    if standing.certainty is None:
        lines.append(f"How sure that is cannot be told: {standing.why_not}.")
    else:
        lines.append(
            f"By its {standing.pictures} pictures it is truly the best of the {standing.compared} compared with a "
            f"chance of {standing.certainty:.0%}."
        )
    others = [number for number in standing.tied if number != best.number]
    if others and standing.certainty is not None:
        lines.append(
            f"{trials_named(others)} cannot be told from it by these pictures: look at them, or render more pictures."
        )
    elif standing.certainty is not None:
        lines.append("No other trial comes near enough to be mistaken for it.")
    return lines


def against_lines(facts: StudyFacts) -> list[str]:
    """Say for each rival whether the winner is better, and by how much."""
    lines = [_against(_named(name), comparison, facts.objective) for name, comparison in facts.against.items()]
    if facts.winner is not None and facts.base is None:
        lines.append("The base model has not been rendered, so the winner is not held against it.")
    return lines


def overtaken_line(facts: StudyFacts, found: Overtaken) -> str:
    """Say that a trial's earlier checkpoint is better than its final one, with the file."""
    where = relative(facts, found.better) or f"{found.better.name} (its file is gone)"
    passed = "" if found.final.feasible else ", which failed its gate"
    return (
        f"Trial {found.trial} was better before its end: {where} of epoch {_epoch(found.better)} scores "
        f"{_score(found.better)}, the final checkpoint {_score(found.final)}{passed}; more than chance explains."
    )


def trials_named(numbers: Sequence[int]) -> str:
    """Return "Trial 3", "Trials 3 and 5", "Trials 1, 2, 3 and 12 others"."""
    if len(numbers) == 1:
        return f"Trial {numbers[0]}"
    if len(numbers) > 8:
        return f"Trials {', '.join(map(str, numbers[:6]))} and {len(numbers) - 6} others"
    return f"Trials {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _knee(facts: StudyFacts, best: TrialFacts) -> list[str]:
    values = ", ".join(f"{o.name} {best.state.objectives[o.name]:.4f}" for o in facts.results.objectives)
    return [
        f"Trial {best.number} is the knee of the front of {len(front(facts.results))} trade-offs: {values}; "
        f"pareto_front.json has them all. Its {facts.objective} is {best.value:.4f}."
    ]


def _first_of(facts: StudyFacts, best: TrialFacts) -> TrialFacts | None:
    """The trial whose configuration the winner trained again, where it is a finalist."""
    number = best.params.finalist_of
    found = next((trial for trial in facts.trials if trial.number == number), None)
    return found if found is not None and found.value is not None else None


def _able(facts: StudyFacts) -> int:
    return sum(trial.may_win for trial in facts.ranking)


def _why_no_winner(facts: StudyFacts) -> str:
    scored = len(facts.ranking)
    if scored:
        return f"There is no winner: {scored} of {len(facts.trials)} trials have a score, and none passed its gate."
    failed = facts.count("failed")
    told = f", {failed} of them failed" if failed else ""
    return f"There is no winner yet: none of {len(facts.trials)} trials has a score{told}."


def _against(name: str, comparison: Comparison, objective: str) -> str:
    row = next((row for row in comparison.rows if row.name == objective), None)
    if row is None:
        return f"Against {name}: {objective} is not known of both."
    (of_winner,) = row.differences
    interval, ours, theirs = of_winner.interval, of_winner.mean, row.reference_mean
    if ours is None or theirs is None or of_winner.verdict == "not comparable":
        return f"Against {name}: {objective} cannot be compared{f' ({of_winner.reason})' if of_winner.reason else ''}."
    told = f"{objective} {ours:.4f} against {theirs:.4f}"
    if interval is None or of_winner.verdict == "no interval":
        return f"Against {name}: {told}; too few pictures to tell whether that is chance."
    told += f", a difference of {interval.mean:+.4f} (95 % interval {interval.low:+.4f} to {interval.high:+.4f})"
    verdict = {"better": "better", "worse": "worse"}.get(of_winner.verdict, "not to be told from it")
    return f"Against {name} the winner is {verdict}: {told}."


def _named(name: str) -> str:
    return f"the {name}" if name == BASE_MODEL else name


def _epoch(checkpoint: CheckpointFacts) -> str:
    return "unknown" if checkpoint.epoch is None else str(checkpoint.epoch)


def _score(checkpoint: CheckpointFacts) -> str:
    return "without a score" if checkpoint.score is None else f"{checkpoint.score:.4f}"

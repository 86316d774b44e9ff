"""Recorded figures against each other: which is better, by how much, and can it be told? Nothing is rendered here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shared.schemas import BestCheckpoint, EvaluationPlan, Metrics
from shared.scores.formulas import PAIRWISE, Interval, mean_over
from shared.scores.from_values import scores_from_values, values_of
from shared.scores.statistics import Ranking, difference, pseudo_values, rank
from shared.scoring_presets import terms_of

Direction = Literal["minimise", "maximise", "target"]
Verdict = Literal["better", "worse", "differs", "cannot be told", "no interval", "not comparable"]

FEWEST_OF_PAIRS = 3
"""Pictures from which leaving one out changes a mean over pairs."""


@dataclass(frozen=True)
class Difference:
    """One side against the reference side, in one quantity.

    Args:
        mean: this side's figure.
        interval: this side minus the reference, with its paired 95 % interval; None where only the figures are known.
        verdict: of this side; "differs" where the quantity has a target and neither end is better.
        reason: why the two are not comparable; else "".
    """

    side: str
    mean: float | None
    interval: Interval | None
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One metric or score of all sides.

    Args:
        reference_mean: the reference side's figure.
        differences: of the other sides, in their order.
    """

    name: str
    kind: Literal["metric", "score"]
    direction: Direction
    reference_mean: float | None
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Comparison:
    """Two or more sides on one plan.

    Args:
        sides: their names, in the order asked for.
        pictures: per side.
        reference: the side that the others are held against: the second of two, of more the one with the best score.
        infeasible: sides whose gate failed, with the reasons; they cannot be the best.
        unranked: feasible sides whose objective lacks a part that the best one's has, with what it was made without.
        best: which feasible side is best; None where none is.
    """

    objective: str
    sides: tuple[str, ...]
    pictures: int
    reference: str
    rows: tuple[Row, ...]
    infeasible: Mapping[str, str]
    unranked: Mapping[str, str]
    best: BestCheckpoint | None


def compare(sides: Mapping[str, Metrics], plan: EvaluationPlan) -> Comparison:
    """Compare sides that were evaluated with the same plan.

    Args:
        sides: name -> what was measured; two or more.
    """
    names = tuple(sides)
    objective = plan.scoring.objective
    tables = {name: score_values(metrics, plan) for name, metrics in sides.items()}
    best = best_of(sides, plan, tables)
    reference = names[1] if len(names) == 2 else (best.checkpoint if best else names[0])
    return Comparison(
        objective=objective,
        sides=names,
        pictures=min(len(metrics.samples) for metrics in sides.values()),
        reference=reference,
        rows=(*_score_rows(sides, tables, reference), *_metric_rows(sides, reference)),
        infeasible={name: why_infeasible(metrics) for name, metrics in sides.items() if not metrics.gate.feasible},
        unranked=_unranked(sides, objective),
        best=best,
    )


def best_of(
    checkpoints: Mapping[str, Metrics],
    plan: EvaluationPlan,
    tables: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> BestCheckpoint | None:
    """Name the best of those that may win, with what cannot be told from it; None where none may or has a score.

    Scores made of different parts are not on one scale: only those with the fewest parts left out are ranked.

    Args:
        tables: each one's `score_values`, where they are known.
    """
    objective = plan.scoring.objective
    scored = _scored(checkpoints, objective)
    left_out = _of_the_fullest(scored)
    known = {name: value for name, (value, without) in scored.items() if without == left_out}
    if not known:
        return None
    tables = tables or {name: score_values(checkpoints[name], plan) for name in known}
    minimise = checkpoints[next(iter(known))].scores[objective].direction == "minimise"
    names = list(known)
    columns = [tables[name].get(objective, ()) for name in names]
    ranking: Ranking
    if len({len(column) for column in columns}) == 1 and len(columns[0]) > 1:
        ranking = rank(np.array(columns), minimise=minimise, scores=list(known.values()))
    else:  # one picture, or no value per picture: nothing tells the difference from chance
        ranking = rank(np.array(list(known.values()))[:, None], minimise=minimise)
    best = names[ranking.best]
    certainty = ranking.certainty
    if len(known) == 1 < len(scored):
        certainty = None  # there was nothing to rank it with
    return BestCheckpoint(
        checkpoint=best,
        epoch=checkpoints[best].epoch,
        objective=objective,
        score=known[best],
        certainty=None if certainty is None else min(1.0, max(0.0, certainty)),
        tie_set=tuple(names[row] for row in ranking.tied),
    )


def score_values(metrics: Metrics, plan: EvaluationPlan) -> dict[str, tuple[float, ...]]:
    """Each score's pseudo-value per picture; scores that are null or too few pictures tell about are left out.

    Scores are made of quantities with a value for every picture, so that each can be had without one of them.
    """
    count = len(metrics.samples)
    if count < 2:
        return {}
    values = values_of(metrics.metrics)
    kept: dict[tuple[int, ...], dict[str, float]] = {}

    def scores_without(indices: Sequence[int]) -> dict[str, float]:
        chosen = tuple(indices)
        if chosen not in kept:
            scores = scores_from_values(values, plan.scoring, chosen)
            kept[chosen] = {name: score.value for name, score in scores.items() if score.value is not None}
        return kept[chosen]

    names = list(scores_without(range(count)))
    in_pairs = PAIRWISE & values.keys() & {term.metric for term in terms_of(plan.scoring).values()}
    if in_pairs and count < FEWEST_OF_PAIRS and plan.scoring.objective in names:
        names.remove(plan.scoring.objective)
    return {
        name: pseudo_values(lambda indices, name=name: scores_without(indices)[name], count)  # type: ignore[misc]
        for name in names
    }


def why_infeasible(metrics: Metrics) -> str:
    """Say which checks of the gate failed."""
    failed = [f"{name}: {check.reason}" for name, check in metrics.gate.checks.items() if check.passed is False]
    return "; ".join(failed)


def fields_that_differ(first: EvaluationPlan, second: EvaluationPlan) -> dict[str, tuple[object, object]]:
    """Return each field of two plans that is not equal, with both values; the scoring's by their dotted names."""
    found: dict[str, tuple[object, object]] = {}
    for name in type(first).model_fields:
        ours, theirs = getattr(first, name), getattr(second, name)
        if ours == theirs:
            continue
        if name != "scoring":
            found[name] = (ours, theirs)
            continue
        flat = [{"name": s.name, "objective": s.objective, **s.values} for s in (ours, theirs)]
        for key in sorted(flat[0].keys() | flat[1].keys()):
            if flat[0].get(key) != flat[1].get(key):
                found[f"scoring {key}"] = (flat[0].get(key), flat[1].get(key))
    return found


def differences_text(fields: Mapping[str, tuple[object, object]]) -> str:
    """Say which fields of two plans differ, with both values."""
    return ", ".join(f"{name} is {first!r} there and {second!r} here" for name, (first, second) in fields.items())


def _scored(checkpoints: Mapping[str, Metrics], objective: str) -> dict[str, tuple[float, tuple[str, ...]]]:
    """The objective of those that may win and have one, and what it was made without."""
    found = {}
    for name, metrics in checkpoints.items():
        score = metrics.scores.get(objective)
        if metrics.gate.feasible and score is not None and score.value is not None:
            found[name] = (score.value, score.left_out)
    return found


def _of_the_fullest(scored: Mapping[str, tuple[float, tuple[str, ...]]]) -> tuple[str, ...]:
    """What the scores with the fewest parts left out were made without; of equally full ones those that most have."""
    kinds = [left_out for _, left_out in scored.values()]
    return min(kinds, key=lambda left_out: (len(left_out), -kinds.count(left_out), left_out), default=())


def _unranked(sides: Mapping[str, Metrics], objective: str) -> dict[str, str]:
    scored = _scored(sides, objective)
    ranked = _of_the_fullest(scored)
    return {side: _made(objective, left_out, ranked) for side, (_, left_out) in scored.items() if left_out != ranked}


def _made(score: str, ours: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    """Say how a score's parts differ from another's."""
    without, besides = (", ".join(sorted(set(a) - set(b))) for a, b in ((ours, theirs), (theirs, ours)))
    return f"{score} was made " + " and ".join(
        [f"without {without}"] * bool(without) + [f"with {besides} besides"] * bool(besides)
    )


def _score_rows(
    sides: Mapping[str, Metrics], tables: Mapping[str, Mapping[str, Sequence[float]]], reference: str
) -> list[Row]:
    rows = []
    for name, score in sides[reference].scores.items():
        values = {side: tables[side].get(name) for side in sides}
        figures = {
            side: metrics.scores[name].value if name in metrics.scores else None for side, metrics in sides.items()
        }
        parts = {side: metrics.scores[name].left_out for side, metrics in sides.items() if name in metrics.scores}
        rows.append(_row(name, "score", score.direction, figures, values, reference, parts))
    return rows


def _metric_rows(sides: Mapping[str, Metrics], reference: str) -> list[Row]:
    rows = []
    for name, metric in sides[reference].metrics.items():
        found = {side: metrics.metrics.get(name) for side, metrics in sides.items()}
        figures = {side: other.value if other else None for side, other in found.items()}
        values = {
            side: _independent(name, other.per_image) if other and other.per_image else None
            for side, other in found.items()
        }
        rows.append(_row(name, "metric", metric.direction, figures, values, reference))
    return rows


def _independent(name: str, values: Sequence[float | None]) -> Sequence[float] | None:
    """One value per picture whose spread tells the mean's error; None where some picture has none.

    A picture's mean distance to all the others shares each pair with another picture: their plain spread is about half
    of what the mean over pairs has, so the jackknife's values stand in for them.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    if name not in PAIRWISE:
        return known
    if len(known) < FEWEST_OF_PAIRS:
        return None
    return pseudo_values(lambda indices: mean_over(known, indices, pairwise=True), len(known))


def _row(
    name: str,
    kind: Literal["metric", "score"],
    direction: Direction,
    figures: Mapping[str, float | None],
    values: Mapping[str, Sequence[float] | None],
    reference: str,
    left_out: Mapping[str, tuple[str, ...]] | None = None,
) -> Row:
    parts = left_out or {}
    differences = []
    for side in (side for side in figures if side != reference):
        lacks, reference_lacks = parts.get(side, ()), parts.get(reference, ())
        if lacks != reference_lacks and figures[side] is not None:
            reason = _made(name, lacks, reference_lacks)
            differences.append(Difference(side, figures[side], None, "not comparable", reason))
            continue
        ours, theirs = figures[side], figures[reference]
        interval = None
        mine, others = values[side], values[reference]
        if ours is not None and theirs is not None and mine and others and len(mine) == len(others) > 1:
            interval = difference(mine, others, ours - theirs)
        differences.append(Difference(side, ours, interval, _verdict(interval, direction)))
    return Row(name, kind, direction, figures[reference], tuple(differences))


def _verdict(interval: Interval | None, direction: Direction) -> Verdict:
    if interval is None or math.isinf(interval.high):
        return "no interval"
    if interval.low <= 0 <= interval.high:
        return "cannot be told"
    if direction == "target":
        return "differs"
    return "better" if (interval.high < 0) == (direction == "minimise") else "worse"

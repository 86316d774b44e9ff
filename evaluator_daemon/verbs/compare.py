"""`evaluator-daemon compare`: which of these is better, and can it be told?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from shared.verbs import Run

if TYPE_CHECKING:
    from evaluator_daemon.job import Job
    from evaluator_daemon.operands import Operand
    from shared.schemas import Metrics
    from shared.scores.comparing import Comparison, Row

FRESH_PICTURES = 16


_SMALL = 0.005  # below it four decimals say too little


def declare(parser: argparse.ArgumentParser) -> Run:
    """Add the flags of the verb to its parser and return what runs it."""
    from evaluator_daemon.settings import EvaluatorSettings
    from shared.settings import add_settings_flags

    parser.description = (
        "Compare checkpoints picture by picture on the study's grid: the difference of every metric and score with its "
        "95 % interval, and of three or more the set that cannot be told from the best. What is recorded is used; what "
        "is not is evaluated under evaluations/. With --fresh all are rendered anew on seeds the study never used."
    )
    parser.add_argument(
        "operands",
        nargs="+",
        metavar="A B",
        help="trial (5 or trial_0005: its final checkpoint), epoch (5@8), best epoch (5@best), label, base, or FILE",
    )
    parser.add_argument(
        "--fresh",
        nargs="?",
        type=int,
        const=FRESH_PICTURES,
        metavar="N",
        help=f"render N pictures of each on fresh seeds (default without a number: {FRESH_PICTURES})",
    )
    parser.add_argument("--label", metavar="NAME", help="with --fresh: folder below evaluations/ (default: finalists)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_settings_flags(parser, EvaluatorSettings)
    return _compare


def _compare(arguments: argparse.Namespace) -> int:
    from evaluator_daemon.operands import FINALISTS, fresh_plan, labels_of, require_label, require_one_plan, resolve
    from evaluator_daemon.verbs.evaluate import evaluate_label, job_outside
    from shared.errors import SettingsError
    from shared.layout import StudyLayout
    from shared.scores.comparing import compare

    if len(set(arguments.operands)) < max(2, len(arguments.operands)):
        raise SettingsError("A B", " ".join(arguments.operands), "name at least two, each once")
    if arguments.fresh is not None and arguments.fresh < 2:
        raise SettingsError("--fresh", arguments.fresh, "write a number of pictures from 2 up")
    if arguments.label is not None and arguments.fresh is None:
        raise SettingsError("--label", arguments.label, "only --fresh writes under a label of its own; add it")
    label = require_label(arguments.label or FINALISTS)
    job = job_outside(arguments, override_plan=False)
    study = StudyLayout(job.root)
    operands = [resolve(text, study, job.plan) for text in arguments.operands]
    if len({(operand.file, operand.checkpoint) for operand in operands}) < len(operands):
        raise SettingsError("A B", " ".join(arguments.operands), "two of them are the same checkpoint; name each once")
    if arguments.fresh is None:
        require_one_plan(operands)
        sides = {operand.name: operand.metrics or _evaluated(job, operand) for operand in operands}
        plan = next(operand.plan for operand in operands if operand.plan is not None)
    else:
        plan = fresh_plan(job.plan, arguments.fresh)
        found = evaluate_label(dataclasses.replace(job, plan=plan), label, dict(labels_of(operands)))
        metrics = {outcome.checkpoint: _require(outcome) for outcome in found}
        sides = {operand.name: metrics[operand.checkpoint] for operand in operands}
    comparison = compare(sides, plan)
    if arguments.json:
        print(json.dumps(_as_json(comparison), indent=2))
    else:
        _print(comparison)
    return 0


def _evaluated(job: Job, operand: Operand) -> Metrics:
    from evaluator_daemon.operands import BASE, label_of
    from evaluator_daemon.verbs.evaluate import evaluate_label

    label = BASE if operand.file is None else label_of(operand.file)
    return _require(evaluate_label(job, label, {operand.checkpoint: operand.file})[0])


def _require(outcome: Any) -> Metrics:
    from shared.errors import ContractError

    if outcome.metrics is None:
        raise ContractError(f"{outcome.checkpoint} cannot be compared: {outcome.status}: {outcome.reason}")
    metrics: Metrics = outcome.metrics
    return metrics


def _as_json(comparison: Comparison) -> dict[str, Any]:
    """JSON knows no infinity: an interval that says nothing is null."""
    document = dataclasses.asdict(dataclasses.replace(comparison, best=None))
    document["best"] = comparison.best.model_dump(mode="json") if comparison.best else None
    for row in document["rows"]:
        for difference in row["differences"]:
            interval = difference["interval"]
            if interval is not None and math.isinf(interval["high"]):
                difference["interval"] = None
    return document


def _print(comparison: Comparison) -> None:
    named = (" against " if len(comparison.sides) == 2 else ", ").join(comparison.sides)
    print(f"{named}: {comparison.pictures} pictures each on the same prompts and seeds")
    for kind in ("score", "metric"):
        print(f"\n{kind}s; differences from {comparison.reference} with their 95 % intervals")
        for row in (row for row in comparison.rows if row.kind == kind):
            _print_row(row, comparison.reference)
    print()
    for side in comparison.sides:
        reason = comparison.infeasible.get(side)
        print(f"gate of {side}: " + ("passed" if reason is None else f"failed: {reason}"))
    best = comparison.best
    if best is None:
        print("none of them passed the gate, so none is the best")
        return
    sure = "" if best.certainty is None else f", the true best with a chance of {best.certainty:.0%}"
    print(f"best {comparison.objective}: {best.checkpoint} ({best.score:.4f}{sure})")
    if len(best.tie_set) > 1:
        print(f"cannot be told apart: {', '.join(best.tie_set)}")
    elif len(comparison.sides) - len(comparison.infeasible) - len(comparison.unranked) > 1:
        print("no other can be the best")
    for side, reason in comparison.unranked.items():
        print(f"not ranked with it: {side}, whose {reason}")


def _print_row(row: Row, reference: str) -> None:
    arrow = {"minimise": "lower is better", "maximise": "higher is better", "target": "has a target"}[row.direction]
    print(f"  {row.name} ({arrow}): {reference} {_figure(row.reference_mean)}")
    for other in row.differences:
        shown = ""
        if other.interval is not None and not math.isinf(other.interval.high):
            low, high = other.interval.low, other.interval.high
            digits = ".4f" if max(abs(low), abs(high)) >= _SMALL else ".1e"
            shown = f"  difference {other.interval.mean:+{digits}} [{low:+{digits}}, {high:+{digits}}]"
        told = f"{other.side} {other.verdict}" if other.verdict in ("better", "worse") else other.verdict
        if other.reason:
            told += f": {other.side}'s {other.reason}"
        print(f"    {other.side} {_figure(other.mean)}{shown}  {told}")


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}" if abs(value) >= _SMALL else f"{value:.2e}"

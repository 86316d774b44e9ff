"""summary_statistics.json from the facts. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, median, pstdev

from optimizer_daemon.analysis.facts import BASE_MODEL, CheckpointFacts, StudyFacts
from optimizer_daemon.analysis.relations import Relation
from optimizer_daemon.optuna_adapter.importances import Importance
from shared.schemas.results import (
    BestAnywhere,
    CorrelationFigures,
    DifferenceFigures,
    EarlierCheckpoint,
    Failure,
    GoalFigures,
    ImportanceFigures,
    RateFigures,
    Spread,
    SummaryStatistics,
    TimeFigures,
    WinnerFigures,
)
from shared.scores.comparing import Comparison

WINNER = "winner"


def summary_statistics(
    facts: StudyFacts, importances: Mapping[str, Importance], relations: Sequence[Relation], problems: Sequence[str]
) -> SummaryStatistics:
    """Return the file.

    Args:
        problems: those of the facts, and what else could not be told.
    """
    won = [trial for trial in facts.ranking if trial.may_win]
    finals = [trial.final for trial in won if trial.final is not None]
    metrics = dict.fromkeys(name for final in finals for name in final.metrics.metrics)
    spreads = {name: _spread([final.mean(name) for final in finals]) for name in metrics}
    return SummaryStatistics(
        study_name=facts.name,
        updated=facts.made,
        objective=facts.objective,
        direction=facts.results.direction,
        trials=dict(Counter(trial.state.state for trial in facts.trials)),
        winner=_winner(facts),
        values=_spread([trial.value for trial in won]),
        metrics={name: spread for name, spread in spreads.items() if spread is not None},
        goals={name: _goals(checkpoint) for name, checkpoint in judged(facts).items()},
        against={name: differences(comparison) for name, comparison in facts.against.items()},
        rates={
            rate.name: RateFigures(
                count=rate.count, of=rate.of, share=rate.share, meaning=rate.meaning, before=rate.before,
                hoped=rate.hoped,
            )
            for rate in facts.rates
        },
        importances={
            name: ImportanceFigures(share=min(1.0, found.share), low=found.low, high=found.high)
            for name, found in importances.items()
        },
        correlations=tuple(
            CorrelationFigures(
                parameter=r.parameter, figure=r.figure, rho=r.rho, low=r.low, high=r.high, trials=r.trials
            )
            for r in relations
        ),
        overtaken=tuple(
            EarlierCheckpoint(
                trial=found.trial, checkpoint=found.better.name, file=relative(facts, found.better),
                epoch=found.better.epoch, score=_known(found.better.score), final_score=found.final.score,
                tie_set=found.tied,
            )
            for found in facts.overtaken
        ),
        best_checkpoint=_best_anywhere(facts),
        failures=tuple(
            Failure(trial=trial.number, reason=trial.state.reason or "unknown") for trial in facts.failures
        ),
        times=TimeFigures(
            first=facts.timings.first, last=facts.timings.last, training=facts.timings.training_s,
            evaluation=facts.timings.evaluation_s, median_trial=facts.timings.median_trial_s,
            median_evaluation=facts.timings.median_evaluation_s,
        ),
        problems=tuple(problems),
    )  # fmt: skip


def judged(facts: StudyFacts) -> dict[str, CheckpointFacts]:
    """Return those whose goals are shown: the winner's final checkpoint, the base model, the baselines."""
    final = facts.winner.final if facts.winner is not None else None
    return {
        **({WINNER: final} if final is not None else {}),
        **({BASE_MODEL: facts.base} if facts.base is not None else {}),
        **facts.baselines,
    }


def relative(facts: StudyFacts, checkpoint: CheckpointFacts) -> str | None:
    """Return a checkpoint's file relative to the study folder; None where it is gone."""
    return None if checkpoint.weights is None else checkpoint.weights.relative_to(facts.folder).as_posix()


def differences(comparison: Comparison) -> dict[str, DifferenceFigures]:
    """Return the winner, the first side, against the reference, in every score and metric."""
    found = {}
    for row in comparison.rows:
        (of_winner,) = row.differences
        interval = of_winner.interval
        finite = interval is not None and math.isfinite(interval.low) and math.isfinite(interval.high)
        found[row.name] = DifferenceFigures(
            winner=of_winner.mean,
            other=row.reference_mean,
            difference=None if interval is None else interval.mean,
            low=interval.low if interval is not None and finite else None,
            high=interval.high if interval is not None and finite else None,
            verdict=of_winner.verdict,
        )
    return found


def _winner(facts: StudyFacts) -> WinnerFigures | None:
    best, standing = facts.winner, facts.standing
    if best is None or standing is None or best.value is None:
        return None
    return WinnerFigures(
        trial=best.number,
        optuna_number=best.optuna_number,
        value=best.value,
        checkpoint=None if best.final is None else relative(facts, best.final),
        epoch=None if best.final is None else best.final.epoch,
        certainty=standing.certainty,
        tie_set=standing.tied,
        compared=standing.compared,
        pictures=standing.pictures,
        why_not=standing.why_not,
    )


def _best_anywhere(facts: StudyFacts) -> BestAnywhere | None:
    if facts.best_checkpoint is None:
        return None
    trial, checkpoint = facts.best_checkpoint
    return BestAnywhere(
        trial=trial.number, checkpoint=checkpoint.name, epoch=checkpoint.epoch, score=_known(checkpoint.score)
    )


def _goals(checkpoint: CheckpointFacts) -> dict[str, GoalFigures]:
    return {
        goal.figure: GoalFigures(low=goal.low, high=goal.high, value=goal.value, missed_by=goal.missed_by)
        for goal in checkpoint.goals
    }


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(
        count=len(known), mean=fmean(known), std=pstdev(known), minimum=min(known), median=median(known),
        maximum=max(known),
    )  # fmt: skip


def _known(score: float | None) -> float:
    assert score is not None, "only checkpoints with a score are compared"
    return score

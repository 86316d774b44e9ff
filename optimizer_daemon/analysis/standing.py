"""What only a comparison tells: how sure the winner is, which final is not its trial's best, the seed's rates. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optimizer_daemon.analysis.facts import CheckpointFacts, Overtaken, Rate, Standing, TrialFacts
from shared.schemas import EvaluationPlan
from shared.scores.comparing import Comparison, best_of, compare
from shared.scoring_presets import COMBINED_SCORE

MOST_COMPARED = 100
"""Trials compared with the winner: beyond them only those follow that are far behind, or no study could tell apart."""
FRONT = 10
"""Trials of which every checkpoint is compared with the final one."""


def standing(winner: TrialFacts, ranking: Sequence[TrialFacts], plan: EvaluationPlan | None) -> Standing:
    """Say which trials cannot be told from the winner, and how sure it is.

    Args:
        ranking: the complete trials that the winner is named from, best first.
        plan: the study's; without it nothing was rendered and nothing can be told.
    """
    if plan is None or winner.final is None:
        return Standing((winner.number,), None, 1, 0, "nothing was measured picture by picture")
    front = [trial for trial in ranking if trial.may_win and trial.final is not None][:MOST_COMPARED]
    if winner not in front:
        front.append(winner)
    measured = {str(trial.number): trial.final.metrics for trial in front if trial.final is not None}
    best = best_of(measured, plan)
    pictures = len(winner.final.metrics.samples)
    if best is None:
        return Standing((winner.number,), None, len(front), pictures, "no score of a picture is known")
    tied = tuple(int(number) for number in best.tie_set)
    if best.checkpoint != str(winner.number):
        why = f"by its final checkpoint alone trial {best.checkpoint} is the best"
        return Standing(tied if winner.number in tied else (winner.number, *tied), None, len(front), pictures, why)
    why = "" if best.certainty is not None else "too few pictures to tell"
    return Standing(tied, best.certainty, len(front), pictures, why)


def against(
    winner: TrialFacts | None, rivals: Mapping[str, CheckpointFacts], plan: EvaluationPlan | None
) -> dict[str, Comparison]:
    """Hold the winner's final checkpoint against each rival that was measured on as many pictures."""
    if winner is None or winner.final is None or plan is None:
        return {}
    ours = winner.final.metrics
    side = f"trial {winner.number}"
    return {
        name: compare({side: ours, name: rival.metrics}, plan)
        for name, rival in rivals.items()
        if len(rival.metrics.samples) == len(ours.samples)
    }


def overtaken(ranking: Sequence[TrialFacts], plan: EvaluationPlan | None) -> tuple[Overtaken, ...]:
    """Find, among the first trials, those whose earlier checkpoint beats the final one by more than chance explains."""
    found = []
    for trial in ranking[:FRONT] if plan is not None else ():
        checkpoints = {checkpoint.name: checkpoint for checkpoint in trial.checkpoints}
        if trial.final is None or trial.final.name not in checkpoints or len(checkpoints) < 2:
            continue
        assert plan is not None
        best = best_of({name: checkpoint.metrics for name, checkpoint in checkpoints.items()}, plan)
        if best is not None and trial.final.name not in best.tie_set:
            found.append(Overtaken(trial.number, checkpoints[best.checkpoint], trial.final, best.tie_set))
    return tuple(found)


def best_checkpoint(trials: Sequence[TrialFacts]) -> tuple[TrialFacts, CheckpointFacts] | None:
    """Return the checkpoint with the best score of all that passed their gate, with its trial."""
    scored = [
        (checkpoint.score, trial.number, index, trial, checkpoint)
        for trial in trials
        for index, checkpoint in enumerate(trial.checkpoints)
        if checkpoint.feasible and checkpoint.score is not None
    ]
    if not scored:
        return None
    *_, trial, checkpoint = min(scored, key=lambda found: found[:3])
    return trial, checkpoint


def rates(trials: Sequence[TrialFacts], base: CheckpointFacts | None, refused: int) -> tuple[Rate, ...]:
    """Return the seed's four rates; pruned trials, stopped by choice, are no trials in them.

    Args:
        refused: configurations that a rule of the search space refused; the sampler itself draws none.
    """
    ended = [trial for trial in trials if trial.state.state in ("complete", "failed")]
    finished = [trial for trial in ended if trial.state.state == "complete"]
    finals = [trial.final for trial in finished if trial.final is not None]
    stable = sum(final.sentinels_passed for final in finals) + len(finished) - len(finals)
    bad = sum(not final.sentinels_passed or _worse(final, base) for final in finals)
    optimal = sum(final.feasible and bool(final.goals) and final.in_goal_bands for final in finals)
    drawn = len(trials) + refused
    return (
        Rate("rejected", refused, drawn, "configurations that broke a rule of the space", "30-40 %", "< 10 %"),
        Rate("stable", stable, len(ended), "trained to the end, no picture black or flat", "40-50 %", "80-90 %"),
        Rate(
            "quality failure", bad, len(ended), "finished, but black or flat, or worse than the base model",
            "30-40 %", "< 10 %",
        ),
        Rate("optimal", optimal, len(ended), "every goal reached and the gate passed", "10-15 %", "30-40 %"),
    )  # fmt: skip


def _worse(final: CheckpointFacts, base: CheckpointFacts | None) -> bool:
    """Whether a checkpoint scores worse than the base model, by a score that both have made of the same parts."""
    if base is None:
        return False
    for name in (final.objective, COMBINED_SCORE):
        ours, theirs = final.metrics.scores.get(name), base.metrics.scores.get(name)
        if ours is None or theirs is None or ours.value is None or theirs.value is None:
            continue
        if ours.left_out == theirs.left_out:
            return ours.value > theirs.value
    return False

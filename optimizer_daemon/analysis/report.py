"""OPTIMIZATION_REPORT.md: what the study found, in words and tables. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from optimizer_daemon.analysis.best_config import BestConfig
from optimizer_daemon.analysis.facts import PIXELS, CheckpointFacts, StudyFacts, TrialFacts
from optimizer_daemon.analysis.headline import headline
from optimizer_daemon.analysis.relations import FEWEST, Relation, by_parameter
from optimizer_daemon.analysis.summary import differences, judged
from optimizer_daemon.optuna_adapter.importances import Importance
from shared.durations import duration
from shared.schemas import Scalar

MOST_FAILURES = 50
"""Failures listed one by one; summary_statistics.json has them all."""


def report_text(
    facts: StudyFacts,
    importances: Mapping[str, Importance],
    relations: Sequence[Relation],
    config: BestConfig,
    top_n: int,
    problems: Sequence[str],
) -> str:
    """Return the report.

    Args:
        top_n: rows of the table of the best trials.
        problems: files that were missing or damaged, and what could not be told.
    """
    parts = (
        _opening(facts),
        _goals(facts),
        _differences(facts),
        _best_trials(facts, top_n),
        _parameters(facts, config),
        _influence(facts, importances, relations),
        _epochs(facts),
        _rates(facts),
        _times(facts),
        _failures(facts),
        _problems(problems),
        _files(facts, config, top_n),
    )
    return "\n".join(line for part in parts for line in part)


def _opening(facts: StudyFacts) -> Iterator[str]:
    yield f"# {facts.name}"
    yield ""
    states = ", ".join(f"{count} {state}" for state, count in _states(facts))
    yield f"Written {facts.made.isoformat(timespec='seconds')}: {len(facts.trials)} trials ({states or 'none yet'})."
    yield ""
    yield from (f"- {line}" for line in headline(facts))
    yield ""


def _states(facts: StudyFacts) -> list[tuple[str, int]]:
    names = ("complete", "pruned", "failed", "training", "trained", "interrupted", "drawn")
    return [(name, facts.count(name)) for name in names if facts.count(name)]


def _goals(facts: StudyFacts) -> Iterator[str]:
    shown = judged(facts)
    if not any(checkpoint.goals for checkpoint in shown.values()):
        return
    yield "## Goals"
    yield ""
    figures = list(dict.fromkeys(goal.figure for checkpoint in shown.values() for goal in checkpoint.goals))
    yield from _head("goal", "band", *shown)
    for figure in figures:
        cells, band = [], ""
        for checkpoint in shown.values():
            goal = next((goal for goal in checkpoint.goals if goal.figure == figure), None)
            if goal is None:
                cells.append("")
                continue
            band = f"{goal.low:.2f}-{goal.high:.2f}"
            cells.append(goal.verdict if goal.value is None else f"{goal.value:.4f}, {goal.verdict}")
        yield _cells(figure, band, *cells)
    yield ""


def _differences(facts: StudyFacts) -> Iterator[str]:
    if not facts.against:
        return
    yield "## The winner against others"
    yield ""
    yield "Paired over the same prompts and seeds; the interval holds the true difference with 95 %."
    for name, comparison in facts.against.items():
        yield ""
        yield from _head("", "winner", name, "difference", "95 % interval", "verdict")
        for row, found in differences(comparison).items():
            interval = "" if found.low is None or found.high is None else f"{found.low:+.4f} to {found.high:+.4f}"
            gap = "" if found.difference is None else f"{found.difference:+.4f}"
            yield _cells(row, _figure(found.winner), _figure(found.other), gap, interval, found.verdict)
    yield ""


def _best_trials(facts: StudyFacts, top_n: int) -> Iterator[str]:
    trials = facts.ranking[:top_n]
    if not trials:
        return
    yield f"## The best {len(trials)} of {len(facts.ranking)} complete trials"
    yield ""
    names = _that_differ(facts.ranking)
    yield from _head("trial", facts.objective, "tied", *PIXELS, *names)
    for trial in trials:
        tied = facts.standing is not None and trial.number in facts.standing.tied
        mark = "yes" if tied else "" if trial.may_win else "failed its gate"
        pixels = [_with_std(trial.final, name) for name in PIXELS]
        yield _cells(
            str(trial.number), _figure(trial.value), mark, *pixels, *(_short(trial.parameters.get(n)) for n in names)
        )
    yield ""


def _that_differ(trials: Sequence[TrialFacts]) -> list[str]:
    """The parameters that are not the same in all trials; all of them where there is one trial."""
    names = dict.fromkeys(name for trial in trials for name in trial.parameters)
    if len(trials) == 1:
        return list(names)
    return [name for name in names if len({trial.parameters.get(name) for trial in trials}) > 1]


def _parameters(facts: StudyFacts, config: BestConfig) -> Iterator[str]:
    if facts.winner is None:
        return
    yield "## Train the winner again"
    yield ""
    yield f"Trial {facts.winner.number} used:"
    yield ""
    yield from _head("parameter", "value")
    for name, value in facts.winner.parameters.items():
        yield _cells(name, f"{value}{' (computed)' if name in facts.winner.params.derived else ''}")
    yield _cells("seed", str(facts.winner.params.training_seed))
    yield ""
    if config.command is not None:
        yield "`best_training_config.toml` holds them for the trainer:"
        yield from ("", "```bash", config.command, "```")
    else:
        yield "`best_training_config.txt` says why there is no configuration file for a trainer."
    yield ""


def _influence(
    facts: StudyFacts, importances: Mapping[str, Importance], relations: Sequence[Relation]
) -> Iterator[str]:
    yield "## What the parameters do"
    yield ""
    related = by_parameter(relations, facts.objective)
    if not importances and not related:
        yield (
            f"Nothing can be said yet: it takes {FEWEST} complete trials that passed their gate, with parameters "
            f"that differ."
        )
        yield ""
        return
    yield (
        "Importance is the share of the influence on what sets the best tenth of the trials apart (PED-ANOVA, with its "
        "80 % bootstrap interval). Correlation is Spearman's, with its 95 % interval; negative means that more is "
        "better. An interval that holds 0 may be chance."
    )
    yield ""
    yield from _head("parameter", "importance", "correlation", "")
    for name in dict.fromkeys((*importances, *related)):
        importance, relation = importances.get(name), related.get(name)
        share = "" if importance is None else f"{importance.share:.2f}"
        if importance is not None and importance.low is not None and importance.high is not None:
            share += f" ({importance.low:.2f} to {importance.high:.2f})"
        rho = "" if relation is None else f"{relation.rho:+.2f} ({relation.low:+.2f} to {relation.high:+.2f})"
        sure = "" if relation is None else "sure" if relation.is_sure else "may be chance"
        yield _cells(name, share, rho, sure)
    yield ""


def _epochs(facts: StudyFacts) -> Iterator[str]:
    if facts.best_checkpoint is None:
        return
    yield "## Which epoch"
    yield ""
    trial, checkpoint = facts.best_checkpoint
    epoch = "unknown" if checkpoint.epoch is None else checkpoint.epoch
    yield (
        f"The best score of all epochs of all trials is {_figure(checkpoint.score)}: {checkpoint.name} of trial "
        f"{trial.number}, epoch {epoch}. With many checkpoints the best one is partly luck."
    )
    if not facts.overtaken and facts.ranking:
        yield ""
        yield "In none of the best trials does an earlier checkpoint beat the final one by more than chance explains."
    yield ""


def _rates(facts: StudyFacts) -> Iterator[str]:
    yield "## The four rates"
    yield ""
    yield from _head("rate", "here", "first search space", "hoped of V2.1", "counted")
    for rate in facts.rates:
        here = "nothing to count" if rate.share is None else f"{rate.share:.0%} ({rate.count} of {rate.of})"
        yield _cells(rate.name, here, rate.before, rate.hoped, rate.meaning)
    yield ""


def _times(facts: StudyFacts) -> Iterator[str]:
    times = facts.timings
    if times.first is None:
        return
    yield "## Time"
    yield ""
    lines = {
        "from the first training": times.first.isoformat(timespec="seconds"),
        "to the last end": None if times.last is None else times.last.isoformat(timespec="seconds"),
        "training": duration(times.training_s),
        "evaluation": duration(times.evaluation_s),
        "a finished trial (median)": None if times.median_trial_s is None else duration(times.median_trial_s),
        "a checkpoint's evaluation (median)": _seconds(times.median_evaluation_s),
    }
    yield from _head("", "")
    yield from (_cells(name, value) for name, value in lines.items() if value is not None)
    yield ""


def _failures(facts: StudyFacts) -> Iterator[str]:
    quarantined = [found for trial in facts.trials for found in trial.quarantined]
    gated = [trial for trial in facts.ranking if not trial.may_win]
    if not facts.failures and not quarantined and not gated:
        return
    yield "## What went wrong"
    yield ""
    lines = [f"- trial {trial.number} failed: {trial.state.reason}" for trial in facts.failures]
    lines += [f"- trial {trial.number} cannot win: {trial.state.reason or 'it failed its gate'}" for trial in gated]
    lines += [f"- trial {q.trial}: {q.checkpoint} was not evaluated: {q.code}: {q.reason}" for q in quarantined]
    yield from lines[:MOST_FAILURES]
    if len(lines) > MOST_FAILURES:
        yield f"- and {len(lines) - MOST_FAILURES} more"
    yield ""


def _problems(problems: Sequence[str]) -> Iterator[str]:
    if not problems:
        return
    yield "## Missing and damaged files"
    yield ""
    yield "What only these could tell is left out above."
    yield ""
    yield from (f"- {problem}" for problem in problems[:MOST_FAILURES])
    if len(problems) > MOST_FAILURES:
        yield f"- and {len(problems) - MOST_FAILURES} more"
    yield ""


def _files(facts: StudyFacts, config: BestConfig, top_n: int) -> Iterator[str]:
    yield "## The other files"
    yield ""
    tables = f"- `top_{top_n}_trials.csv`, `summary_statistics.json`: the figures of this report"
    yield tables
    yield "- `score_evolution.png`, `epoch_vs_quality.png`, `epoch_vs_quality_by_trial.png`, `metrics_comparison.png`,"
    yield "  `parameter_correlation.png`, `../optimization_history.png`, `../param_importances.png`"
    if facts.results.objectives:
        yield "- `pareto_front.json`, `pareto_front.png`: the trade-offs"
    yield "- `best_training_config.txt`" + (", `best_training_config.toml`" if config.toml is not None else "")
    if facts.winner is not None:
        yield f"- pictures of the winner: `../../trial_{facts.winner.number:04d}/evaluation/`"
    yield ""


def _head(*names: str) -> Iterator[str]:
    yield _cells(*names)
    yield "|" + "---|" * len(names)


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _with_std(checkpoint: CheckpointFacts | None, metric: str) -> str:
    if checkpoint is None or (value := checkpoint.mean(metric)) is None:
        return ""
    std = checkpoint.std(metric)
    return f"{value:.3f}" if std is None else f"{value:.3f} ± {std:.3f}"


def _short(value: Scalar | None) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f} s"

"""Writes every file of results/: python -m optimizer_daemon.analysis.analyze --output-dir DIR [--top-n 10].

The daemon runs this beside itself after each trial, and the verb `analyze` runs it where no daemon lives. Each file
replaces the earlier one all at once; one that there is nothing for any more is removed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from matplotlib.figure import Figure

from optimizer_daemon.analysis.best_config import BestConfig, best_config
from optimizer_daemon.analysis.comparison_plots import metrics_comparison_figure, parameter_correlation_figure
from optimizer_daemon.analysis.evolution_plots import (
    epoch_vs_quality_figure,
    score_evolution_figure,
    trial_curves_figure,
)
from optimizer_daemon.analysis.facts import StudyFacts
from optimizer_daemon.analysis.gather import gather
from optimizer_daemon.analysis.pareto import pareto_figure, pareto_front
from optimizer_daemon.analysis.plots import history_figure, importances_figure
from optimizer_daemon.analysis.relations import Relation, relations
from optimizer_daemon.analysis.report import report_text
from optimizer_daemon.analysis.style import png
from optimizer_daemon.analysis.summary import summary_statistics
from optimizer_daemon.analysis.tables import top_trials_csv
from optimizer_daemon.database import Database
from optimizer_daemon.optuna_adapter.importances import Importance, importances
from shared.commands import run_command
from shared.errors import DiskError, LabError
from shared.files import write_bytes, write_model, write_text
from shared.layout import StudyLayout

TOP_N = 10
_IMPORTANCES = "importances"


@dataclass(frozen=True)
class Analysis:
    """What all files of one writing are made of.

    Args:
        importances: empty where there is too little to tell, or the database cannot be read.
        problems: files that were missing or damaged, and what could not be told.
    """

    facts: StudyFacts
    importances: Mapping[str, Importance]
    relations: Sequence[Relation]
    config: BestConfig
    problems: Sequence[str]


def analyze(study: StudyLayout, *top_n: int) -> StudyFacts:
    """Write the statistics, tables, pictures, report and configuration of what the study has found so far.

    Args:
        top_n: trials in further tables of the best; tables that are there are renewed in any case.
    Returns:
        What was found.
    Raises:
        UserError: there is no study in the folder.
        DiskError: a file cannot be written.
    """
    analysis = analysis_of(study)
    write_documents(study, analysis, *top_n)
    for path, draw in pictures(study, analysis).items():
        write_bytes(path, png(draw()))
    return analysis.facts


def analysis_of(study: StudyLayout) -> Analysis:
    """Read the study and work out what the files say; nothing is written.

    Raises:
        UserError: there is no study in the folder.
    """
    facts = gather(study, datetime.now().astimezone())
    shares, problems = _importances(facts)
    return Analysis(facts, shares, relations(facts), best_config(facts), [*facts.problems, *problems])


def write_documents(study: StudyLayout, analysis: Analysis, *top_n: int) -> None:
    """Write everything but the pictures; see `analyze`."""
    results, facts, config = study.results, analysis.facts, analysis.config
    try:
        results.analysis.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(results.analysis, error) from error
    statistics = summary_statistics(facts, analysis.importances, analysis.relations, analysis.problems)
    write_model(results.summary_statistics, statistics)
    for count in {TOP_N, *top_n, *results.list_top_trials()}:
        write_text(results.top_trials(count), top_trials_csv(facts, count))
    _write_or_remove(results.best_training_config, config.toml)
    for other in ("kohya", "native"):
        _write_or_remove(results.training_config_for(other), config.others.get(other))
    write_text(results.best_training_config_text, config.text)
    if facts.results.objectives:
        write_model(results.pareto_front, pareto_front(study, facts.results))
    rows = max((TOP_N, *top_n))
    text = report_text(facts, analysis.importances, analysis.relations, config, rows, analysis.problems)
    write_text(results.optimization_report, text)


def pictures(study: StudyLayout, analysis: Analysis) -> dict[Path, Callable[[], Figure]]:
    """Return what draws each picture."""
    results, facts = study.results, analysis.facts
    why_not = next((problem for problem in analysis.problems if problem.startswith(_IMPORTANCES)), "")
    front = pareto_front(study, facts.results) if facts.results.objectives else None
    return {
        **({results.pareto_front_picture: lambda: pareto_figure(facts.results, front)} if front is not None else {}),
        results.param_importances: lambda: importances_figure(facts.results, analysis.importances, why_not),
        results.score_evolution: lambda: score_evolution_figure(facts),
        results.epoch_vs_quality: lambda: epoch_vs_quality_figure(facts),
        results.trial_curves: lambda: trial_curves_figure(facts),
        results.metrics_comparison: lambda: metrics_comparison_figure(facts),
        results.parameter_correlation: lambda: parameter_correlation_figure(facts, analysis.relations),
        results.optimization_history: lambda: history_figure(facts.results),  # last: whoever finds it finds the rest
    }


def main(arguments: Sequence[str]) -> int:
    """Write the files of one study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="study folder")
    parser.add_argument("--top-n", type=int, action="append", metavar="N", help="trials in a table of the best")
    options = parser.parse_args(arguments)
    analyze(StudyLayout(options.output_dir), *(options.top_n or []))
    return 0


def _importances(facts: StudyFacts) -> tuple[dict[str, Importance], list[str]]:
    """Return the importances, and why there are none where the database cannot tell."""
    if facts.run is None:
        return {}, [f"{_IMPORTANCES}: run.json, which names the database, cannot be read"]
    try:
        return importances(facts.run.study_name, Database.of(facts.run, StudyLayout(facts.folder)).readable_url), []
    except LabError as error:
        return {}, [f"{_IMPORTANCES}: {error}"]


def _write_or_remove(path: Path, text: str | None) -> None:
    if text is not None:
        write_text(path, text)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(path, error) from error


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

"""Whether table, statistics, report and best_parameters.json of a study say what its database says."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter

import optuna

from shared.files import read_model
from shared.layout import StudyLayout
from shared.schemas import AllTrials, BestParameters, Run, SummaryStatistics

_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


def rows(study: StudyLayout, count: int = 10) -> list[dict[str, str]]:
    """The table of the best trials."""
    return list(csv.DictReader(io.StringIO(study.results.top_trials(count).read_text())))


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the report, without its head."""
    section = text.partition(f"## {heading}")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def require_agreement(study: StudyLayout) -> None:
    """Compare every figure that the database has with what the files say, of a study that has ended and has a winner.

    Raises:
        AssertionError: one differs.
    """
    run = read_model(study.run, Run)
    stored = optuna.load_study(study_name=run.study_name, storage=f"sqlite:///{study.database}").get_trials()
    known = {trial.number + 1: trial for trial in stored}
    complete = {number: trial for number, trial in known.items() if trial.state.name == "COMPLETE"}
    able = {n: t.value for n, t in complete.items() if all(value <= 0 for value in t.constraints.values())}
    best = min(able, key=lambda number: (able[number], number))

    statistics = read_model(study.results.summary_statistics, SummaryStatistics)
    states = Counter(_STATES[trial.state.name] for trial in known.values() if trial.state.name in _STATES)
    assert {name: count for name, count in statistics.trials.items() if name in _STATES.values()} == states
    winner = statistics.winner
    assert winner is not None and statistics.values is not None
    assert (winner.trial, winner.optuna_number, winner.value) == (best, best - 1, able[best])
    assert (statistics.values.count, statistics.values.minimum) == (len(able), able[best])
    assert statistics.values.maximum == max(able.values())

    found = rows(study)
    ranking = sorted(able, key=lambda number: (able[number], number))
    ranking += sorted(complete.keys() - able, key=lambda number: (complete[number].value, number))
    assert [int(row["trial"]) for row in found] == ranking[:10]
    for row in found:
        trial = complete[int(row["trial"])]
        assert (int(row["optuna_number"]), float(row["value"])) == (trial.number, trial.value)
        assert (row["feasible"] == "True") == (int(row["trial"]) in able)
        assert {name: row[name] for name in trial.params} == {name: str(v) for name, v in trial.params.items()}

    text = study.results.optimization_report.read_text()
    assert f"Trial {best} is the best of {len(able)} complete trials" in text
    assert f"{statistics.objective} {able[best]:.4f} (lower is better)" in text
    shown = {int(cells[0]): cells[1] for cells in table(text, "The best")}
    assert shown == {number: f"{complete[number].value:.4f}" for number in ranking[: len(shown)]}
    parameters = {cells[0]: cells[1] for cells in table(text, "Train the winner again")}
    assert {name: parameters[name] for name in complete[best].params} == {
        name: str(value) for name, value in complete[best].params.items()
    }
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1, "a table is not square"

    parameters_file = read_model(study.results.best_parameters, BestParameters)
    assert (parameters_file.trial, parameters_file.value) == (best, able[best])
    listed = {trial.trial: trial.value for trial in read_model(study.results.all_trials, AllTrials).trials}
    assert {number: listed[number] for number in complete} == {n: trial.value for n, trial in complete.items()}

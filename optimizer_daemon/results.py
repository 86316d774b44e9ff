"""What a study found: results/ and each trial's evaluation/, rebuilt from the trials' own files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Final

from optimizer_daemon.goals import goals_against
from optimizer_daemon.scores import FinalScore, parts_lacking
from optimizer_daemon.trade_offs import front, knee
from optimizer_daemon.trial_table import TrialTable
from shared.errors import DiskError, UnreadableFileError
from shared.files import read_model, write_bytes, write_model, write_text
from shared.finalists import Contender, contending
from shared.layout import StudyLayout, TrialLayout
from shared.schemas import (
    AllTrials,
    BestParameters,
    Metrics,
    Objective,
    ScoringPreset,
    TrialResult,
)

DIRECTION: Final = "minimise"


def goal_lines(metrics: Metrics, scoring: ScoringPreset) -> list[str]:
    """Return one line for each goal of the study's scoring: reached, or missed by how much."""
    return [goal.line for goal in goals_against(metrics, scoring)]


def publish_final(
    trial: TrialLayout, final: FinalScore, scoring: ScoringPreset, rivals: Mapping[str, Metrics] = MappingProxyType({})
) -> None:
    """Copy the deciding evaluation to the trial's evaluation/ and say in words what it means.

    Args:
        rivals: what it is held against, by name.
    """
    target = trial.final_evaluation
    _make(target.folder)
    for sample in final.metrics.samples:
        write_bytes(target.folder / Path(sample.file).name, (final.render.folder / Path(sample.file).name).read_bytes())
    if final.render.grid.exists():
        write_bytes(target.grid, final.render.grid.read_bytes())
    write_text(target.text_summary, summary_text(final.metrics, scoring, rivals))
    # Last: whoever finds it finds the rest too.
    write_bytes(target.metrics, final.render.metrics.read_bytes())


def rewrite_summaries(study: StudyLayout, scoring: ScoringPreset, rivals: Mapping[str, Metrics]) -> None:
    """Write every trial's EVALUATION_SUMMARY.txt again, after something to hold it against has its score."""
    for trial in study.list_trials():
        if (metrics := _decided_by(trial)) is not None:
            write_text(trial.final_evaluation.text_summary, summary_text(metrics, scoring, rivals))


def summary_text(metrics: Metrics, scoring: ScoringPreset, rivals: Mapping[str, Metrics] = MappingProxyType({})) -> str:
    """Return EVALUATION_SUMMARY.txt: scores, differences to what it is held against, goals, gate, prompts."""
    epoch = "unknown" if metrics.epoch is None else metrics.epoch
    lines = [f"{metrics.trial_name}  {metrics.checkpoint}  epoch {epoch}", f"evaluated {metrics.evaluation_time}", ""]
    lines += ["Scores"]
    for name, score in sorted(metrics.scores.items()):
        better = "lower" if score.direction == "minimise" else "higher"
        value = "not computed" if score.value is None else f"{score.value:.4f}"
        lacking = f"; without {', '.join(score.left_out)}" if score.left_out else ""
        lines.append(f"  {name:20} {value}  ({better} is better{lacking})")
    for rival, theirs in rivals.items():
        lines += ["", f"Against {rival}", *(f"  {line}" for line in _differences(metrics, theirs))]
    lines += ["", "Goals", *(f"  {line}" for line in goal_lines(metrics, scoring))]
    lines += ["", f"Gate: {'passed' if metrics.gate.feasible else 'FAILED, this checkpoint cannot win'}"]
    for name, check in sorted(metrics.gate.checks.items()):
        verdict = {True: "passed", False: "failed", None: "not checked"}[check.passed]
        lines.append(f"  {name:20} {verdict}{f': {check.reason}' if check.reason else ''}")
    lines += ["", "Pictures"]
    lines += [f"  {sample.file}  seed {sample.seed}  {sample.prompt}" for sample in metrics.samples]
    return "\n".join(lines) + "\n"


def _differences(ours: Metrics, theirs: Metrics) -> Iterator[str]:
    for name, score in sorted(ours.scores.items()):
        other = theirs.scores.get(name)
        if other is None or score.value is None or other.value is None:
            yield f"{name:20} not to be told"
        elif parts_lacking(score) != parts_lacking(other):
            yield f"{name:20} {score.value:.4f} against {other.value:.4f}, made of different parts"
        else:
            difference = round(score.value - other.value, 4)  # as it is shown
            better = (difference < 0) == (score.direction == "minimise")
            verdict = f"{'better' if better else 'worse'} by {abs(difference):.4f}" if difference else "the same"
            yield f"{name:20} {score.value:.4f} against {other.value:.4f}, {verdict}"


def all_trials(
    table: TrialTable, study_name: str, objective: str, now: datetime, objectives: Sequence[Objective] = ()
) -> AllTrials:
    """Collect every trial from its own files; one whose files are not there yet, or damaged, is left out."""
    return AllTrials(
        study_name=study_name,
        updated=now,
        objective=objective,
        direction=DIRECTION,
        objectives=tuple(objectives),
        trials=tuple(row.result for row in table.refresh()),
    )


def ranked(trials: AllTrials) -> list[TrialResult]:
    """Return the complete trials, the best first; those that failed their gate come last and never win.

    Where there are several objectives their front comes first.
    """
    complete = [trial for trial in trials.trials if trial.state == "complete" and trial.value is not None]
    members = front(trials) if trials.objectives else []
    on_front = {trial.trial for trial in members}
    others = (trial for trial in complete if trial.trial not in on_front)
    return [*members, *sorted(others, key=lambda trial: (trial.feasible is False, trial.value, trial.trial))]


def contenders(trials: Iterable[TrialResult]) -> tuple[TrialResult, ...]:
    """Return the trials that the winner is named from: the finalists, where they have scores."""
    known = tuple(trials)
    numbers = contending(
        Contender(trial.trial, trial.origin, trial.state == "complete" and trial.feasible is not False, trial.stage)
        for trial in known
    )
    return tuple(trial for trial in known if trial.trial in numbers)


def winner(trials: AllTrials) -> TrialResult | None:
    """Return the best trial that passed its gate; the best of the finalists where they have scores.

    Where there are several objectives it is the knee of the front.
    """
    if trials.objectives:
        return knee(front(trials), trials)
    last = trials.model_copy(update={"trials": contenders(trials.trials)})
    best = next(iter(ranked(last)), None)
    return best if best is not None and best.feasible is not False else None


def first_value(trials: AllTrials, finalist: TrialResult) -> float | None:
    """Return the score of the trial that a finalist repeats."""
    return next((trial.value for trial in trials.trials if trial.trial == finalist.finalist_of), None)


def results_are_of(study: StudyLayout, trials: AllTrials) -> bool:
    """Tell whether results/ already says what these trials say."""
    try:
        known = read_model(study.results.all_trials, AllTrials)
    except (FileNotFoundError, UnreadableFileError):
        return False
    return (known.trials, known.baselines) == (trials.trials, trials.baselines)


def write_results(study: StudyLayout, trials: AllTrials, table: TrialTable | None = None) -> None:
    """Write all_trials.json and, once there is a winner, best_parameters.json.

    Args:
        table: where the trials come from, if it is kept: then only what has changed is written out again.
    """
    _make(study.results.folder)
    if table is None:
        write_model(study.results.all_trials, trials)
    else:
        head = trials.model_copy(update={"trials": ()})
        write_model(study.results.all_trials, head, elements={"trials": table.text_of(trials.trials)})
    best = winner(trials)
    if best is not None and best.value is not None:
        trial = study.trial(best.trial)
        decided_by = _decided_by(trial)
        write_model(
            study.results.best_parameters,
            BestParameters(
                study_name=trials.study_name,
                updated=trials.updated,
                trial=best.trial,
                optuna_number=best.optuna_number,
                chosen_as="knee" if trials.objectives else "best",
                objective=trials.objective,
                direction=trials.direction,
                value=best.value,
                values=best.values,
                checkpoint=trial.final_checkpoint.relative_to(study.root).as_posix(),
                checkpoint_sha256=None if decided_by is None else decided_by.checkpoint_sha256,
                finalist_of=best.finalist_of,
                first_value=first_value(trials, best),
                epoch=None if decided_by is None else decided_by.epoch,
                parameters=best.parameters,
                derived=best.derived,
            ),
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DiskError(folder, error) from error


def _decided_by(trial: TrialLayout) -> Metrics | None:
    try:
        return read_model(trial.final_evaluation.metrics, Metrics)
    except (FileNotFoundError, UnreadableFileError):
        return None

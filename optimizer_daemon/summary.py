"""What the daemon says: how far it is, and when it ends the winner, or what was saved."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from optimizer_daemon.baselines import baseline_lines
from optimizer_daemon.results import first_value, ranked, winner
from optimizer_daemon.runner import LiveTrial
from optimizer_daemon.search.space import format_parameters
from optimizer_daemon.trade_offs import front, meaning, shown_values
from shared.durations import duration
from shared.layout import StudyLayout
from shared.schemas import AllTrials, TrialResult


def ended_text(study: StudyLayout, trials: AllTrials, how_far: Sequence[str]) -> str:
    """Return the last words of a run that was not stopped; `how_far` says how many trials are finished."""
    lines = [*how_far]
    best = winner(trials)
    if best is None:
        measured = len(ranked(trials))
        lines.append(f"No winner yet: {measured} trials have a score, and none of them passed its gate.")
        return "\n".join([*lines, *baseline_lines(trials.baselines, trials.objective, None)])
    trial = study.trial(best.trial)
    if trials.objectives:
        lines += ["", *front_lines(study, trials), "", f"Knee: trial {best.trial}, {shown_values(best.values)}"]
    else:
        lines += ["", f"Winner: trial {best.trial}, {trials.objective} {best.value:.4f} (lower is better)"]
        if best.finalist_of is not None:
            lines.append(finalist_line(trials, best))
    lines += baseline_lines(trials.baselines, trials.objective, best.value, knee=bool(trials.objectives))
    lines += format_parameters(best.parameters)
    lines += [
        "",
        f"weights   {trial.final_checkpoint}",
        f"pictures  {trial.final_evaluation.folder}",
        f"results   {study.results.folder}",
    ]
    return "\n".join(lines)


def finalist_line(trials: AllTrials, finalist: TrialResult) -> str:
    """Say what a winning finalist repeats."""
    first = first_value(trials, finalist)
    score = "" if first is None else f", which had {first:.4f}"
    return f"a finalist: the configuration of trial {finalist.finalist_of}{score}, trained again with a fresh seed"


def front_lines(study: StudyLayout, trials: AllTrials) -> list[str]:
    """Return the front as a table: a line for each trial that no other one beats in every objective."""
    names = [objective.name for objective in trials.objectives]
    lines = [f"Front, {len(members := front(trials))} trials ({'; '.join(map(meaning, trials.objectives))})"]
    lines.append(f"{'trial':>5}  {'  '.join(f'{name:>14}' for name in names)}  weights")
    for trial in members:
        values = "  ".join(f"{trial.values[name]:>14.4f}" for name in names)
        lines.append(f"{trial.trial:>5}  {values}  {study.trial(trial.trial).final_checkpoint}")
    return lines


def stopped_text(live: Sequence[LiveTrial], finished: int, target: int) -> str:
    """Return the last words of a run that was stopped: what was saved, and how to go on."""
    lines = [f"Stopped. {finished} of {target} trials are finished and saved."]
    for trial in live:
        match trial.state.state:
            case "interrupted" if states := trial.layout.list_training_states():
                lines.append(f"Trial {trial.number} goes on from its training state in {states[-1]}.")
            case "interrupted":
                lines.append(f"Trial {trial.number} had saved nothing yet and begins again, with the same parameters.")
            case "trained" | "training":
                lines.append(f"Trial {trial.number} is trained; its checkpoints are scored at the next start.")
            case _:
                lines.append(f"Trial {trial.number} is {trial.state.state}.")
    return "\n".join([*lines, "The same command again goes on."])


def progress_parts(
    live: Sequence[LiveTrial], trials: AllTrials, finished: int, target: int, *, slots: int, paused: bool
) -> list[str]:
    """Return the parts of the live line: trials, what each does, the time left; where several train, less of each."""
    parts = [f"{finished}/{target} trials", *(["paused"] if paused else [])]
    several = sum(trial.state.state == "training" for trial in live) > 1
    for trial in live:
        if trial.state.state == "training":
            fields = progress_fields(trial)
            if several:
                fields = {name: value for name, value in fields.items() if name not in ("step", "loss", "s_per_step")}
            told = [f"{name} {value}" for name, value in fields.items()]
            parts.append(f"trial {trial.number} training: {', '.join(told) or 'starting'}")
        elif trial.state.state == "trained":
            parts.append(f"trial {trial.number} scoring: {trial.scores.recorded}/{trial.scores.seen}")
    left = seconds_left(trials, target - finished, slots)
    return [*parts, f"about {duration(left)} left"] if left else parts


def progress_fields(live: LiveTrial) -> dict[str, Any]:
    """Return what a training said last, as fields of a log line."""
    progress = live.progress
    if progress is None:
        return {}
    if progress.preparing is not None:
        return {progress.preparing: f"{progress.step}/{progress.steps}"}
    epochs = live.params.max_train_epochs
    known: dict[str, Any] = {
        "epoch": progress.epoch if epochs is None or progress.epoch is None else f"{progress.epoch}/{epochs}",
        "step": f"{progress.step}/{progress.steps}",
        "loss": progress.loss,
        "s_per_step": progress.seconds_per_step,
        "eta": None if progress.eta_s is None else duration(progress.eta_s),
    }
    return {name: value for name, value in known.items() if value is not None}


def seconds_left(trials: AllTrials, left: int, slots: int) -> float:
    """Estimate from the finished trials how long `left` others take, so many of them at once as there are slots."""
    took = [seconds(trial.started, trial.ended) for trial in trials.trials if trial.state in ("complete", "pruned")]
    return left * sum(took) / len(took) / min(slots, left) if took and left > 0 else 0.0


def seconds(start: datetime | None, end: datetime | None) -> float:
    """Return the time between two moments; 0 where one is unknown."""
    return (end - start).total_seconds() if start is not None and end is not None else 0.0

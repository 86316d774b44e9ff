"""What the daemon says when it ends: the winner, or what was saved."""

from __future__ import annotations

from collections.abc import Sequence

from optimizer_daemon.results import ranked, winner
from optimizer_daemon.runner import LiveTrial
from optimizer_daemon.search.space import format_parameters
from shared.layout import StudyLayout
from shared.schemas import AllTrials


def ended_text(study: StudyLayout, trials: AllTrials, finished: int, target: int) -> str:
    """Return the last words of a run that was not stopped."""
    lines = [f"{finished} of {target} trials are finished."]
    if finished >= target:
        lines.append(f"For more, pass a larger number, such as --n-trials {finished + 10}.")
    best = winner(trials)
    if best is None:
        measured = len(ranked(trials))
        lines.append(f"No winner yet: {measured} trials have a score, and none of them passed its gate.")
        return "\n".join(lines)
    trial = study.trial(best.trial)
    lines += ["", f"Winner: trial {best.trial}, {trials.objective} {best.value:.4f} (lower is better)"]
    lines += format_parameters(best.parameters)
    lines += [
        "",
        f"weights   {trial.final_checkpoint}",
        f"pictures  {trial.final_evaluation.folder}",
        f"results   {study.results.folder}",
    ]
    return "\n".join(lines)


def stopped_text(live: Sequence[LiveTrial], finished: int, target: int) -> str:
    """Return the last words of a run that was stopped: what was saved, and how to go on."""
    lines = [f"Stopped. {finished} of {target} trials are finished and saved."]
    for trial in live:
        match trial.state.state:
            case "interrupted" if trial.layout.training_state.exists():
                lines.append(f"Trial {trial.number} goes on from its training state in {trial.layout.training_state}.")
            case "interrupted":
                lines.append(f"Trial {trial.number} had saved nothing yet and begins again, with the same parameters.")
            case "trained" | "training":
                lines.append(f"Trial {trial.number} is trained; its checkpoints are scored at the next start.")
            case _:
                lines.append(f"Trial {trial.number} is {trial.state.state}.")
    return "\n".join([*lines, "The same command again goes on."])

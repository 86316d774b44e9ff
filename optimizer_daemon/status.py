"""The study at a glance, read from its files: it works whether or not a daemon lives."""

from __future__ import annotations

from typing import Any

from optimizer_daemon.results import all_trials, ranked, winner
from optimizer_daemon.runner import now_local
from shared.errors import UserError
from shared.files import read_model
from shared.layout import StudyLayout, expected_checkpoints
from shared.locks import FileLock
from shared.schemas import Run, TrialResult


def study_status(study: StudyLayout, top: int) -> dict[str, Any]:
    """Return the study's state, the best `top` trials and those under way, JSON-ready.

    Raises:
        UserError: there is no study in the folder.
    """
    try:
        run = read_model(study.run, Run)
    except FileNotFoundError:
        raise UserError(f"{study.root} holds no study (no run.json); name the optimizer's --output-dir") from None
    objective = run.plan.scoring.objective if run.plan is not None else "objective"
    trials = all_trials(study, run.study_name, objective, now_local())
    best = winner(trials)
    every = run.settings.get("save-every-n-epochs")
    return {
        "study": run.study_name,
        "folder": str(study.root),
        "status": run.status,
        "optimizer_alive": FileLock.is_held(study.optimizer_lock),
        "evaluator_alive": FileLock.is_held(study.manager_lock),
        "objective": objective,
        "finished": sum(trial.state in ("complete", "pruned") for trial in trials.trials),
        "failed": sum(trial.state == "failed" for trial in trials.trials),
        "target": run.settings.get("n-trials"),
        "best": None if best is None else best.trial,
        "top": [_row(study, trial, every) for trial in ranked(trials)[:top]],
        "under_way": [
            _row(study, trial, every)
            for trial in trials.trials
            if trial.state in ("drawn", "training", "trained", "interrupted")
        ],
    }


def status_text(status: dict[str, Any]) -> str:
    """Return the status for people."""
    lives = [name for name in ("optimizer", "evaluator") if status[f"{name}_alive"]]
    lines = [
        f"{status['study']}: {status['finished']} of {status['target']} trials finished"
        + (f", {status['failed']} failed" if status["failed"] else ""),
        f"{status['folder']}: {' and '.join(lives) or 'no daemon'} running, study {status['status']}",
    ]
    for trial in status["under_way"]:
        counted = f"{trial['checkpoints_seen']}/{trial['checkpoints_expected'] or '?'}"
        curve = ", ".join(f"epoch {epoch}: {value:.4f}" for epoch, value in trial["curve"])
        lines.append(f"trial {trial['trial']}: {trial['state']}, checkpoints {counted}{f', {curve}' if curve else ''}")
    if status["top"]:
        lines += ["", f"{'trial':>5}  {status['objective']:>14}  parameters"]
    for trial in status["top"]:
        mark = "" if trial["feasible"] is not False else "  (failed its gate)"
        shown = "  ".join(f"{name}={_short(value)}" for name, value in trial["parameters"].items())
        lines.append(f"{trial['trial']:>5}  {trial['value']:>14.4f}  {shown}{mark}")
    return "\n".join(lines)


def _row(study: StudyLayout, trial: TrialResult, every: Any) -> dict[str, Any]:
    epochs = trial.parameters.get("max_train_epochs")
    expected = expected_checkpoints(epochs, every) if isinstance(epochs, int) and isinstance(every, int) else None
    return {
        "trial": trial.trial,
        "optuna_number": trial.optuna_number,
        "state": trial.state,
        "reason": trial.reason,
        "value": trial.value,
        "feasible": trial.feasible,
        "checkpoints_seen": len(study.trial(trial.trial).list_checkpoints()),
        "checkpoints_expected": expected,
        "curve": [(point.epoch, point.value) for point in trial.curve],
        "parameters": trial.parameters,
    }


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

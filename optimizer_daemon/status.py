"""The study at a glance, read from its files: it works whether or not a daemon lives, and with damaged files too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from optimizer_daemon.baselines import against, baseline_lines, baseline_results
from optimizer_daemon.glance import look_at, read
from optimizer_daemon.results import DIRECTION, ranked, winner
from optimizer_daemon.runner import now_local
from optimizer_daemon.search.objectives import objectives_of_run
from optimizer_daemon.summary import finalist_line
from optimizer_daemon.trade_offs import front
from shared.errors import UserError
from shared.layout import StudyLayout, TrialLayout, expected_checkpoints
from shared.locks import FileLock
from shared.schemas import AllTrials, BaselineResult, EvaluationState, Run, TrialResult, TrialState

_UNDER_WAY = ("drawn", "training", "trained", "interrupted")


def study_status(study: StudyLayout, top: int) -> dict[str, Any]:
    """Return the study's state, the best `top` trials and those under way, JSON-ready.

    A file that is damaged is named in "damaged", and what only it could tell is left out.

    Raises:
        UserError: there is no study in the folder.
    """
    damaged: list[str] = []
    run = read(study.run, Run, damaged)
    if run is None and not damaged and not study.list_trials():
        raise UserError(f"{study.root} holds no study (no run.json); name the optimizer's --output-dir")
    objective = run.plan.scoring.objective if run is not None and run.plan is not None else "objective"
    settings = run.settings if run is not None else {}
    name = run.study_name if run is not None else study.root.name
    objectives = objectives_of_run(run) if run is not None else ()
    look = look_at(study, None if objectives else top)  # a front is made of all trials
    damaged += look.damaged
    trials = AllTrials(
        study_name=name,
        updated=now_local(),
        objective=objective,
        direction=DIRECTION,
        objectives=objectives,
        trials=look.shown,
    )
    stage = run.stage if run is not None else None
    best = winner(trials)
    baselines = baseline_results(study, run) if run is not None else ()
    every = settings.get("save-every-n-epochs")
    return {
        "study": trials.study_name,
        "folder": str(study.root),
        "status": run.status if run is not None else "unknown",
        "optimizer_alive": FileLock.is_held(study.optimizer_lock),
        "evaluator_alive": FileLock.is_held(study.manager_lock),
        "objective": objective,
        "objectives": [known.model_dump() for known in objectives],
        "front": [trial.trial for trial in front(trials)] if objectives else [],
        "finished": look.finished,
        "failed": look.failed,
        "target": settings.get("n-trials") if stage is None else stage.study_trials,
        "stage": None if stage is None else {**stage.model_dump(), "finished": look.finished_by_stage[stage.name]},
        "best": None if best is None else best.trial,
        "best_is": None if best is None or best.finalist_of is None else finalist_line(trials, best),
        "baselines": [result.model_dump() for result in baselines],
        "baseline_lines": baseline_lines(
            baselines, objective, None if best is None else best.value, knee=bool(objectives)
        ),
        "top": [_row(study, trial, every, baselines) for trial in ranked(trials)[:top]],
        "under_way": [_row(study, trial, every, baselines) for trial in trials.trials if trial.state in _UNDER_WAY],
        "quarantined": [row for trial in look.suspects for row in _quarantined(trial, damaged)],
        "requests": [
            {"to": recipient, "file": path.name}
            for recipient in ("optimizer", "evaluator")
            for path in study.list_requests(recipient)
        ],
        "damaged": damaged,
    }


def status_text(status: dict[str, Any]) -> str:
    """Return the status for people."""
    lives = [name for name in ("optimizer", "evaluator") if status[f"{name}_alive"]]
    stage = status["stage"]
    of_target = "" if status["target"] is None else f" of {status['target']}"
    lines = [
        f"{status['study']}: {status['finished']}{of_target} trials finished"
        + (f", {status['failed']} failed" if status["failed"] else ""),
        *([f"stage {stage['name']!r}{_place(stage)}: {stage['finished']} of {stage['trials']}"] if stage else []),
        f"{status['folder']}: {' and '.join(lives) or 'no daemon'} running, study {status['status']}",
    ]
    for trial in status["under_way"]:
        counted = f"{trial['checkpoints_seen']}/{trial['checkpoints_expected'] or '?'}"
        on = f" on {trial['gpu'][:12]}" if trial["state"] == "training" and trial["gpu"] else ""
        curve = ", ".join(f"epoch {epoch}: {value:.4f}" for epoch, value in trial["curve"])
        lines.append(
            f"trial {trial['trial']}: {trial['state']}{on}, checkpoints {counted}{f', {curve}' if curve else ''}"
            + (f" ({trial['reason']})" if trial["reason"] else "")
        )
    for found in status["quarantined"]:
        lines.append(f"quarantined: {found['trial']} {found['checkpoint']}: {found['code']}: {found['reason']}")
    for request in status["requests"]:
        lines.append(f"open request to the {request['to']} daemon: {request['file']}")
    lines += [f"damaged: {sentence}" for sentence in status["damaged"]]
    if status["baseline_lines"]:
        lines += ["", *status["baseline_lines"]]
    names = [known["name"] for known in status["objectives"]] or [status["objective"]]
    if status["top"]:
        lines += ["", f"{'trial':>5}  {'  '.join(f'{name:>14}' for name in names)}  parameters"]
    for trial in status["top"]:
        shown = "  ".join(f"{name}={_short(value)}" for name, value in trial["parameters"].items())
        values = trial["values"] or {status["objective"]: trial["value"]}
        figures = "  ".join(f"{values[name]:>14.4f}" if name in values else f"{'?':>14}" for name in names)
        lines.append(f"{trial['trial']:>5}  {figures}  {shown}{_mark(trial, status)}")
    if status["best"] is not None and not status["objectives"]:
        lines += ["", f"winner: trial {status['best']}{f', {best_is}' if (best_is := status['best_is']) else ''}"]
    return "\n".join(lines)


def _mark(trial: dict[str, Any], status: dict[str, Any]) -> str:
    mark = "" if trial["finalist_of"] is None else f"  (trial {trial['finalist_of']} again)"
    if trial["trial"] in status["front"]:
        mark += "  (front, its knee)" if trial["trial"] == status["best"] else "  (front)"
    mark += "".join(f"  {difference:+.4f} to {name}" for name, difference in trial["against"].items())
    return mark + ("" if trial["feasible"] is not False else "  (failed its gate)")


def _place(stage: dict[str, Any]) -> str:
    return f" ({stage['number']} of {stage['of']})" if stage["of"] > 1 else ""


def _quarantined(trial: TrialLayout, damaged: list[str]) -> Iterator[dict[str, Any]]:
    state = read(trial.evaluations.state, EvaluationState, damaged)
    for record in state.checkpoints if state is not None else ():
        if record.quarantine is not None:
            found = record.quarantine
            yield {
                "trial": trial.name, "checkpoint": record.checkpoint, "code": found.code, "reason": found.reason
            }  # fmt: skip


def _row(study: StudyLayout, trial: TrialResult, every: Any, baselines: Sequence[BaselineResult]) -> dict[str, Any]:
    state = read(study.trial(trial.trial).state, TrialState, [])
    epochs = trial.parameters.get("max_train_epochs")
    expected = expected_checkpoints(epochs, every) if isinstance(epochs, int) and isinstance(every, int) else None
    return {
        "trial": trial.trial,
        "optuna_number": trial.optuna_number,
        "state": trial.state,
        "reason": trial.reason,
        "gpu": None if state is None else state.gpu,
        "value": trial.value,
        "values": trial.values,
        "feasible": trial.feasible,
        "against": {} if trial.value is None else against(baselines, trial.value),
        "checkpoints_seen": len(study.trial(trial.trial).list_checkpoints()),
        "checkpoints_expected": expected,
        "curve": [(point.epoch, point.value) for point in trial.curve],
        "finalist_of": trial.finalist_of,
        "parameters": trial.parameters,
    }


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

"""`evaluator-daemon evaluate`: score one trial's checkpoints, or weight files outside any trial."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.verbs import Run

if TYPE_CHECKING:
    from evaluator_daemon.job import Job
    from evaluator_daemon.outside import Outcome
    from shared.layout import StudyLayout


def declare(parser: argparse.ArgumentParser) -> Run:
    """Add the flags of the verb to its parser and return what runs it."""
    from evaluator_daemon.settings import EvaluatorSettings
    from shared.settings import add_settings_flags

    parser.description = (
        "Score weight files with the study's plan and exit; the results go to evaluations/<label>/ of the study "
        "folder, and the files stay where they are. With --trial score every checkpoint of one trial that is not "
        "scored yet; with --watch go on until the trial is over. Exit code 3 when a FILE could not be scored."
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="*.safetensors file, anywhere")
    parser.add_argument("--base", action="store_true", help="evaluate the base model alone, under the label base")
    parser.add_argument("--label", metavar="NAME", help="folder below evaluations/ (default: the file's name)")
    parser.add_argument("--trial", type=Path, metavar="DIR", help="the trial's folder")
    parser.add_argument("--watch", action="store_true", help="wait for further checkpoints until the trial is over")
    parser.add_argument(
        "--override-plan",
        action="store_true",
        help="let flags differ from the study's plan; such results never reach a trial",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    add_settings_flags(parser, EvaluatorSettings)
    return _evaluate


def _evaluate(arguments: argparse.Namespace) -> int:
    from shared.errors import SettingsError

    if arguments.trial is not None:
        for flag, given in (
            ("FILE", bool(arguments.files)),
            ("--base", arguments.base),
            ("--label", arguments.label is not None),
            ("--override-plan", arguments.override_plan),
            ("--json", arguments.json),
        ):
            if given:
                raise SettingsError("--trial", str(arguments.trial), f"leave {flag} out, or name a FILE instead")
        return _evaluate_trial(arguments)
    if arguments.watch:
        raise SettingsError("--watch", True, "only a trial is waited for; name one by --trial")
    if not arguments.files and not arguments.base:
        raise SettingsError("FILE", None, "name *.safetensors files, --base, or a trial by --trial DIR")
    return _evaluate_outside(arguments)


def _evaluate_trial(arguments: argparse.Namespace) -> int:
    from evaluator_daemon.job import find_job
    from evaluator_daemon.settings import EvaluatorSettings
    from shared.errors import SettingsError
    from shared.layout import StudyLayout, TrialLayout
    from shared.logs import set_up_logs
    from shared.settings import load_settings

    if not arguments.trial.is_dir():
        raise SettingsError("--trial", str(arguments.trial), "name a trial's folder inside a study folder")
    trial = arguments.trial.resolve()
    job = find_job(load_settings(EvaluatorSettings, arguments), StudyLayout(trial.parent))
    if job is None:
        raise SettingsError(
            "--base-model", None, f"there is no {trial.parent / 'run.json'}; pass --base-model and --prompts"
        )
    set_up_logs(TrialLayout(trial).evaluation_log)
    from evaluator_daemon.evaluator import evaluate_trial  # seconds of torch, so bad input is told before

    evaluate_trial(job, trial, watch=arguments.watch)
    return 0


def job_outside(arguments: argparse.Namespace, *, override_plan: bool) -> Job:
    """Return what the study's evaluators are told, for work outside its trials.

    Raises:
        SettingsError, StudyMismatchError, ResourceError: as `find_job`, and where there is no plan at all.
    """
    from evaluator_daemon.job import find_job, study_folder
    from evaluator_daemon.settings import EvaluatorSettings
    from shared.errors import SettingsError
    from shared.settings import load_settings

    loaded = load_settings(EvaluatorSettings, arguments)
    makes_a_plan = loaded.settings.base_model is not None and loaded.settings.prompts is not None
    study = study_folder(loaded.settings, make=makes_a_plan)
    job = find_job(loaded, study, override_plan=override_plan)
    if job is None:
        raise SettingsError("--base-model", None, f"there is no {study.run}; pass --base-model and --prompts")
    return job


def _evaluate_outside(arguments: argparse.Namespace) -> int:
    from evaluator_daemon.operands import BASE, label_of, named_files, require_file, require_label
    from shared.errors import CheckpointError, SettingsError

    files = [require_file(file) for file in arguments.files]
    label = None if arguments.label is None else require_label(arguments.label)
    work: dict[str, dict[str, Path | None]] = {}
    if label is not None:
        work[label] = named_files(files)
    else:
        for file in files:
            known = work.setdefault(label_of(file), {})
            if known and known.get(file.stem) != file:
                other = next(iter(known.values()))
                raise SettingsError(
                    "FILE",
                    str(file),
                    f"{other} would have the same label; evaluate them apart, each with its own --label",
                )
            known[file.stem] = file
    if arguments.base:
        work.setdefault(label or BASE, {})[BASE] = None
    job = job_outside(arguments, override_plan=arguments.override_plan)
    outcomes = {name: evaluate_label(job, name, named) for name, named in work.items()}
    rows = [_row(name, outcome) for name, found in outcomes.items() for outcome in found]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows, job.plan.scoring.objective)
    return 0 if all(row["status"] == "recorded" for row in rows) else CheckpointError.exit_code


def evaluate_label(job: Job, label: str, files: dict[str, Path | None]) -> list[Outcome]:
    """Have files evaluated under a label: by the manager where one lives, which has everything loaded, else here.

    One on another device than asked for, or without the study's run.json, is not asked.
    """
    from evaluator_daemon.folder import read_or_none
    from shared.layout import StudyLayout
    from shared.locks import FileLock
    from shared.schemas import EvaluatorManagerState

    study = StudyLayout(job.root)
    state = read_or_none(study.manager_state, EvaluatorManagerState)
    does_it = study.run.exists() and state is not None and state.device == job.device
    if does_it and FileLock.is_held(study.manager_lock):
        return [_ask_manager(job, study, label, name, file) for name, file in files.items()]
    return _evaluate_here(job, label, files)


def _ask_manager(job: Job, study: StudyLayout, label: str, name: str, file: Path | None) -> Outcome:
    from evaluator_daemon.outside import Outcome, outcome_of
    from shared.requests import PendingRequest, RequestFolder
    from shared.schemas import Evaluate

    folder = RequestFolder(study, "evaluator")

    def carry_out(request: PendingRequest) -> None:  # the manager has gone meanwhile
        _evaluate_here(job, label, {name: file})
        folder.accept(request)

    command = Evaluate(
        kind="evaluate",
        file=None if file is None else str(file),
        label=label,
        plan=job.plan,
        asked_by="evaluator-daemon evaluate",
    )
    print(f"the evaluator manager evaluates {name}; see {study.evaluations(label).log}", file=sys.stderr)
    answer = folder.ask(command, study.manager_lock, carry_out, timeout_s=math.inf)
    outcome = outcome_of(study.evaluations(label), name)
    if answer.ok or outcome.status not in ("recorded", "waiting"):
        return outcome
    return Outcome(name, "refused", answer.error, None)


def _evaluate_here(job: Job, label: str, files: dict[str, Path | None]) -> list[Outcome]:
    from shared.layout import StudyLayout
    from shared.logs import set_up_logs, tear_down_logs

    layout = StudyLayout(job.root).evaluations(label)
    layout.folder.mkdir(parents=True, exist_ok=True)
    set_up_logs(layout.log)
    try:
        from evaluator_daemon.outside import evaluate_outside  # seconds of torch, so bad input is told before

        return evaluate_outside(job, label, files)
    finally:
        tear_down_logs()


def _row(label: str, outcome: Outcome) -> dict[str, Any]:
    metrics = outcome.metrics
    row: dict[str, Any] = {
        "label": label,
        "checkpoint": outcome.checkpoint,
        "status": outcome.status,
        "reason": outcome.reason,
    }
    if metrics is not None:
        row |= {
            "epoch": metrics.epoch,
            "checkpoint_sha256": metrics.checkpoint_sha256,
            "plan_hash": metrics.plan_hash,
            "pictures": len(metrics.samples),
            "scores": {name: score.value for name, score in metrics.scores.items()},
            "metrics": {name: metric.value for name, metric in metrics.metrics.items()},
            "feasible": metrics.gate.feasible,
        }
    return row


def print_table(rows: list[dict[str, Any]], objective: str) -> None:
    """One line per checkpoint, and the reason under what has no result."""
    print(f"{'label':20} {'checkpoint':28} {'epoch':>5} {objective:>16} {'gate':>6} {'pictures':>8}")
    for row in rows:
        if row["status"] != "recorded":
            print(f"{row['label']:20} {row['checkpoint']:28} {row['status']}: {row['reason']}")
            continue
        epoch = "-" if row["epoch"] is None else row["epoch"]
        value = row["scores"].get(objective)
        shown = "-" if value is None else f"{value:.4f}"
        gate = "passed" if row["feasible"] else "failed"
        print(f"{row['label']:20} {row['checkpoint']:28} {epoch:>5} {shown:>16} {gate:>6} {row['pictures']:>8}")

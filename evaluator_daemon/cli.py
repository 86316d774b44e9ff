"""The `evaluator-daemon` command. Each verb imports what it needs: --help must not wait for torch or pydantic."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shared.verbs import Verb, run_verb, settings_verb

if TYPE_CHECKING:
    from evaluator_daemon.settings import EvaluatorSettings

Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console command; exits with the codes of `shared.errors`."""
    verbs = (
        Verb("run", "watch a study folder and score every checkpoint", _declare_run),
        Verb("evaluate", "score the checkpoints of one trial", _declare_evaluate),
        Verb("retry", "lift the quarantine of a trial's checkpoints", _declare_retry),
        Verb("inspect", "prove that LoRA files are whole and fit to be scored", _declare_inspect),
        settings_verb(_settings_model),
    )
    run_verb("evaluator-daemon", "Render and score every checkpoint of a study as it lands.", verbs, argv)


def _settings_model() -> type[EvaluatorSettings]:
    from evaluator_daemon.settings import EvaluatorSettings

    return EvaluatorSettings


def _declare_run(parser: argparse.ArgumentParser) -> Run:
    from shared.settings import add_settings_flags

    parser.description = (
        "Watch a study folder, one evaluator process per trial. Without run.json the evaluation plan is made from "
        "--base-model and --prompts, so that any trainer's trial_* folders can be scored."
    )
    add_settings_flags(parser, _settings_model())
    parser.add_argument("--once", action="store_true", help="evaluate what is there and exit")
    parser.add_argument(
        "--exit-when-finished", action="store_true", help="exit when the study is finished and everything is scored"
    )
    return _run


def _declare_evaluate(parser: argparse.ArgumentParser) -> Run:
    from shared.settings import add_settings_flags

    parser.description = (
        "Score every checkpoint of one trial that is not scored yet, and exit; with --watch go on until the trial is "
        "over."
    )
    parser.add_argument("--trial", type=Path, required=True, metavar="DIR", help="the trial's folder")
    parser.add_argument("--watch", action="store_true", help="wait for further checkpoints until the trial is over")
    add_settings_flags(parser, _settings_model())
    return _evaluate


def _declare_inspect(parser: argparse.ArgumentParser) -> Run:
    parser.description = (
        "Say for each file whether it is complete, unaltered, finite and a LoRA. Exit code 3 when any file is not."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="*.safetensors file")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    return _inspect


def _declare_retry(parser: argparse.ArgumentParser) -> Run:
    parser.description = (
        "Forget the strikes and the quarantine of a trial's checkpoints, or of one, so that they are evaluated again: "
        "at once where a manager runs, else with the next evaluation."
    )
    parser.add_argument("trial", metavar="TRIAL", help="folder name or number of the trial, such as trial_0005 or 5")
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT", help="file name of one checkpoint (default: all of the trial)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="study file (TOML) that names the study folder")
    parser.add_argument("--optimization-dir", type=Path, metavar="DIR", help="study folder")
    return _retry


def _run(arguments: argparse.Namespace) -> int:
    from evaluator_daemon.manager import run_manager
    from shared.settings import load_settings

    run_manager(
        load_settings(_settings_model(), arguments),
        once=arguments.once,
        exit_when_finished=arguments.exit_when_finished,
    )
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from evaluator_daemon.job import find_job
    from shared.errors import SettingsError
    from shared.layout import StudyLayout, TrialLayout
    from shared.logs import set_up_logs
    from shared.settings import load_settings

    if not arguments.trial.is_dir():
        raise SettingsError("--trial", str(arguments.trial), "name a trial's folder inside a study folder")
    trial = arguments.trial.resolve()
    job = find_job(load_settings(_settings_model(), arguments), StudyLayout(trial.parent))
    if job is None:
        raise SettingsError(
            "--base-model", None, f"there is no {trial.parent / 'run.json'}; pass --base-model and --prompts"
        )
    set_up_logs(TrialLayout(trial).evaluation_log)
    from evaluator_daemon.evaluator import evaluate_trial  # seconds of torch, so bad input is told before

    evaluate_trial(job, trial, watch=arguments.watch)
    return 0


def _retry(arguments: argparse.Namespace) -> int:
    from evaluator_daemon.commands import ask
    from evaluator_daemon.job import study_folder
    from shared.schemas import Retry
    from shared.settings import load_settings

    study = study_folder(load_settings(_settings_model(), arguments).settings, make=False)
    number = int(arguments.trial) if arguments.trial.isdecimal() else 0
    name = study.trial(number).name if number else arguments.trial
    checkpoint = arguments.checkpoint
    print(ask(study, Retry(kind="retry", trial_name=name, checkpoint=checkpoint, asked_by="evaluator-daemon retry")))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from shared.errors import CheckpointError

    rows = [_inspect_file(file) for file in arguments.files]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(_as_line(row))
    return 0 if all(row["code"] == "ok" for row in rows) else CheckpointError.exit_code


def _inspect_file(file: Path) -> dict[str, Any]:
    from shared.errors import CheckpointError
    from shared.safetensors_file import lora_modules, read_checkpoint

    try:
        checkpoint = read_checkpoint(file, file.parent)
        layout = lora_modules(checkpoint)
    except CheckpointError as error:
        return {"file": str(file), "code": error.code, "reason": error.reason}
    return {
        "file": str(file),
        "code": "ok",
        "family": layout.family,
        "modules": len(layout.modules),
        "ranks": sorted(layout.ranks),
        "epoch": checkpoint.epoch,
        "size_bytes": checkpoint.size,
        "sha256": checkpoint.sha256,
    }


def _as_line(row: dict[str, Any]) -> str:
    if row["code"] != "ok":
        return f"{row['file']}: {row['code']}: {row['reason']}"
    epoch = "unknown" if row["epoch"] is None else row["epoch"]
    return (
        f"{row['file']}: ok, {row['family']}, {row['modules']} modules, rank {'/'.join(map(str, row['ranks']))}, "
        f"epoch {epoch}, {row['size_bytes'] / 1e6:.1f} MB, sha256 {row['sha256'][:12]}"
    )


if __name__ == "__main__":
    main()

"""The command trainer: any program that leaves safetensors files, by the study file's [trainer.command] table."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimizer_daemon.collecting.job import JOB, Job
from optimizer_daemon.collecting.patterns import Pattern
from optimizer_daemon.collecting.progress import parse_line
from optimizer_daemon.trainers.base import LaunchPlan, ResumePoint, TrainerInput
from optimizer_daemon.trainers.command_options import TABLE, CommandOptions, read_options
from optimizer_daemon.trainers.diagnosis import explain
from optimizer_daemon.trainers.picture_folder import check_pictures, make_picture_folder, picture_folder
from optimizer_daemon.trainers.templates import fill
from shared.errors import SettingsError, UserError
from shared.layout import StudyLayout, TrialLayout
from shared.progress_bar import Progress
from shared.schemas import Run, TrainerExit, TrialParams
from shared.schemas.base import Scalar

_SOURCE_ROOT = Path(__file__).resolve().parents[2]
_BESIDE = "one that begins with ./ for beside the study file"


class CommandTrainer:
    """Another program trains; a process of ours runs it and brings its checkpoints under their names."""

    # True by what `plan` refuses: a study with held-out pictures whose program might train on them.
    holds_out = True
    starts_apart = True  # nobody knows what the program keeps beside the pictures

    def check_input(self, given: TrainerInput) -> None:
        """See that the table is whole and that the program and its folder are there.

        Raises:
            UserError: something of it will not do.
        """
        options = read_options(given.trainer.options)
        if options.cwd is not None and "{" not in options.cwd and not _whole(options.cwd).is_dir():
            raise SettingsError(f"{TABLE} cwd", options.cwd, "that is no folder; correct it")
        _require_program(options, given.trainer.python)
        if "dataset_dir" in options.used:
            check_pictures(given.dataset_config)

    def prepare(self, run: Run, study: StudyLayout) -> None:
        """Make the folder of training pictures, where the program is given {dataset_dir}.

        Raises:
            UserError: a picture or its caption cannot be read.
            DiskError: it could not be made.
        """
        if "dataset_dir" in read_options(run.trainer.options).used:
            held_out = {picture.sha256 for picture in run.pictures.held_out} if run.pictures is not None else set()
            make_picture_folder(Path(str(run.settings["dataset-config"])), picture_folder(study), held_out)

    def plan(
        self,
        params: TrialParams,
        trial: TrialLayout,
        run: Run,
        gpu: str | None = None,
        resume: ResumePoint | None = None,
    ) -> LaunchPlan:
        """Return the plan: our collecting process with the filled-in command.

        Raises:
            SettingsError: a placeholder is unknown, or held-out pictures might be trained on.
            UserError: a parameter is never told to the program.
        """
        options = read_options(run.trainer.options)
        _require_held_out(options, run)
        trial = TrialLayout(trial.folder.absolute())
        values = _values(params, trial, run, options, gpu)
        command = _filled(options.command, values, "command")
        if options.resume:
            # Filled in every time: a misspelt one is to be told before the first trial.
            at = resume.state if resume is not None else trial.output
            there: dict[str, Scalar] = {"state": str(at), "state_dir": str(at.parent), "state_name": at.name}
            more = _filled(options.resume, values | there, "resume")
            command += more if resume is not None else []
        files = {
            f"{trial.command_files.name}/{name}": fill(text, values, f"{TABLE} files.{name}")
            for name, text in options.files.items()
        }
        job = Job(
            command=tuple(command),
            cwd=trial.output if options.cwd is None else _whole(fill(options.cwd, values, f"{TABLE} cwd")),
            stop_signal=options.stop_signal,
            output_dir=trial.output,
            trial_dir=trial.folder,
            output_name=trial.output_name,
            epochs=params.max_train_epochs,
            steps_per_epoch=options.steps_per_epoch,
            first_epoch=options.first_epoch,
            checkpoints=tuple(_pattern(text, values, "checkpoints") for text in options.checkpoints),
            final=None if options.final is None else _pattern(options.final, values, "final"),
            state=None if options.state is None else _pattern(options.state, values, "state"),
            progress=tuple(options.progress),
        )
        _require_all_told(options, params)
        if job.final is None and job.epochs is None:
            raise SettingsError(
                f"{TABLE} final", None, "the search space has no max_train_epochs, so write its pattern"
            )
        return LaunchPlan(
            argv=(sys.executable, "-m", "optimizer_daemon.collecting", "--job", str(trial.command_files / JOB)),
            env=_environment(options, values, run, gpu),
            files={**files, f"{trial.command_files.name}/{JOB}": job.model_dump_json(indent=2) + "\n"},
            cwd=_SOURCE_ROOT,  # python -m finds the package there; the program itself runs in the job's cwd
            patience_s=options.patience_s,
        )

    def resume_point(self, trial: TrialLayout) -> ResumePoint | None:
        """Return what fits the `state` pattern with the highest number, or the latest name without one."""
        trial = TrialLayout(trial.folder.absolute())
        try:
            job = json.loads((trial.command_files / JOB).read_bytes())
            pattern = Pattern(job["state"]) if job["state"] is not None else None
        except (OSError, ValueError, KeyError, TypeError):  # never started, or not by this trainer
            return None
        found = pattern.find(trial.output) if pattern is not None else []
        return ResumePoint(found[-1].path) if found else None

    def parse_progress(self, line: str) -> Progress | None:
        """Read the bar that our collecting process draws for the program, or the program's own of the same form."""
        return parse_line(line)

    def diagnose(self, record: TrainerExit | None, last_lines: Sequence[str]) -> str:
        """Return the collecting process's or the program's own error line, or what its end and last lines mean."""
        return explain(record, last_lines)


TRAINER = CommandTrainer()


def _values(
    params: TrialParams, trial: TrialLayout, run: Run, options: CommandOptions, gpu: str | None
) -> dict[str, Scalar]:
    """Return every placeholder's value: those of the study and of the trial, and all parameters."""
    every = run.settings.get("save-every-n-epochs") or 2
    values: dict[str, Scalar | None] = {
        "trial": params.trial,
        "seed": params.training_seed,
        "output_dir": str(trial.output),
        "output_name": trial.output_name,
        "files_dir": str(trial.command_files),
        "logging_dir": str(trial.tensorboard),
        "base_model": run.base_model,
        "dataset_config": _text(run.settings.get("dataset-config")),
        "dataset_dir": str(picture_folder(StudyLayout(trial.folder.parent))),
        # of what it sees: the leased card is its only one
        "device": (_text(run.settings.get("device")) or "auto") if gpu is None else "cuda" if gpu else "cpu",
        "threads": run.threads_per_process,
        "python": run.trainer.python,
        "save_every_n_epochs": int(str(every)),
        "clip_skip": run.plan.clip_skip if run.plan is not None else 1,
    }
    if options.steps_per_epoch is not None:
        values["save_every_n_steps"] = int(str(every)) * options.steps_per_epoch
        if params.max_train_epochs is not None:
            values["max_train_steps"] = params.max_train_epochs * options.steps_per_epoch
    if taken := sorted(set(values) & set(params.parameters)):
        raise UserError(
            f"trial parameters: {taken[0]}: the study itself fills in {{{taken[0]}}}; rename it in the search space"
        )
    return {name: value for name, value in values.items() if value is not None} | dict(params.parameters)


def _filled(words: Sequence[str], values: Mapping[str, Scalar], key: str) -> list[str]:
    return [fill(word, values, f"{TABLE} {key}") for word in words]


def _pattern(text: str, values: Mapping[str, Scalar], key: str) -> str:
    """Fill everything in but what the pattern itself finds."""
    return fill(text, {**values, "epoch": "{epoch}", "step": "{step}"}, f"{TABLE} {key}")


def _environment(options: CommandOptions, values: Mapping[str, Scalar], run: Run, gpu: str | None) -> dict[str, str]:
    threads = str(run.threads_per_process)
    env = {"PYTHONUNBUFFERED": "1", "COLUMNS": "240", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu
    return env | {name: fill(text, values, f"{TABLE} env.{name}") for name, text in options.env.items()}


def _require_held_out(options: CommandOptions, run: Run) -> None:
    if run.pictures is None or not run.pictures.held_out or options.holds_out:
        return
    if "dataset_dir" not in options.used or "dataset_config" in options.used:
        raise SettingsError(
            f"{TABLE} command",
            " ".join(options.command),
            f"this study measures likeness to {len(run.pictures.held_out)} pictures that must not be trained on; train "
            "on {dataset_dir}, which leaves them out, and not on {dataset_config}; or say holds_out = true where the "
            "program leaves them out by itself",
        )


def _require_all_told(options: CommandOptions, params: TrialParams) -> None:
    """A parameter that the program never hears of is drawn, ranked and blamed for nothing."""
    accounted = options.used | set(options.unused)
    if "max_train_steps" in accounted:
        accounted.add("max_train_epochs")
    # A ratio has done its work once the value that was computed from it is told.
    accounted |= {f"{name}_ratio" for name in accounted & set(params.derived)}
    for name in params.parameters:
        if name not in accounted and name not in params.derived:
            raise UserError(
                f"trial parameters: {name}: {TABLE} never tells it to the program; write {{{name}}} into its command "
                "or files, name it in unused, or take it out of the search space"
            )


def _require_program(options: CommandOptions, python: str | None) -> None:
    program = options.command[0]
    if program == "{python}":
        if python is None:
            raise SettingsError("--trainer-python", None, f"name the Python that {TABLE} command runs as {{python}}")
        program = python
    if options.cwd is None and os.sep in program and not program.startswith((os.sep, "{")):
        raise SettingsError(f"{TABLE} command", program, f"without cwd write its whole path, or {_BESIDE}")
    if "{" not in program and _which(program, options.cwd) is None:
        raise SettingsError(
            f"{TABLE} command", program, "there is no such program; install it, or write its whole path"
        )


def _whole(folder: str) -> Path:
    """Return the folder; a relative one would be another one wherever the daemon is started."""
    if not Path(folder).is_absolute():
        raise SettingsError(f"{TABLE} cwd", folder, f"write its whole path, or {_BESIDE}")
    return Path(folder)


def _which(program: str, folder: str | None) -> str | None:
    if os.sep in program and folder is not None:
        program = str(Path(folder) / program)
    return shutil.which(program)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)

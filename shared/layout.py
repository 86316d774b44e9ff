"""Where everything lies in a study folder: the only module that knows a path or a file name.

`StudyLayout(root)` and the layouts it hands out are pure arithmetic on paths, apart from the few `list_*` methods
that look at a folder. `WRITERS` says who alone may write each path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Literal, Protocol

Writer = Literal["optimizer", "manager", "evaluator", "trainer", "anybody"]
"""Who writes a file. The manager and its evaluators are one daemon but separate processes."""

Recipient = Literal["optimizer", "evaluator"]
"""Whose request folder: the optimizer daemon's, or the evaluator daemon's (its manager answers)."""

# Names that shared.schemas needs too, to pair each document with its model.
RUN = "run.json"
MANAGER_STATE = "evaluator_manager_state.json"
PARAMS = "params.json"
TRIAL_STATE = "trial_state.json"
TRAINER_EXIT = "trainer_exit.json"
EVALUATION_STATE = "evaluation_state.json"
EVALUATION_SUMMARY = "evaluation_summary.json"
EVALUATION_PLAN = "evaluation_plan.json"
METRICS = "metrics.json"
BEST_PARAMETERS = "best_parameters.json"
ALL_TRIALS = "all_trials.json"
PARETO_FRONT = "pareto_front.json"
SUMMARY_STATISTICS = "summary_statistics.json"
REQUEST = "*.json"
ANSWER = "*.done.json"

TEMPORARY_MARK = ".tmp-"
"""In the name of a file that is being written: .<name>.tmp-<process>."""

CORRUPT_MARK = ".corrupt-"
"""In the name of an unreadable file that its writer set aside: <name>.corrupt-<time>."""

BASELINE = "baseline"
"""Label of the evaluations of the weights passed by --baseline."""

LABEL_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
"""A label names one folder below evaluations/, so it must not be able to leave it."""

WRITERS: Mapping[str, Writer] = MappingProxyType(
    {
        # The first pattern that matches decides. `*` stands for one name or a part of it, `**` for any depth.
        "optuna_study.db*": "optimizer",  # with SQLite's -wal and -shm
        RUN: "optimizer",
        "optimizer.lock": "optimizer",
        "optimization.log*": "optimizer",  # with rotated predecessors
        "watch_realtime_evaluation.sh": "optimizer",  # the manager puts it there only where it is absent
        "evaluator_manager.lock": "manager",
        "evaluator_manager.log*": "manager",
        MANAGER_STATE: "manager",
        f"requests/optimizer/{ANSWER}": "optimizer",
        f"requests/evaluator/{ANSWER}": "manager",
        f"requests/optimizer/{REQUEST}": "anybody",
        f"requests/evaluator/{REQUEST}": "anybody",
        "reference/**": "evaluator",
        "baseline/**": "optimizer",
        "trainer_cache/**/*.npz": "trainer",  # kohya's latents, beside the links to the pictures
        "trainer_cache/**": "optimizer",
        "evaluations/**": "evaluator",
        f"trial_*/{PARAMS}": "optimizer",
        f"trial_*/{TRIAL_STATE}": "optimizer",
        "trial_*/train_config.toml": "optimizer",  # what the trainer is started with
        "trial_*/command/**": "optimizer",  # the same for another program
        "trial_*/attempts/**": "optimizer",  # the trainer made them, the optimizer moved them here
        "trial_*/evaluation/**": "optimizer",
        "trial_*/realtime_evaluation.log*": "evaluator",
        "trial_*/realtime_evaluations/**": "evaluator",
        f"trial_*/{TRAINER_EXIT}": "trainer",
        "trial_*/trainer.lock": "trainer",
        "trial_*/training.log": "trainer",
        "trial_*/logs/**": "trainer",
        "trial_*/state/**": "trainer",
        "trial_*/output/**": "trainer",  # whatever another program writes
        "trial_*/sample/**": "trainer",  # kohya's own pictures, where it is given prompts
        "trial_*/*-state/**": "trainer",  # kohya keeps its resume state beside the weights
        "trial_*/*.safetensors": "trainer",
        "results/**": "optimizer",
        "best_training/**": "trainer",  # what the command in best_training_config.txt trains
    }
)
"""Path pattern, relative to the study folder -> its only writer."""


def writer_of(relative: PurePosixPath) -> Writer:
    """Return who alone may write `relative`, a path relative to the study folder.

    A file's temporary and set-aside forms belong to the writer of the file.

    Raises:
        KeyError: the path is no part of the contract.
    """
    final_name = relative.name.partition(CORRUPT_MARK)[0]
    if final_name.startswith(".") and TEMPORARY_MARK in final_name:
        final_name = final_name[1:].rpartition(TEMPORARY_MARK)[0]
    for pattern, writer in WRITERS.items():
        if matches(pattern, relative.with_name(final_name)):
            return writer
    raise KeyError(relative.as_posix())


def matches(pattern: str, relative: PurePosixPath) -> bool:
    """Tell whether `relative` fits a pattern of `WRITERS`."""
    parts = [re.escape(part).replace(r"\*", "[^/]*") for part in pattern.split("**")]
    return re.fullmatch(".+".join(parts), relative.as_posix()) is not None


def checkpoint_epoch(
    name: str, metadata_epoch: str | int | None, max_train_epochs: int | None, output_name: str
) -> int | None:
    """Return the epoch a checkpoint was saved after, or None when nothing tells it.

    Args:
        name: file name, e.g. "lora_trial_5-000002.safetensors".
        metadata_epoch: `ss_epoch` of the safetensors header, text there; anything but digits counts as absent.
        max_train_epochs: how many epochs the trial trains, when known.
        output_name: the trial's `output_name`; the file of exactly that name is the final checkpoint.
    """
    stem = name.removesuffix(".safetensors")
    if numbered := re.search(r"-([0-9]+)\Z", stem):
        return int(numbered[1])
    if metadata_epoch is not None and re.fullmatch(r"[0-9]+", str(metadata_epoch)):
        return int(metadata_epoch)
    return max_train_epochs if stem == output_name else None


def expected_checkpoints(epochs: int, every: int) -> int:
    """Return how many checkpoints a finished training leaves: ceil(epochs / every), the final one included.

    Raises:
        ValueError: an argument is below 1.
    """
    if epochs < 1 or every < 1:
        raise ValueError(f"epochs and every must be at least 1 but got {epochs} and {every}")
    return -(-epochs // every)


class _Layout(Protocol):
    @property
    def folder(self) -> Path: ...


class Below:
    """Attribute of a layout: a path below its folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, layout: _Layout, owner: type) -> Path:
        return layout.folder / self._name


@dataclass(frozen=True)
class RenderLayout:
    """One checkpoint's pictures and figures, e.g. realtime_evaluations/lora_trial_5-000002/."""

    folder: Path

    metrics = Below(METRICS)
    grid = Below("grid.png")
    text_summary = Below("EVALUATION_SUMMARY.txt")  # the goals in words; only a trial's evaluation/ has it

    def sample(self, index: int) -> Path:
        """Return the picture of sample `index`, counted from 0."""
        return self.folder / f"sample_{index}.png"


@dataclass(frozen=True)
class EvaluationsLayout:
    """A folder of evaluated checkpoints: a trial's realtime_evaluations/ or a labelled evaluations/<label>/."""

    folder: Path

    lock = Below(".lock")  # held while this folder's checkpoints are scored
    state = Below(EVALUATION_STATE)
    summary = Below(EVALUATION_SUMMARY)

    def checkpoint(self, checkpoint_name: str) -> RenderLayout:
        """Return where a checkpoint's evaluation lies; `checkpoint_name` is its file name without .safetensors."""
        return RenderLayout(self.folder / checkpoint_name)


@dataclass(frozen=True)
class LabelLayout(EvaluationsLayout):
    """A folder below evaluations/: what was evaluated outside the trials under one label."""

    plan = Below(EVALUATION_PLAN)
    log = Below("evaluation.log")


@dataclass(frozen=True)
class TrialLayout:
    """One trial's folder. A folder that only a trainer wrote to may be called anything that starts with trial_."""

    folder: Path

    params = Below(PARAMS)
    state = Below(TRIAL_STATE)
    trainer_exit = Below(TRAINER_EXIT)
    trainer_lock = Below("trainer.lock")  # held if and only if something of the trainer's process tree lives
    training_log = Below("training.log")
    tensorboard = Below("logs")
    evaluation_log = Below("realtime_evaluation.log")
    training_state = Below("state")  # the native trainer's resume state
    command_files = Below("command")  # what the command trainer's program is started with
    output = Below("output")  # where that program writes

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def number(self) -> int | None:
        """The number people see, counted from 1; None when the folder's name holds none."""
        numbered = re.fullmatch(r"trial_([0-9]+)", self.name)
        return int(numbered[1]) if numbered else None

    @property
    def output_name(self) -> str:
        """The final checkpoint's name without suffix, as passed to the trainer, e.g. "lora_trial_5"."""
        return f"lora_{self.name}" if self.number is None else f"lora_trial_{self.number}"

    def kohya_training_state(self, epoch: int) -> Path:
        """Return kohya's resume state after `epoch`, saved beside the weights of that epoch."""
        return self.folder / f"{self.output_name}-{epoch:06d}-state"

    @property
    def final_checkpoint(self) -> Path:
        return self.folder / f"{self.output_name}.safetensors"

    def intermediate_checkpoint(self, epoch: int) -> Path:
        """Return the weights saved after `epoch`, e.g. lora_trial_5-000002.safetensors."""
        return self.folder / f"{self.output_name}-{epoch:06d}.safetensors"

    def attempt(self, number: int) -> Path:
        """Return where the remains of attempt `number`, counted from 1, are moved before a redo."""
        return self.folder / "attempts" / f"{number:02d}"

    def list_attempts(self) -> list[TrialLayout]:
        """Return the folders of attempts that were set aside, the first one first."""
        return [TrialLayout(path) for path in sorted(_entries(self.folder / "attempts")) if path.is_dir()]

    @property
    def evaluations(self) -> EvaluationsLayout:
        return EvaluationsLayout(self.folder / "realtime_evaluations")

    @property
    def final_evaluation(self) -> RenderLayout:
        return RenderLayout(self.folder / "evaluation")

    def list_training_states(self) -> list[Path]:
        """Return the folders a training can go on from: the native trainer's, or kohya's, the oldest first."""
        kohyas = sorted(path for path in _entries(self.folder) if path.name.endswith("-state") and path.is_dir())
        # The final state has no number and would sort before the numbered ones.
        kohyas.sort(key=lambda path: path.name == f"{self.output_name}-state")
        return [*([self.training_state] if self.training_state.exists() else []), *kohyas]

    def list_checkpoints(self) -> list[Path]:
        """Return the weight files directly in the folder, by name; a missing folder has none.

        Files still under the temporary name of the safetensors library (.tmp*) are left out.
        """
        return sorted(
            path for path in _entries(self.folder) if path.suffix == ".safetensors" and not path.name.startswith(".tmp")
        )


@dataclass(frozen=True)
class ResultsLayout:
    """What the study found, rebuilt after every trial."""

    folder: Path

    best_parameters = Below(BEST_PARAMETERS)
    all_trials = Below(ALL_TRIALS)
    optimization_history = Below("optimization_history.png")
    param_importances = Below("param_importances.png")
    report = Below("report.html")
    config_optimized = Below("config_optimized.py")  # the ready configuration of the dist_reg_weight workload
    analysis = Below("analysis")
    summary_statistics = Below(f"analysis/{SUMMARY_STATISTICS}")
    score_evolution = Below("analysis/score_evolution.png")
    metrics_comparison = Below("analysis/metrics_comparison.png")
    parameter_correlation = Below("analysis/parameter_correlation.png")
    epoch_vs_quality = Below("analysis/epoch_vs_quality.png")
    trial_curves = Below("analysis/epoch_vs_quality_by_trial.png")
    best_training_config_text = Below("analysis/best_training_config.txt")
    best_training_config = Below("analysis/best_training_config.toml")
    pareto_front = Below(f"analysis/{PARETO_FRONT}")
    pareto_front_picture = Below("analysis/pareto_front.png")
    optimization_report = Below("analysis/OPTIMIZATION_REPORT.md")

    def training_config_for(self, trainer: str) -> Path:
        """Return the best configuration in the words of a trainer that is not the study's, e.g. "kohya"."""
        return self.analysis / f"best_training_config_{trainer}.toml"

    def top_trials(self, count: int) -> Path:
        """Return the table of the best `count` trials, e.g. top_10_trials.csv."""
        return self.analysis / f"top_{count}_trials.csv"

    def list_top_trials(self) -> list[int]:
        """Return for how many trials there are tables."""
        names = (re.fullmatch(r"top_([1-9][0-9]*)_trials\.csv", path.name) for path in _entries(self.analysis))
        return sorted(int(name[1]) for name in names if name)


@dataclass(frozen=True)
class StudyLayout:
    """A study folder: `--output-dir` of the optimizer, `--optimization-dir` of the evaluator."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root

    database = Below("optuna_study.db")
    run = Below(RUN)
    optimizer_lock = Below("optimizer.lock")
    optimizer_log = Below("optimization.log")
    watch_script = Below("watch_realtime_evaluation.sh")
    manager_lock = Below("evaluator_manager.lock")
    manager_log = Below("evaluator_manager.log")
    manager_state = Below(MANAGER_STATE)
    reference = Below("reference")  # renders of the base model alone
    baseline = Below(BASELINE)  # copies of the weights passed by --baseline
    best_training = Below("best_training")
    trainer_cache = Below("trainer_cache")  # what a trainer keeps for all trials; made again where it is missing

    @property
    def results(self) -> ResultsLayout:
        return ResultsLayout(self.root / "results")

    def baseline_file(self, name: str) -> Path:
        """Return the study's copy of a baseline."""
        return self.baseline / f"{name}.safetensors"

    def base_render(self, plan_hash: str) -> RenderLayout:
        """Return where the base model's own pictures and figures under one evaluation plan lie."""
        return RenderLayout(self.reference / plan_hash[:16])

    def trial(self, number: int) -> TrialLayout:
        """Return the folder of the trial people call `number`, counted from 1.

        Raises:
            ValueError: `number` is below 1.
        """
        if number < 1:
            raise ValueError(f"trials are counted from 1 but got {number}")
        return TrialLayout(self.root / f"trial_{number:04d}")

    def trial_of_optuna(self, optuna_number: int) -> TrialLayout:
        """Return the folder of Optuna's trial `optuna_number`, counted from 0."""
        return self.trial(optuna_number + 1)

    def list_trials(self) -> list[TrialLayout]:
        """Return every trial_* folder, by number, those without one last; a missing study folder has none."""
        try:
            with os.scandir(self.root) as entries:  # a folder of thousands is listed again and again
                names = [entry.name for entry in entries if entry.name.startswith("trial_") and entry.is_dir()]
        except FileNotFoundError:
            return []
        trials = [TrialLayout(self.root / name) for name in names]
        numbered = [(trial.number, trial.name, trial) for trial in trials]
        numbered.sort(key=lambda known: (known[0] is None, known[0] or 0, known[1]))
        return [trial for _, _, trial in numbered]

    def evaluations(self, label: str) -> LabelLayout:
        """Return the folder of evaluations outside a trial's own checkpoints, e.g. evaluations/baseline/.

        Raises:
            ValueError: `label` does not fit LABEL_PATTERN.
        """
        if not re.fullmatch(LABEL_PATTERN, label):
            raise ValueError(f"an evaluation label must match {LABEL_PATTERN} but got {label!r}")
        return LabelLayout(self.root / "evaluations" / label)

    def requests(self, recipient: Recipient) -> Path:
        return self.root / "requests" / recipient

    def request(self, recipient: Recipient, now: datetime, request_id: str) -> Path:
        """Return a new request's path; names sort by time, which is written in UTC."""
        time = now.astimezone(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        return self.requests(recipient) / f"{time}-{request_id}.json"

    def answer(self, request: Path) -> Path:
        """Return where a request is answered: <id>.done.json beside it.

        A request somebody named without the time, such as stop.json, has its whole name as id.
        """
        request_id = re.sub(r"^[0-9]{8}T[0-9.]+Z-", "", request.name.removesuffix(".json"))
        return request.with_name(f"{request_id}.done.json")

    def list_requests(self, recipient: Recipient) -> list[Path]:
        """Return the requests nobody has consumed yet, by name; a missing folder has none."""
        return sorted(
            path
            for path in _entries(self.requests(recipient))
            if path.suffix == ".json" and not path.name.endswith(".done.json") and not path.name.startswith(".")
        )


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []

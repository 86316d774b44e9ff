"""best_training_config.toml and .txt: the winner's parameters as a trainer reads them, and the command to train them.

The configuration is the one the study's own trainer would plan for the winner, in the folder `best_training/` of the
study. A native study gets a second one in the words of sd-scripts, a kohya study one in those of the native trainer.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optimizer_daemon.analysis.facts import StudyFacts, TrialFacts
from optimizer_daemon.analysis.headline import headline
from optimizer_daemon.analysis.summary import judged, relative
from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.trainers import TRAINERS
from optimizer_daemon.trainers.base import LaunchPlan
from optimizer_daemon.trainers.kohya_config import (
    ARGUMENT_LISTS,
    SCRIPTS,
    StudySettings,
    table_of,
    to_toml,
    training_config,
)
from shared.errors import LabError
from shared.layout import StudyLayout, TrialLayout
from shared.model_folders import family_of
from shared.schemas import Run, Scalar, Trainer, TrialParams

TRAIN_CONFIG = "train_config.toml"

_SHOWN_VARIABLES = ("PYTHONPATH", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_OF_NATIVE_ALONE = frozenset({"latent_cache_dir", "held_out", "state_dir", "resume", "device", "threads"})


@dataclass(frozen=True)
class BestConfig:
    """What is written of the winner's configuration.

    Args:
        text: best_training_config.txt.
        toml: best_training_config.toml; None where the trainer reads no such file.
        others: the same for another trainer, by its name.
        command: the shell line that trains `toml`; None where there is none.
    """

    text: str
    toml: str | None
    others: Mapping[str, str]
    command: str | None


def best_config(facts: StudyFacts) -> BestConfig:
    """Return the files; without a winner the text says so and there is no configuration."""
    if facts.winner is None:
        return BestConfig("".join(f"# {line}\n" for line in headline(facts)), None, {}, None)
    study = StudyLayout(facts.folder.absolute())
    notes: list[str] = []
    toml = command = None
    others: dict[str, str] = {}
    if facts.run is None:
        notes.append("run.json could not be read, so there is no configuration file; the parameters are below")
    else:
        try:
            plan = _plan(facts.run, facts.winner.params, study)
            toml = plan.files.get(TRAIN_CONFIG)
            command = None if toml is None else command_line(plan, study)
            if toml is None:
                notes.append(f"the {facts.run.trainer.name} trainer reads no configuration file of one training")
        except LabError as error:
            notes.append(f"no configuration file could be made: {error}")
        other: Literal["kohya", "native"] | None = {"native": "kohya", "kohya": "native"}.get(facts.run.trainer.name)  # type: ignore[assignment]
        if other is not None:
            try:
                others[other] = (
                    _kohya(facts.run, facts.winner.params, study)
                    if other == "kohya"
                    else _native(facts.run, facts.winner.params, study)
                )
            except LabError as error:
                notes.append(f"no configuration for the {other} trainer could be made: {error}")
    return BestConfig(_text(facts, facts.winner, study, command, others, notes), toml, others, command)


def command_line(plan: LaunchPlan, study: StudyLayout) -> str:
    """Return the shell line that trains best_training_config.toml."""
    planned = str(_folder(study).folder / TRAIN_CONFIG)
    argv = [str(study.results.best_training_config) if word == planned else word for word in plan.argv]
    variables = [f"{name}={plan.env[name]}" for name in _SHOWN_VARIABLES if plan.env.get(name)]
    words = shlex.join([*(["env", *variables] if variables else []), *argv])
    return words if plan.cwd is None else f"cd {shlex.quote(str(plan.cwd))} && {words}"


def _folder(study: StudyLayout) -> TrialLayout:
    return TrialLayout(study.best_training)


def _plan(run: Run, params: TrialParams, study: StudyLayout) -> LaunchPlan:
    return TRAINERS.load(run.trainer.name).plan(params, _folder(study), run)


# ------------------------------------------------------------------------------------------- for the other trainer


def _native(run: Run, params: TrialParams, study: StudyLayout) -> str:
    """A kohya study's winner for the native trainer: what both have; kohya's own switches are left out."""
    options: dict[str, Any] = {}
    for name, value in run.trainer.options.items():
        if name in ARGUMENT_LISTS:
            options[name] = table_of(name, value)
        elif name in TrainConfig.model_fields and name not in _OF_NATIVE_ALONE:
            options[name] = value
    native = run.model_copy(update={"trainer": Trainer(name="native", options=options)})
    return _plan(native, params, study).files[TRAIN_CONFIG]


def _kohya(run: Run, params: TrialParams, study: StudyLayout) -> str:
    """A native study's winner for sd-scripts, which read the user's own data set, the held-out pictures too."""
    base = Path(str(run.base_model))
    family = run.trainer.family or (family_of(base) if base.exists() else None) or "sd15"
    options = {name: value for name, value in run.trainer.options.items() if name not in _OF_NATIVE_ALONE}
    for name in ("gradient_checkpointing", "mixed_precision"):
        if options.get(name) == "auto":
            del options[name]
    if family == "sdxl":
        options.pop("clip_skip", None)
    seed, every = run.settings.get("seed"), run.settings.get("save-every-n-epochs")
    settings = StudySettings(
        family=family,
        base_model=str(base),
        dataset_config=str(run.settings.get("dataset-config")),
        tokenizers="",
        half=run.settings.get("device") != "cpu",
        clip_skip=run.plan.clip_skip if run.plan is not None else 1,
        save_every_n_epochs=every if isinstance(every, int) else 2,
        seed=seed if isinstance(seed, int) else 42,
        options=options,
    )
    dotted = {_dotted(name): value for name, value in params.parameters.items()}
    config = training_config(params.model_copy(update={"parameters": dotted}), _folder(study), settings)
    del config["tokenizer_cache_dir"]  # only a kohya study has prepared them
    return to_toml(config)


def _dotted(name: str) -> str:
    head, mark, tail = name.partition("__")
    return f"{head}.{tail}" if mark and head in ARGUMENT_LISTS else name


# ------------------------------------------------------------------------------------------------------- the text


def _text(
    facts: StudyFacts, best: TrialFacts, study: StudyLayout, command: str | None, others: Mapping[str, str],
    notes: list[str],
) -> str:  # fmt: skip
    lines = [
        f"Best training configuration of study {facts.name}",
        f"written {facts.made.isoformat(timespec='seconds')} from {len(facts.ranking)} complete trials",
        "",
        *headline(facts),
        "",
        *_measured(facts, best),
    ]
    if command is not None:
        lines += ["", "Train it again, or longer after raising max_train_epochs in best_training_config.toml:"]
        lines += [f"  {command}", f"The LoRA goes to {study.best_training}."]
    if "kohya" in others:
        script = SCRIPTS[(facts.run.trainer.family if facts.run is not None else None) or "sd15"]
        config = shlex.quote(str(study.results.training_config_for("kohya")))
        lines += ["", "With kohya's sd-scripts, in their folder and their environment:"]
        lines += [f"  python {script} --config_file {config}"]
    if "native" in others:
        config = shlex.quote(str(study.results.training_config_for("native")))
        lines += ["", "With the native trainer:", f"  python -m optimizer_daemon.lora_training --config {config}"]
    if "kohya" in others and facts.run is not None and facts.run.pictures is not None and facts.run.pictures.held_out:
        count = len(facts.run.pictures.held_out)
        notes.append(f"sd-scripts train on the {count} held-out pictures too, which this study's trials never saw")
    lines += ["", *(f"Note: {note}." for note in notes)] if notes else []
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n" + "".join(_parameter_lines(best))


def _measured(facts: StudyFacts, best: TrialFacts) -> Iterator[str]:
    final = best.final
    if final is None:
        yield "Its measurements could not be read."
        return
    epoch = "unknown" if final.epoch is None else final.epoch
    yield f"Checkpoint {relative(facts, final) or final.name}, epoch {epoch}, seed {best.params.training_seed}"
    for name, score in sorted(final.metrics.scores.items()):
        value = "not computed" if score.value is None else f"{score.value:.4f}"
        yield f"  {name:22} {value}  ({'lower' if score.direction == 'minimise' else 'higher'} is better)"
    for name, metric in final.metrics.metrics.items():
        value = "not measured" if metric.value is None else f"{metric.value:.4f}"
        yield f"  {name:22} {value}" + ("" if metric.std is None else f"  std {metric.std:.4f}")
    for name, checkpoint in judged(facts).items():
        yield f"Goals, {name}:"
        yield from (f"  {goal.line}" for goal in checkpoint.goals)


def _parameter_lines(best: TrialFacts) -> Iterator[str]:
    for name, value in best.parameters.items():
        note = ""
        if name in best.params.derived:
            note = "  # computed from others"
        yield f"{name} = {_shown(value)}{note}\n"
    yield f"seed = {best.params.training_seed}\n"


def _shown(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else repr(value)

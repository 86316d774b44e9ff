"""`optimizer-daemon check`: everything about a study that can be told before it begins, without a GPU and unwritten."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

from optimizer_daemon.disk import estimate, weights_per_rank
from optimizer_daemon.optuna_adapter.models import load_sampler
from optimizer_daemon.optuna_adapter.study import Draw, TuningStudy
from optimizer_daemon.recovery import params_of
from optimizer_daemon.runner import now_local
from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.lint import DRAWS, Lint, lint
from optimizer_daemon.search.load import load_space
from optimizer_daemon.search.objectives import split
from optimizer_daemon.search.space import SearchSpace, format_parameters
from optimizer_daemon.search.stage import EPOCHS, Stage
from optimizer_daemon.settings import OptimizerSettings
from optimizer_daemon.slots import slot_count
from optimizer_daemon.stages import Stages, load_stages
from optimizer_daemon.start_checks import check_inputs
from optimizer_daemon.trainers import TRAINERS
from optimizer_daemon.warm_up import rule_of_study, with_rule
from shared.errors import LabError
from shared.layout import StudyLayout
from shared.schemas import Run
from shared.settings import make_writable_folder

SAMPLES = 10
_DISK_SAMPLES = 1_000
_SIZES = ("network_dim", "save_precision")  # of a trainer's table: what decides how large a checkpoint is


def check(settings: OptimizerSettings) -> dict[str, Any]:
    """Return what was found, JSON-ready; the trainer's command and the disk only where the study's input is named.

    Raises:
        UserError: something of it will not do.
    """
    space = load_space(settings.search_space)
    trainer = TRAINERS.load(settings.trainer_name)
    load_sampler(settings.sampler, len(split(settings.objectives or "")) or 1)
    study = StudyLayout((settings.output_dir or Path("study")).absolute())
    rule, no_rule_because = rule_of_study(settings, study, space)
    space = with_rule(space, rule)
    stages = load_stages(space, settings.stages, settings.max_epochs)
    first = stages.all[0]
    rng = Random(settings.seed)
    samples = [first.space.draw(rng) for _ in range(SAMPLES)]
    found: dict[str, Any] = {
        "search_space": space.name,
        **_linted(lint(replace(space, constraints=first.space.constraints), settings.seed)),
        "no_warm_up_rule": no_rule_because,
        "stages": [_stage(stage, settings) for stage in stages.all if stage.name is not None or stage.spared],
        "samples": [space.complete(values) for values in samples],
        "checklist": _checklist(stages, samples[0], settings),
        "command": None,
        "disk": None,
    }
    if settings.base_model is None and settings.dataset_config is None:
        return found
    run = check_inputs(settings, study, stages, trainer)
    params = params_of(Draw(0, samples[0], None, now_local()), space, settings.seed)
    plan = trainer.plan(params, study.trial(1), run)
    found["command"] = {"argv": list(plan.argv), "files": dict(plan.files)}
    found["disk"] = _disk(settings, run, stages, rng)
    return found


def check_text(found: Mapping[str, Any]) -> str:
    """Return it for people."""
    lines = [
        f"search space {found['search_space']}: {found['feasible_fraction']:.1%} of {DRAWS:,} uniform draws break no "
        "rule; the others are never drawn",
    ]
    certain = "proved" if found["proved"] else f"as far as {found['tried']:,} configurations show"
    lines += [f"rule {rule['number']} can never fire ({certain}): {rule['reason']}" for rule in found["dead_rules"]]
    dead = [f"{known['parameter']} = {known['value']} can never be drawn ({certain})" for known in found["unreachable"]]
    lines += dead or [f"every declared value can be drawn ({certain})"]
    if found["no_warm_up_rule"] is not None:
        lines.append(f"warm-ups are not held to half of a training: {found['no_warm_up_rule']}")
    for stage in found["stages"]:
        lines += ["", *_stage_lines(stage)]
    lines += ["", f"{len(found['samples'])} configurations as they would be drawn", *_table(found["samples"])]
    lines += ["", "the checklist of V2.1"]
    lines += [f"  [{'x' if item['passed'] else ' '}] {item['what']}: {item['found']}" for item in found["checklist"]]
    if found["command"] is None:
        lines += ["", "name --base-model and --dataset-config to see the trainer's command and the disk"]
        return "\n".join(lines)
    lines += ["", "the first one's training", f"  {' '.join(found['command']['argv'])}"]
    for name, text in found["command"]["files"].items():
        lines += [f"  {name}:", *(f"    {line}" for line in text.splitlines())]
    disk = found["disk"]
    sizes = ", ".join(f"{_bytes(size)} at rank {rank}" for rank, size in disk["checkpoint"].items())
    lines += [
        "",
        f"disk: a checkpoint takes {sizes}",
        f"  {_bytes(disk['trial'])} a trial with its pictures, {_bytes(disk['study'])} for {disk['trials']} trials; "
        f"{_bytes(disk['training'])} more for states of what trains; {_bytes(disk['free'])} are free",
    ]
    return "\n".join(lines)


def _stage(stage: Stage, settings: OptimizerSettings) -> dict[str, Any]:
    return {
        "name": stage.name,
        "trials": stage.trials or settings.n_trials,
        "epochs": stage.epochs,
        "around_best": stage.around_best,
        "kept": [asdict(known) for known in stage.spared],
        "dropped": [asdict(known) for known in stage.dropped],
    }


def _stage_lines(stage: Mapping[str, Any]) -> list[str]:
    near = f", most of them near the best {stage['around_best']} of the stages before" if stage["around_best"] else ""
    title = f"stage {stage['name']!r}: {stage['trials']} trials of {stage['epochs']} epochs{near}"
    return [
        *([] if stage["name"] is None else [title]),
        *(f"  {_text(known)} is kept, for every value breaks a rule: {known['reason']}" for known in stage["kept"]),
        *(f"  {_text(known)} is dropped: {known['reason']}" for known in stage["dropped"]),
    ]


def _text(known: Mapping[str, Any]) -> str:
    return f"{known['parameter']} = {known['value']}"


def _linted(found: Lint) -> dict[str, Any]:
    return {
        "feasible_fraction": found.feasible_fraction,
        "dead_rules": [
            {"number": number, "when": rule.when.text, "reason": rule.reason}
            for number, rule in found.dead_rules.items()
        ],
        "unreachable": [{"parameter": name, "value": value} for name, value in found.unreachable],
        "proved": found.proved,
        "tried": found.tried,
    }


def _checklist(stages: Stages, first: Mapping[str, Value], settings: OptimizerSettings) -> list[dict[str, Any]]:
    """The seven lines that a set-up of V2.1 is verified by; a space of one's own may well fail some of them."""
    space = stages.declared
    rate = space.parameters.get("learning_rate")
    epochs = [stage.space.parameters[EPOCHS] for stage in stages.all if EPOCHS in space.parameters]
    least = min((value for known in epochs for value in known.ends if isinstance(value, int)), default=None)
    shown = [line for line in format_parameters(space.complete(first)) if "(ratio:" in line]
    high = _high_alpha_reasons(space)
    written = _writes(settings)
    return [
        _item("the search space and its rules load without errors", True, space.name),
        _item(
            "a trial's parameters show the alpha ratio", bool(shown), shown[0].strip() if shown else "no network_alpha"
        ),
        _item(
            "alpha ratios of 0.75 and more are checked for every stability requirement",
            len(high) >= 4,
            ", ".join(high) or "no rule requires anything of them",
        ),
        _item(
            "a rejected configuration is told why",
            all(rule.reason.strip() for rule in space.constraints) and bool(space.constraints),
            f"{len(space.constraints)} rules, each with its reason",
        ),
        _item("the learning rate's range is 6e-05..0.00012 log", str(rate) == "6e-05..0.00012 log", str(rate)),
        _item("every trial trains 12 epochs or more", least is not None and least >= 12, f"at least {least}"),
        _item("database and logs can be made", written is None, written or "both were, and removed again"),
    ]


def _item(what: str, passed: bool, found: str) -> dict[str, Any]:
    return {"what": what, "passed": passed, "found": found}


def _high_alpha_reasons(space: SearchSpace) -> list[str]:
    """Name what the rules require of a configuration with a high alpha ratio."""
    return [
        name for rule in space.constraints if rule.when.names == {"network_alpha_ratio"} for name, _ in rule.requires
    ]


def _writes(settings: OptimizerSettings) -> str | None:
    """Make a study's database and log where the study will be, and remove them; return what went wrong."""
    folder = settings.output_dir
    try:
        with tempfile.TemporaryDirectory(dir=_existing_parent(folder), prefix=".lora-tuner-check-") as made:
            make_writable_folder("--output-dir", Path(made))
            space = load_space(settings.search_space)
            study = StudyLayout(Path(made))
            TuningStudy.open("check", f"sqlite:///{study.database}", space, seed=0, folder_id="check").close()
            study.optimizer_log.write_text("check\n")
    except (OSError, LabError) as error:
        return str(error)
    return None


def _existing_parent(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def _disk(settings: OptimizerSettings, run: Run, stages: Stages, rng: Random) -> dict[str, Any]:
    assert run.plan is not None and settings.base_model is not None, "checked before"
    # What the trainer's table says for every trial; a drawn parameter wins, as in the training.
    table = {name: run.trainer.options[name] for name in _SIZES if name in run.trainer.options}
    count = sum(stage.trials or settings.n_trials for stage in stages.all)
    trials = [
        stage.declared.complete(stage.space.draw(rng))
        for stage in stages.all
        for _ in range(math.ceil(_DISK_SAMPLES * (stage.trials or settings.n_trials) / count))
    ]
    found = estimate(
        weights_per_rank(settings.base_model),
        [{**table, **parameters} for parameters in trials],
        settings.save_every_n_epochs,
        count,
        run.plan.num_samples,
        run.plan.width * run.plan.height,
        settings.trainer_name,
    )
    free = shutil.disk_usage(_existing_parent(settings.output_dir) or Path.cwd()).free
    return {
        "checkpoint": found.checkpoint,
        "trial": found.trial,
        "study": found.study,
        "training": found.training * slot_count(settings),
        "trials": count,
        "free": free,
    }


def _table(samples: Sequence[Mapping[str, Value]]) -> list[str]:
    names = list(samples[0])
    rows = [names, *([_shown(sample[name]) for name in names] for sample in samples)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(names))]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _shown(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.0f} kB"

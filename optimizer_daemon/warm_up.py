"""The rule that depends on the data set: a warm-up takes at most half of a training's optimizer steps.

It is made once, when a study begins, and kept in its run.json, so that its draws never change.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optimizer_daemon.search.constraints import Constraint, ConstraintText
from optimizer_daemon.search.expressions import Kind
from optimizer_daemon.search.space import SearchSpace
from optimizer_daemon.search.stage import EPOCHS
from optimizer_daemon.settings import OptimizerSettings
from shared.files import read_kept
from shared.held_out import image_files
from shared.layout import StudyLayout
from shared.schemas import Run, WarmUpRule

WARM_UP = "lr_warmup_steps"
ACCUMULATION = "gradient_accumulation_steps"
BATCH = "train_batch_size"
_DEFAULT_BATCHES = {"native": 1, "kohya": 1}
"""By trainer: the batch size of data sets that set none."""


class NotCountedError(Exception):
    """How many steps a training has cannot be told; the message says why."""


@dataclass(frozen=True)
class _Pictures:
    """Pictures of an epoch, repeats included, of one [[datasets]] table; `batch` is None where the command sets it."""

    count: int
    batch: int | None


def rule_of_study(
    settings: OptimizerSettings, study: StudyLayout, space: SearchSpace
) -> tuple[WarmUpRule | None, str | None]:
    """Return the rule that a study keeps to, of one that has not begun the one it will have, and why there is none.

    Raises:
        UnreadableFileError: run.json is damaged.
    """
    try:
        return read_kept(study.run, Run).warm_up_rule, None
    except FileNotFoundError:
        pass
    if settings.dataset_config is None:
        return None, None
    try:
        return warm_up_rule(space, settings.dataset_config, settings.trainer_name, settings.trainer_options), None
    except NotCountedError as error:
        return None, str(error)


def warm_up_rule(
    space: SearchSpace, dataset_config: Path, trainer: str, options: Mapping[str, Any]
) -> WarmUpRule | None:
    """Return the rule of a space on a data set; None where the space draws no warm-up.

    Buckets, which make a few batches more, and held-out pictures are not looked at.

    Args:
        dataset_config: the data set's TOML.
        trainer: its name.
        options: the study file's table of the trainer.
    Raises:
        NotCountedError: the steps of a training cannot be told.
    """
    if WARM_UP not in space.parameters or space.parameters[WARM_UP].kind != "number":
        return None
    known = {**options, **dict.fromkeys([*space.parameters, *space.derived])}
    if EPOCHS not in known:
        raise NotCountedError(f"neither the search space nor the trainer's table has {EPOCHS}")
    pictures = list(_pictures(dataset_config, options))
    if any(part.batch is None for part in pictures) and BATCH not in known and trainer not in _DEFAULT_BATCHES:
        raise NotCountedError(f"{dataset_config} sets no batch_size")
    defaults = {ACCUMULATION: 1, BATCH: _DEFAULT_BATCHES.get(trainer, 1), **options}

    def term(name: str) -> str:
        return name if name in space.parameters or name in space.derived else str(defaults[name])

    fixed = sum(math.ceil(part.count / part.batch) for part in pictures if part.batch is not None)
    free = sum(part.count for part in pictures if part.batch is None)
    batches = " + ".join([str(fixed)] * (fixed > 0) + [_divided(str(free), term(BATCH))] * (free > 0))
    steps = f"{_divided(f'({batches})', term(ACCUMULATION))} * {term(EPOCHS)}"
    shown = f"{fixed + free} {'batches' if free == 0 else 'pictures' if fixed == 0 else 'batches or pictures'}"
    return WarmUpRule(
        when=f"2 * {WARM_UP} > {steps}",
        reason=f"A warm-up takes at most half of all optimizer steps (here of {shown} an epoch)",
    )


def with_rule(space: SearchSpace, rule: WarmUpRule | None) -> SearchSpace:
    """Return a space with the rule behind its own."""
    if rule is None:
        return space
    kinds: dict[str, Kind] = {name: parameter.kind for name, parameter in space.parameters.items()}
    kinds |= {name: expression.kind for name, expression in space.derived.items()}
    text = ConstraintText(when=rule.when, reason=rule.reason)
    constraint = Constraint.parse(text, kinds, "run.json: warm_up_rule")
    return replace(space, constraints=(*space.constraints, replace(constraint, spares_least_of=WARM_UP)))


def _divided(number: str, by: str) -> str:
    """Return a division that rounds up, in the language of the rules."""
    return number if by == "1" else f"-(-{number} // {by})"


def _pictures(dataset_config: Path, options: Mapping[str, Any]) -> Iterator[_Pictures]:
    try:
        document = tomllib.loads(dataset_config.read_text(encoding="utf-8"))
        if not document.get("datasets"):
            raise NotCountedError(f"{dataset_config} has no [[datasets]] of kohya's")
        for dataset in document["datasets"]:
            tables = {**options, **document.get("general", {}), **dataset}
            yield _Pictures(_count(dataset_config, tables), _batch_of(document, dataset))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NotCountedError(f"{dataset_config} cannot be read ({error})") from error
    except (AttributeError, TypeError, KeyError, ValueError) as error:  # a list where a table belongs, and the like
        raise NotCountedError(f"{dataset_config} is no data set of kohya's ({error})") from error


def _batch_of(document: Mapping[str, Any], dataset: Mapping[str, Any]) -> int | None:
    batch = {**document.get("general", {}), **dataset}.get("batch_size")
    return None if batch is None else max(1, int(batch))


def _count(dataset_config: Path, tables: Mapping[str, Any]) -> int:
    """Return the pictures of an epoch; regularisation pictures are as many again, as in sd-scripts."""
    trained, regularised = 0, False
    for subset in tables["subsets"]:
        settings = {**tables, **subset}
        folder = dataset_config.absolute().parent / str(settings["image_dir"])
        count = len(image_files(folder))
        if settings.get("is_reg"):
            regularised = regularised or count > 0
        else:
            left = math.ceil(count * (1 - settings.get("validation_split", 0)))
            trained += left * int(settings.get("num_repeats", 1))
    return trained * (2 if regularised else 1)

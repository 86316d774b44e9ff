"""Everything that can be told about a study's input before its first trial, and before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from optimizer_daemon.optuna_adapter.study import Draw
from optimizer_daemon.recovery import params_of
from optimizer_daemon.runner import now_local
from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.space import SearchSpace
from optimizer_daemon.settings import OptimizerSettings
from optimizer_daemon.study_file import find_run, require_inputs, trainer_of
from optimizer_daemon.trainers.base import ChecksInput, TrainerInput, TrainerPlugin, holds_out
from shared.errors import SettingsError, UserError
from shared.layout import StudyLayout
from shared.schemas import Run


def check_inputs(
    settings: OptimizerSettings,
    study: StudyLayout,
    space: SearchSpace,
    trainer: TrainerPlugin,
    pinned: Mapping[str, Value],
) -> Run:
    """Return what run.json has to say, once everything the settings name has been looked at.

    Args:
        pinned: parameters that have this value in this run.
    Raises:
        UserError: something of it will not do; nothing was written.
        ContractError: run.json is damaged.
    """
    version = trainer.check_input(_given(settings)) if isinstance(trainer, ChecksInput) else None
    run = find_run(settings, study, now_local(), trainer_version=version)
    if run.pictures is not None and run.pictures.held_out and not holds_out(trainer):
        raise SettingsError(
            "--trainer",
            settings.trainer_name,
            f"this study measures likeness to {len(run.pictures.held_out)} pictures that must not be trained on, and "
            "this trainer does not promise to leave them out (holds_out = True); take one that does, or leave the "
            "likeness metrics and scorings that need them out",
        )
    _rehearse(settings, study, space, trainer, pinned, run)
    return run


def _given(settings: OptimizerSettings) -> TrainerInput:
    base_model, dataset_config = require_inputs(settings)
    return TrainerInput(base_model, dataset_config, settings.model_family, trainer_of(settings), settings.device)


def _rehearse(
    settings: OptimizerSettings,
    study: StudyLayout,
    space: SearchSpace,
    trainer: TrainerPlugin,
    pinned: Mapping[str, Value],
    run: Run,
) -> None:
    """Plan a training for every declared choice: one that cannot be trained would only show in the trial it is drawn
    for, maybe days later.
    """
    for values in space.samples(Random(settings.seed)):
        draw = Draw(0, {**values, **pinned}, None, now_local())
        try:
            trainer.plan(params_of(draw, space, settings.seed), study.trial(1), run)
        except SettingsError:
            raise  # about a flag, which it names
        except UserError as error:
            raise UserError(f"--search-space {settings.search_space}: {error}") from error

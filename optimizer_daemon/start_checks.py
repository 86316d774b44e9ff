"""Everything that can be told about a study's input before its first trial, and before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from optimizer_daemon.baselines import read_baselines, with_baselines, without_lost
from optimizer_daemon.optuna_adapter.study import Draw
from optimizer_daemon.recovery import params_of
from optimizer_daemon.runner import now_local
from optimizer_daemon.search.objectives import objectives_of
from optimizer_daemon.settings import OptimizerSettings
from optimizer_daemon.stages import Stages
from optimizer_daemon.study_file import find_run, require_inputs, trainer_of
from optimizer_daemon.trainers.base import ChecksInput, SkipsClipLayers, TrainerInput, TrainerPlugin, holds_out
from shared.errors import SettingsError, UserError
from shared.layout import StudyLayout
from shared.schemas import Run, TrialParams


def check_inputs(
    settings: OptimizerSettings,
    study: StudyLayout,
    stages: Stages,
    trainer: TrainerPlugin,
) -> Run:
    """Return what run.json has to say, once everything the settings name has been looked at.

    Raises:
        UserError: something of it will not do; nothing was written.
        ContractError: run.json is damaged.
    """
    last = stages.all[-1].trials or settings.n_trials
    if settings.finalists is not None and settings.finalists >= last:
        raise SettingsError(
            "--finalists",
            settings.finalists,
            f"these are the last of {f'--n-trials {last}' if settings.stages is None else f'{last} trials'}; leave "
            "one or more to the search",
        )
    trials = _trials(settings, stages)
    given = _given(settings, trials)
    version = trainer.check_input(given) if isinstance(trainer, ChecksInput) else None
    clip_skip = trainer.clip_skip(given) if isinstance(trainer, SkipsClipLayers) else 1
    run = find_run(settings, study, now_local(), trainer_version=version, clip_skip=clip_skip)
    assert run.plan is not None, "the evaluator scores this workload"
    if objectives_of(settings.objectives, run.plan) and settings.finalists:
        raise SettingsError(
            "--finalists",
            settings.finalists,
            "they repeat the best by one score, and --objectives has a front of trade-offs; leave one of the two out",
        )
    assert settings.base_model is not None, "it was required above"
    entries = without_lost(settings.baseline, study, run)
    run = with_baselines(run, read_baselines(entries, settings.base_model))
    if run.pictures is not None and run.pictures.held_out and not holds_out(trainer):
        raise SettingsError(
            "--trainer",
            settings.trainer_name,
            f"this study measures likeness to {len(run.pictures.held_out)} pictures that must not be trained on, and "
            "this trainer does not promise to leave them out (holds_out = True); take one that does, or leave the "
            "likeness metrics and scorings that need them out",
        )
    _rehearse(settings, study, trainer, trials, run)
    return run


def _given(settings: OptimizerSettings, trials: tuple[TrialParams, ...]) -> TrainerInput:
    base_model, dataset_config = require_inputs(settings)
    trainer = trainer_of(settings)
    return TrainerInput(base_model, dataset_config, settings.model_family, trainer, settings.device, trials)


def _trials(settings: OptimizerSettings, stages: Stages) -> tuple[TrialParams, ...]:
    """Return a trial for every choice of every stage."""
    draws = (
        Draw(0, values, stage.name, now_local())
        for stage in stages.all
        for values in stage.space.samples(Random(settings.seed))
    )
    return tuple(params_of(draw, stages.declared, settings.seed) for draw in draws)


def _rehearse(
    settings: OptimizerSettings, study: StudyLayout, trainer: TrainerPlugin, trials: Iterable[TrialParams], run: Run
) -> None:
    """Plan the training of each trial: one that cannot be trained would only show in the trial it is drawn for, maybe
    days later.
    """
    for params in trials:
        try:
            trainer.plan(params, study.trial(1), run)
        except SettingsError:
            raise  # about a flag, which it names
        except UserError as error:
            raise UserError(f"--search-space {settings.search_space}: {error}") from error

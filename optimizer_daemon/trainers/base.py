"""What a trainer is: a pure function from a trial's parameters to a command, and a reader of what that command says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from shared.layout import StudyLayout, TrialLayout
from shared.preloaded import Preload
from shared.progress_bar import Progress
from shared.schemas import Run, Trainer, TrainerExit, TrialParams


@dataclass(frozen=True)
class LaunchPlan:
    """Everything a runner needs to start one training, and to start it again from its saved state.

    Args:
        argv: the command, program first.
        env: variables on top of the daemon's own environment.
        files: what to write before the start, path relative to the trial's folder -> text.
        cwd: where the command runs.
        patience_s: seconds it may go on without progress before it counts as hung; None for as long as any trainer.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    patience_s: float | None = None


@dataclass(frozen=True)
class ResumePoint:
    """A saved state that a training can go on from.

    Args:
        state: the folder that holds it.
        epoch: epochs that are done; None where only the state itself knows.
    """

    state: Path
    epoch: int | None = None


@dataclass(frozen=True)
class TrainerInput:
    """What a study is about to train on, and with what; not yet looked at.

    Args:
        base_model: as the user named it.
        dataset_config: kohya's dataset TOML.
        family: of the base model, where the user said it.
        trainer: who trains; its options are the study file's [trainer.<name>] table.
        device: auto, cpu, cuda or cuda:N.
        trials: trials as they may be drawn, which together show every choice of the search space.
    """

    base_model: Path
    dataset_config: Path
    family: str | None
    trainer: Trainer
    device: str
    trials: tuple[TrialParams, ...] = ()


class TrainerPlugin(Protocol):
    """One way to train. A trainer never runs anything itself."""

    def plan(
        self,
        params: TrialParams,
        trial: TrialLayout,
        run: Run,
        gpu: str | None = None,
        resume: ResumePoint | None = None,
    ) -> LaunchPlan:
        """Return how to train `params`; equal arguments give equal plans, and no file is looked at.

        Args:
            gpu: all that the training may see, as its CUDA_VISIBLE_DEVICES: the UUID of the leased card, so that inside
                it is the first and only one; "" for none; None, before anything is leased, leaves the variable alone.
            resume: where to go on from, as `resume_point` found it; None trains from the start.
        Raises:
            UserError: a parameter or setting is nothing this trainer can train with.
        """
        ...

    def resume_point(self, trial: TrialLayout) -> ResumePoint | None:
        """Return the newest whole state in the trial's folder; None when there is none."""
        ...

    def parse_progress(self, line: str) -> Progress | None:
        """Read one line of the training's output, with or without carriage returns; None when it tells nothing."""
        ...

    def diagnose(self, record: TrainerExit | None, last_lines: Sequence[str]) -> str:
        """Say in one sentence why a training failed and what helps; its last lines are quoted behind it anyway.

        Args:
            record: how it ended; None when its supervisor was killed.
            last_lines: the end of training.log.
        """
        ...


@runtime_checkable
class ChecksInput(Protocol):
    """What a trainer may offer besides: a look at all that its trainings will read, before the study begins."""

    def check_input(self, given: TrainerInput) -> str | None:
        """Look at the trainer's own program, the base model, the data set and each of its pictures.

        Returns:
            The version of the program that trains; None where it has none.
        Raises:
            UserError: something of it cannot be trained with.
        """
        ...


@runtime_checkable
class Prepares(Protocol):
    """What a trainer may offer besides: work that is done once for all trials, at each start of the daemon."""

    def prepare(self, run: Run, study: StudyLayout) -> None:
        """Make what the plans of all trials refer to, where it is not there yet.

        Raises:
            LabError: it could not be made.
        """
        ...


@runtime_checkable
class Preloads(Protocol):
    """What a trainer may offer besides: its command is `python -m MODULE ...` in our own Python, quick to fork."""

    def preload(self, run: Run) -> Preload | None:
        """Return what the trainings of all trials import; None when they run in another Python."""
        ...


@runtime_checkable
class Tidies(Protocol):
    """What a trainer may offer besides: a look, before each start of a training, at what a killed one left behind."""

    def tidy(self, trial: TrialLayout, run: Run) -> None:
        """Remove what was left half written; trainings of the study that run meanwhile, if any, have begun to step
        where the trainer `StartsApart`.

        Raises:
            LabError: it could not be removed.
        """
        ...


@runtime_checkable
class StartsApart(Protocol):
    """What a trainer may say besides: before its first step a training writes files that others of the study use too,
    such as latents beside the pictures, and not so that two may do it at once. Then none starts before every running
    one has taken a step.
    """

    starts_apart: bool


@runtime_checkable
class SkipsClipLayers(Protocol):
    """What a trainer may offer besides: which layer of the text encoder it trains with, and is to be rendered with."""

    def clip_skip(self, given: TrainerInput) -> int:
        """Return the layer, counted from the end; 1, the last one, is that of trainers that do not say."""
        ...


@runtime_checkable
class HoldsOut(Protocol):
    """What a trainer may offer besides: it never trains on a picture whose SHA-256 is among `run.pictures.held_out`.

    Without it no study may measure likeness: that to pictures that were trained on rewards copying.
    """

    holds_out: bool


def starts_apart(trainer: object) -> bool:
    """Tell whether trainings of a trainer may not prepare side by side."""
    return isinstance(trainer, StartsApart) and trainer.starts_apart is True


def holds_out(trainer: object) -> bool:
    """Tell whether a trainer leaves the held-out pictures out."""
    return isinstance(trainer, HoldsOut) and trainer.holds_out is True

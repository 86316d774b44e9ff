"""The stages of a run: from `--stages` or `--max-epochs`, which one is due, and what people are told of them."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optimizer_daemon.search.load import load_space, read_text
from optimizer_daemon.search.space import SearchSpace
from optimizer_daemon.search.stage import EPOCHS, Stage
from optimizer_daemon.search.stages_file import parse_stages
from optimizer_daemon.warm_up import with_rule
from shared.errors import UserError
from shared.logs import log_change
from shared.schemas import Run, StageOfRun

Finished = Counter[str | None]
"""How many trials are complete or pruned, by stage."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stages:
    """The stages of a run in their order; a run without any has one that takes in the whole space.

    Args:
        all: in the order they run.
        file: where they are declared; None where the settings say it all.
    """

    all: tuple[Stage, ...]
    file: Path | None = None

    @property
    def declared(self) -> SearchSpace:
        """The study's search space."""
        return self.all[0].declared

    def current(self, finished: Finished) -> Stage:
        """Return the first stage with trials left to run, the last one where there is none."""
        return next((stage for stage in self.all if finished[stage.name] < (stage.trials or 1)), self.all[-1])

    def described(self, stage: Stage, finished: Finished, n_trials: int) -> StageOfRun | None:
        """Return what run.json says of a stage; None for a run without any.

        Args:
            finished: of the study.
            n_trials: the setting, which counts where the stage does not say it.
        """
        if stage.name is None:
            return None
        wanted = {known.name: max(known.trials or n_trials, finished[known.name]) for known in self.all}
        return StageOfRun(
            name=stage.name,
            number=self._place(stage) + 1,
            of=len(self.all),
            trials=stage.trials or n_trials,
            epochs=stage.epochs,
            study_trials=sum({**finished, **wanted}.values()),
        )

    def trials_after(self, stage: Stage) -> int:
        """Return how many trials the stages after this one want."""
        return sum(later.trials or 0 for later in self.all[self._place(stage) + 1 :])

    def how_far(self, finished: Finished, n_trials: int) -> list[str]:
        """Return what is said at the end of a run: what is finished of each stage, and how to get more."""
        lines = []
        for stage in self.all:
            of_stage = "" if stage.name is None else f" of {stage.title}"
            lines.append(f"{finished[stage.name]} of {stage.trials or n_trials} trials{of_stage} are finished.")
        if all(finished[stage.name] >= (stage.trials or n_trials) for stage in self.all):
            lines.append(
                f"For more, pass a larger number, such as --n-trials {finished[self.all[0].name] + 10}."
                if self.file is None
                else f"For more, raise the trials of a stage in {self.file}, or add a stage."
            )
        return lines

    def _place(self, stage: Stage) -> int:
        return next(place for place, known in enumerate(self.all) if known is stage)

    def is_last(self, stage: Stage) -> bool:
        """Tell whether no stage comes after this one."""
        return stage is self.all[-1]


def load_stages(space: SearchSpace, file: Path | None, max_epochs: int | None) -> Stages:
    """Return the stages of a run.

    Args:
        space: the study's search space.
        file: `--stages`.
        max_epochs: `--max-epochs`.
    Raises:
        UserError: the file will not do, or a stage has nothing to draw from.
    """
    if file is not None:
        return Stages(
            parse_stages(read_text(file, "stages file", "give a TOML file, see docs/stages.md"), str(file), space), file
        )
    if max_epochs is None or EPOCHS not in space.parameters:
        return Stages((Stage.of(space, name=None if max_epochs is None else f"{max_epochs} epochs"),))
    try:
        return Stages((Stage.of(space, name=f"{max_epochs} epochs", pinned={EPOCHS: max_epochs}),))
    except UserError as error:
        raise UserError(f"--max-epochs {max_epochs}: {error}") from error


def stages_of_run(run: Run) -> Stages:
    """Return the stages of a study's last run, for who has run.json only."""
    name, file, epochs = (run.settings.get(flag) for flag in ("search-space", "stages", "max-epochs"))
    return load_stages(
        with_rule(load_space(str(name)), run.warm_up_rule),
        Path(file) if isinstance(file, str) else None,
        epochs if isinstance(epochs, int) else None,
    )


def announce(stages: Stages) -> None:
    """Log what each stage cannot draw, and what it draws against a rule because nothing else is left."""
    for stage in stages.all:
        where: dict[str, Any] = {} if stage.name is None else {"stage": stage.name}
        for event, values in (("smallest value kept", stage.spared), ("value dropped", stage.dropped)):
            for known in values:
                log_change(_log, event, **where, **asdict(known))

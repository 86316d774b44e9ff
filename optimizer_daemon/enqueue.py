"""A configuration somebody asks for: completed, checked against the search space, and put in line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

from optimizer_daemon.database import Database
from optimizer_daemon.optuna_adapter.study import Draw, TuningStudy
from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.load import load_space
from optimizer_daemon.search.objectives import objectives_of_run
from optimizer_daemon.search.parameters import CategoricalParameter, Parameter
from optimizer_daemon.search.space import SearchSpace
from shared.errors import UserError
from shared.layout import StudyLayout
from shared.schemas import Run
from shared.schemas.requests import Enqueue

EPOCHS = "max_train_epochs"


def pinned_values(space: SearchSpace, max_epochs: int | None) -> dict[str, Value]:
    """Return the parameters that a run's settings fix to one value."""
    return {} if max_epochs is None or EPOCHS not in space.parameters else {EPOCHS: max_epochs}


def stage_of(max_epochs: int | None) -> str | None:
    """Return the stage a run's draws are recorded under."""
    return None if max_epochs is None else f"{max_epochs} epochs"


@dataclass(frozen=True)
class Queue:
    """The configurations that are run before the sampler draws again.

    Args:
        study: where they wait.
        space: what they must fit.
        pinned: parameters that have one value in this run.
        seed: the study's seed.
    """

    study: TuningStudy
    space: SearchSpace
    pinned: Mapping[str, Value]
    seed: int

    @classmethod
    def of_stopped_study(cls, run: Run, layout: StudyLayout) -> Queue:
        """Open the queue of a study that no daemon runs, under the settings of its last run."""
        name, seed, epochs = (run.settings.get(flag) for flag in ("search-space", "seed", "max-epochs"))
        assert isinstance(name, str) and isinstance(seed, int), "run.json holds every setting"
        max_epochs = epochs if isinstance(epochs, int) else None
        space = load_space(name)
        pinned = pinned_values(space, max_epochs)
        database = Database.of(run, layout)
        study = TuningStudy.open(
            run.study_name,
            database.url,
            space,
            seed=seed,
            folder_id=run.folder_id,
            pinned=pinned,
            stage=stage_of(max_epochs),
            copy=database.copy,
            objectives=objectives_of_run(run),
        )
        return cls(study, space, pinned, seed)

    def add(self, command: Enqueue, identity: str) -> int:
        """Put a configuration in line and return its trial's number, counted from 1; harmless when repeated.

        Args:
            identity: of the request, so that a repeated one gets no second trial.

        Raises:
            UserError: it does not fit the search space; the message names everything that is wrong.
        """
        repeated = None if command.finalist_of is None else self._complete_trial(command.finalist_of)
        asked = dict(command.parameters)
        if repeated is not None:
            asked = self._as_in(repeated, asked)
        values = self._completed(asked, Random(f"{self.seed}/{identity}"))
        of = None if repeated is None else repeated.number
        return self.study.enqueue(values, identity, command.training_seed, of) + 1

    def _complete_trial(self, trial: int) -> Draw:
        """Return the draw of a trial that has a score, by its number counted from 1."""
        complete = (ended.draw for ended in self.study.ended() if ended.value is not None)
        found = next((draw for draw in complete if draw.number == trial - 1), None)
        if found is None:
            raise UserError(f"finalist_of: there is no complete trial {trial}; a finalist repeats one that has a score")
        return found

    def _as_in(self, draw: Draw, asked: Mapping[str, Value]) -> dict[str, Value]:
        """Return the values of a draw; those that were asked for besides have to be the same."""
        complete = self.space.complete(draw.values)
        if other := [f"{name} {value}" for name, value in asked.items() if complete.get(name) != value]:
            raise UserError(
                f"finalist_of: trial {draw.number + 1} has other values than {', '.join(other)}; leave them out, or "
                "finalist_of"
            )
        return dict(draw.values)

    def _completed(self, asked: Mapping[str, Value], rng: Random) -> dict[str, Value]:
        """Return a value for each declared parameter; those not asked for are drawn around the others."""
        space = _fixed_at(self.space, self.pinned)
        given = {**self.pinned, **asked}
        known = {name: space.parameters[name].snap(value) for name, value in given.items() if name in space.parameters}
        problems = [
            f"{name}: {problem}" for name, value in known.items() if (problem := space.parameters[name].problem(value))
        ]
        if unknown := [name for name in given if name not in known and name not in space.derived]:
            names = ", ".join(space.parameters)
            problems.append(f"there is no parameter {', '.join(unknown)}; the parameters are {names}")
        if not problems:
            complete = known.keys() == space.parameters.keys()
            values = known if complete else _fixed_at(space, known).draw(rng)
            problems = space.validate({**given, **values})
        if problems:
            raise UserError("; ".join(problems))
        return values


def _fixed_at(space: SearchSpace, values: Mapping[str, Value]) -> SearchSpace:
    """Return the space in which some parameters have one value."""
    choices: dict[str, Parameter] = {
        name: CategoricalParameter(type="categorical", choices=(value,)) for name, value in values.items()
    }
    start_up = space.start_up
    return replace(
        space,
        parameters={**space.parameters, **choices},
        start_up=None if start_up is None or start_up.parameter in values else start_up,
    )

"""A configuration somebody asks for: completed, checked against the search space, and put in line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from optimizer_daemon.database import Database
from optimizer_daemon.optuna_adapter.study import Draw, TuningStudy
from optimizer_daemon.search.expressions import Value
from optimizer_daemon.search.objectives import objectives_of_run
from optimizer_daemon.stages import stages_of_run
from optimizer_daemon.trial_table import TrialTable
from shared.errors import UserError
from shared.layout import StudyLayout
from shared.schemas import Run
from shared.schemas.requests import Enqueue


@dataclass(frozen=True)
class Queue:
    """The configurations that are run before the sampler draws again.

    Args:
        study: where they wait; its stage says what they must fit.
        seed: the study's seed.
    """

    study: TuningStudy
    seed: int

    @classmethod
    def of_stopped_study(cls, run: Run, layout: StudyLayout) -> Queue:
        """Open the queue of a study that no daemon runs, in the stage that its last run came to."""
        seed = run.settings.get("seed")
        assert isinstance(seed, int), "run.json holds every setting"
        table = TrialTable(layout)
        table.refresh()
        stage = stages_of_run(run).current(table.finished_by_stage)
        database = Database.of(run, layout)
        study = TuningStudy.open(
            run.study_name,
            database.url,
            stage.declared,
            seed=seed,
            folder_id=run.folder_id,
            stage=stage,
            copy=database.copy,
            objectives=objectives_of_run(run),
        )
        return cls(study, seed)

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
        complete = self.study.stage.declared.complete(draw.values)
        if other := [f"{name} {value}" for name, value in asked.items() if complete.get(name) != value]:
            raise UserError(
                f"finalist_of: trial {draw.number + 1} has other values than {', '.join(other)}; leave them out, or "
                "finalist_of"
            )
        return dict(draw.values)

    def _completed(self, asked: Mapping[str, Value], rng: Random) -> dict[str, Value]:
        """Return a value for each declared parameter; those not asked for are drawn around the others.

        Anything that is declared may be asked for; what is drawn around it is of the stage.
        """
        stage = self.study.stage
        space = stage.askable
        given = {**stage.pinned, **asked}
        known = {name: space.parameters[name].snap(value) for name, value in given.items() if name in space.parameters}
        problems = [
            f"{name}: {problem}" for name, value in known.items() if (problem := space.parameters[name].problem(value))
        ]
        if unknown := [name for name in given if name not in known and name not in space.derived]:
            names = ", ".join(space.parameters)
            problems.append(f"there is no parameter {', '.join(unknown)}; the parameters are {names}")
        if not problems:
            complete = known.keys() == space.parameters.keys()
            values = known if complete else stage.fixed_at(known).draw(rng)
            problems = space.validate({**given, **values})
        if problems:
            raise UserError("; ".join(problems))
        return values

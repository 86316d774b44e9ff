"""Reads a study folder into `StudyFacts`: nothing is written, and what is missing or damaged is named, never fatal."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import TypeVar

from optimizer_daemon.analysis.facts import (
    BASE_MODEL,
    CheckpointFacts,
    QuarantinedFacts,
    Standing,
    StudyFacts,
    Timings,
    TrialFacts,
)
from optimizer_daemon.analysis.standing import against, best_checkpoint, overtaken, rates, standing
from optimizer_daemon.baselines import baseline_results
from optimizer_daemon.goals import goals_against
from optimizer_daemon.results import DIRECTION, contenders, ranked, winner
from optimizer_daemon.search.objectives import objectives_of_run
from optimizer_daemon.trial_table import trial_result
from shared.errors import LabError, UserError
from shared.files import read_model
from shared.layout import BASELINE, EvaluationsLayout, RenderLayout, StudyLayout, TrialLayout
from shared.schemas import (
    TERMINAL_STATES,
    AllTrials,
    Answer,
    CheckpointRecord,
    EvaluationState,
    Metrics,
    Run,
    TrainerExit,
    TrialParams,
    TrialState,
    VersionedFile,
)
from shared.scoring_presets import COMBINED_SCORE

F = TypeVar("F", bound=VersionedFile)


def gather(study: StudyLayout, now: datetime) -> StudyFacts:
    """Return what the study's files tell.

    Raises:
        UserError: there is no study in the folder.
    """
    return _Gatherer(study).gather(now)


class _Gatherer:
    """Reads one study, and notes what cannot be read."""

    def __init__(self, study: StudyLayout) -> None:
        self._study = study
        self._problems: list[str] = []
        self._run = self._read(study.run, Run, needed=True)
        if self._run is None and not study.run.exists() and not study.list_trials():
            raise UserError(f"{study.root} holds no study (no run.json); name the optimizer's --output-dir")
        plan = self._run.plan if self._run is not None else None
        self._plan = plan
        self._objective = plan.scoring.objective if plan is not None else self._objective_of_results()

    def gather(self, now: datetime) -> StudyFacts:
        trials = tuple(trial for layout in self._study.list_trials() if (trial := self._trial(layout)) is not None)
        name = self._run.study_name if self._run is not None else self._study.root.name
        results = AllTrials(
            study_name=name,
            updated=now,
            objective=self._objective,
            direction=DIRECTION,
            objectives=objectives_of_run(self._run) if self._run is not None else (),
            baselines=baseline_results(self._study, self._run) if self._run is not None else (),
            trials=tuple(trial_result(trial.params, trial.state) for trial in trials),
        )
        by_number = {trial.number: trial for trial in trials}
        ranking = tuple(by_number[result.trial] for result in ranked(results))
        best = winner(results)
        first = None if best is None else by_number[best.trial]
        base = self._base()
        baselines = self._baselines()
        rivals = {**({BASE_MODEL: base} if base is not None else {}), **baselines}
        return StudyFacts(
            folder=self._study.root,
            name=name,
            run=self._run,
            objective=self._objective,
            made=now,
            trials=trials,
            results=results,
            ranking=ranking,
            winner=first,
            standing=None if first is None else self._standing(first, ranking, results),
            overtaken=overtaken(ranking, self._plan),
            best_checkpoint=best_checkpoint(trials),
            base=base,
            baselines=baselines,
            against=against(first, rivals, self._plan),
            rates=rates(trials, base, self._refused()),
            timings=_timings(trials),
            problems=tuple(self._problems),
        )

    def _standing(self, first: TrialFacts, ranking: tuple[TrialFacts, ...], results: AllTrials) -> Standing:
        if results.objectives:
            why = "with several objectives the winner is the knee of their front"
            return Standing((first.number,), None, 1, 0, why)
        named_from = {trial.trial for trial in contenders(results.trials)}
        return standing(first, [trial for trial in ranking if trial.number in named_from], self._plan)

    def _objective_of_results(self) -> str:
        results = self._read(self._study.results.all_trials, AllTrials)
        return COMBINED_SCORE if results is None else results.objective

    # ---------------------------------------------------------------------------------------------------- one trial

    def _trial(self, layout: TrialLayout) -> TrialFacts | None:
        params = self._read(layout.params, TrialParams, needed=True)
        state = self._read(layout.state, TrialState, needed=True)
        if params is None or state is None:
            return None
        records = self._records(layout.evaluations)
        checkpoints = tuple(self._checkpoints(layout, state, records))
        exited = self._read(layout.trainer_exit, TrainerExit)
        return TrialFacts(
            params=params,
            state=state,
            checkpoints=checkpoints,
            final=self._final(layout, state, checkpoints),
            training_s=None if exited is None else exited.seconds,
            peak_memory=None if exited is None else exited.peak_memory,
            quarantined=tuple(
                QuarantinedFacts(state.trial, record.checkpoint, record.quarantine.code, record.quarantine.reason)
                for record in records
                if record.quarantine is not None
            ),
        )

    def _records(self, evaluations: EvaluationsLayout) -> list[CheckpointRecord]:
        """Return the evaluator's records of this plan; from the results themselves where its memory is unreadable."""
        state = self._read(evaluations.state, EvaluationState)
        if state is not None:
            return [record for record in state.checkpoints if self._is_of_plan(record.plan_hash)]
        return [CheckpointRecord.of_result(metrics) for metrics in self._measured_in(evaluations)]

    def _checkpoints(
        self, layout: TrialLayout, state: TrialState, records: list[CheckpointRecord]
    ) -> Iterator[CheckpointFacts]:
        """Yield the evaluated checkpoints by epoch; those of an attempt that was set aside do not count."""
        latest = {record.checkpoint: record for record in records if record.status == "recorded"}
        found = []
        for record in latest.values():
            weights = layout.folder / f"{record.checkpoint}.safetensors"
            there = weights.exists()
            if not there and state.state not in TERMINAL_STATES:
                continue
            metrics, render = self._metrics(layout, record)
            if metrics is not None:
                found.append(self._checkpoint(record.checkpoint, record.epoch, metrics, render, weights, there))
        yield from sorted(found, key=lambda c: (c.name == layout.output_name, c.epoch is None, c.epoch or 0, c.name))

    def _metrics(self, layout: TrialLayout, record: CheckpointRecord) -> tuple[Metrics | None, RenderLayout]:
        for name in (record.checkpoint, record.same_as):
            if name is None:
                continue
            render = layout.evaluations.checkpoint(name)
            metrics = self._read(render.metrics, Metrics, needed=record.same_as is None)
            if metrics is not None and metrics.checkpoint_sha256 == record.checkpoint_sha256:
                return metrics, render
        return None, layout.evaluations.checkpoint(record.checkpoint)

    def _final(
        self, layout: TrialLayout, state: TrialState, checkpoints: tuple[CheckpointFacts, ...]
    ) -> CheckpointFacts | None:
        """Return the deciding checkpoint: among the evaluated ones, else the copy in evaluation/."""
        if state.state != "complete":
            return None
        if checkpoints and checkpoints[-1].name == layout.output_name:
            return checkpoints[-1]
        metrics = self._read(layout.final_evaluation.metrics, Metrics, needed=True)
        if metrics is None or not self._is_of_plan(metrics.plan_hash):
            return None
        weights = layout.final_checkpoint
        return self._checkpoint(
            layout.output_name, metrics.epoch, metrics, layout.final_evaluation, weights, weights.exists()
        )

    def _checkpoint(
        self, name: str, epoch: int | None, metrics: Metrics, render: RenderLayout, weights: Path | None, there: bool
    ) -> CheckpointFacts:
        goals = () if self._plan is None else goals_against(metrics, self._plan.scoring)
        return CheckpointFacts(name, epoch, self._objective, metrics, render.folder, weights if there else None, goals)

    # ------------------------------------------------------------------------------------------------- the rivals

    def _base(self) -> CheckpointFacts | None:
        if self._run is None or self._run.plan_hash is None:
            return None
        render = self._study.base_render(self._run.plan_hash)
        metrics = self._read(render.metrics, Metrics)
        return None if metrics is None else self._checkpoint(BASE_MODEL, None, metrics, render, None, there=False)

    def _baselines(self) -> dict[str, CheckpointFacts]:
        found = {}
        for name, baseline in self._run.baselines.items() if self._run is not None else ():
            render = self._study.evaluations(BASELINE).checkpoint(name)
            metrics = self._read(render.metrics, Metrics)
            if metrics is None or not self._is_of_plan(metrics.plan_hash):
                continue
            if metrics.checkpoint_sha256 == baseline.sha256:
                weights = self._study.baseline_file(name)
                found[name] = self._checkpoint(name, metrics.epoch, metrics, render, weights, weights.exists())
        return found

    def _measured_in(self, evaluations: EvaluationsLayout) -> Iterator[Metrics]:
        """Yield what was measured with the study's plan in a folder of evaluations, by name."""
        for folder in sorted(evaluations.folder.iterdir()) if evaluations.folder.is_dir() else ():
            metrics = self._read(RenderLayout(folder).metrics, Metrics) if folder.is_dir() else None
            if metrics is not None and self._is_of_plan(metrics.plan_hash):
                yield metrics

    def _refused(self) -> int:
        """How many configurations that people asked for broke a rule; answers are kept for a while only."""
        folder = self._study.requests("optimizer")
        answers = [self._read(path, Answer) for path in sorted(folder.glob("*.done.json"))] if folder.is_dir() else []
        return sum(answer is not None and answer.kind == "enqueue" and not answer.ok for answer in answers)

    # ---------------------------------------------------------------------------------------------------- reading

    def _is_of_plan(self, plan_hash: str) -> bool:
        return self._run is None or plan_hash == self._run.plan_hash

    def _read(self, path: Path, model: type[F], *, needed: bool = False) -> F | None:
        """Return a document, or None and a sentence in `problems`; a missing one is a problem only where needed."""
        try:
            return read_model(path, model)
        except FileNotFoundError:
            if needed:
                self._problems.append(f"{path}: missing")
        except LabError as error:
            self._problems.append(str(error))
        return None


def _timings(trials: tuple[TrialFacts, ...]) -> Timings:
    started = [trial.state.started for trial in trials if trial.state.started is not None]
    ended = [trial.state.ended for trial in trials if trial.state.ended is not None]
    took = [
        trial.took_s for trial in trials if trial.state.state in ("complete", "pruned") and trial.took_s is not None
    ]
    evaluations = [checkpoint.metrics.seconds.total for trial in trials for checkpoint in trial.checkpoints]
    return Timings(
        first=min(started, default=None),
        last=max(ended, default=None),
        training_s=sum(trial.training_s or 0.0 for trial in trials),
        evaluation_s=sum(evaluations),
        median_trial_s=median(took) if took else None,
        median_evaluation_s=median(evaluations) if evaluations else None,
    )

"""What must be true of a study folder after anything at all was killed, read from the files alone."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import optuna
from optuna.storages import RDBStorage
from PIL import Image

from shared.errors import CheckpointError, UnreadableFileError
from shared.files import read_model
from shared.layout import CORRUPT_MARK, TEMPORARY_MARK, StudyLayout, TrialLayout, matches, writer_of
from shared.locks import FileLock
from shared.safetensors_file import lora_modules, read_checkpoint
from shared.schemas import (
    DOCUMENTS,
    TERMINAL_STATES,
    AllTrials,
    BestParameters,
    CheckpointRecord,
    EvaluationState,
    EvaluationSummary,
    Metrics,
    Run,
    TrialParams,
    TrialState,
)


def violations(study: StudyLayout, *, finished: int | None = None) -> list[str]:
    """Return every broken promise, a sentence each; none for a sound folder whose daemons have ended.

    Args:
        finished: the study must be finished with this many complete trials; None for one in the middle.
    """
    found = [*_files(study), *_locks(study)]
    if found:
        return found  # what cannot be read cannot be compared
    found = [*_numbers(study), *_storage(study)]
    for trial in study.list_trials():
        found += [f"{trial.name}: {sentence}" for sentence in _evaluations(study, trial)]
    if finished is not None:
        found += _end(study, finished)
    return found


def evaluation_violations(study: StudyLayout) -> list[str]:
    """The same of a folder that only the evaluator daemon and trainers have worked in: there is no database."""
    if found := [*_files(study), *_locks(study)]:
        return found
    return [f"{trial.name}: {sentence}" for trial in study.list_trials() for sentence in _evaluations(study, trial)]


def unreadable_files(study: StudyLayout) -> list[str]:
    """What is broken among the files as they are in the middle of anything; temporary ones may be there."""
    return list(_files(study, at_rest=False))


def _files(study: StudyLayout, *, at_rest: bool = True) -> Iterator[str]:
    """Every file is known to the contract, readable, and none is left over from a writer that was killed."""
    for path in sorted(study.root.rglob("*")):
        relative = PurePosixPath(path.relative_to(study.root).as_posix())
        if CORRUPT_MARK in path.name:
            yield f"{relative}: was unreadable and set aside"
        elif TEMPORARY_MARK in path.name:
            if at_rest:
                yield f"{relative}: a temporary file is left"
        elif path.is_file():
            try:
                writer_of(relative)
            except (KeyError, ValueError):
                yield f"{relative}: the contract knows no such file"
            for document in reversed(DOCUMENTS):  # an answer fits the pattern of requests, too, which stands first
                if any(matches(pattern, relative) for pattern in document.patterns):
                    try:
                        read_model(path, document.model)
                    except UnreadableFileError as error:
                        yield f"{relative}: {error.reason}"
                    break
            else:
                if path.suffix == ".png":
                    try:
                        with Image.open(path) as image:
                            image.load()
                    except OSError as error:
                        yield f"{relative}: no whole picture: {error}"


def _locks(study: StudyLayout) -> Iterator[str]:
    locks = [study.optimizer_lock, study.manager_lock]
    for trial in study.list_trials():
        locks += [trial.trainer_lock, trial.evaluations.lock]
    for lock in locks:
        if FileLock.is_held(lock):
            yield f"{lock.relative_to(study.root)}: somebody still holds it"


def _numbers(study: StudyLayout) -> Iterator[str]:
    numbers = [trial.number for trial in study.list_trials()]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"the trials are {numbers}, not 1 to {len(numbers)}"


def _storage(study: StudyLayout) -> Iterator[str]:
    """The database is sound and says of every trial what the trial's own files say."""
    run = read_model(study.run, Run)
    if run.storage.startswith("sqlite:"):
        with contextlib.closing(sqlite3.connect(study.database)) as connection:
            (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
        if verdict != "ok":
            yield f"the database is damaged: {verdict}"
            return
    storage = RDBStorage(run.storage)
    trials = optuna.load_study(study_name=run.study_name, storage=storage).get_trials(deepcopy=False)
    storage.engine.dispose()  # a server's connection left open is a warning
    if len(trials) != len(study.list_trials()):
        yield f"the database has {len(trials)} trials, the folder {len(study.list_trials())}"
    for known, trial in zip(trials, study.list_trials(), strict=False):
        state, params = read_model(trial.state, TrialState), read_model(trial.params, TrialParams)
        if (state.optuna_number, params.optuna_number) != (known.number, known.number):
            yield f"{trial.name}: carries the numbers of another trial"
        told = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}.get(state.state, "RUNNING")
        if known.state.name != told:
            yield f"{trial.name}: is {state.state}, the database says {known.state.name}"
        if state.state == "complete" and known.values != [state.value]:
            yield f"{trial.name}: value {state.value}, the database says {known.values}"
        if {name: params.parameters[name] for name in known.params} != known.params:
            yield f"{trial.name}: params.json and the database differ"
        curve = {point.epoch: point.value for point in state.curve}
        if curve != known.intermediate_values:
            yield f"{trial.name}: curve {curve}, the database says {known.intermediate_values}"


def _evaluations(study: StudyLayout, trial: TrialLayout) -> Iterator[str]:
    """Each complete checkpoint has exactly one record, about its own content, and results that fit it."""
    run = read_model(study.run, Run)
    records: dict[str, CheckpointRecord] = {}
    if trial.evaluations.state.exists():
        state = read_model(trial.evaluations.state, EvaluationState)
        records = {record.checkpoint: record for record in state.checkpoints}
        if len(records) != len(state.checkpoints):
            yield "a checkpoint has two records"
    over = read_model(trial.state, TrialState).state in TERMINAL_STATES
    for path in trial.list_checkpoints():
        try:
            checkpoint = read_checkpoint(path, trial.folder)
            lora_modules(checkpoint)
        except CheckpointError as error:
            if over and (path.stem not in records or records[path.stem].status not in ("quarantined", "truncated")):
                yield f"{path.stem}: is unfit ({error.reason}), yet has no such verdict"
            continue
        record = records.get(path.stem)
        if record is None:
            if over:
                yield f"{path.stem}: has no record"
            continue
        if record.checkpoint_sha256 != checkpoint.sha256 or record.plan_hash != run.plan_hash:
            yield f"{path.stem}: the record is about other content or another plan"
        if record.status == "recorded":
            yield from (f"{path.stem}: {sentence}" for sentence in _result(trial, record, run))
        elif over:
            yield f"{path.stem}: is whole, yet {record.status}"
        running = [attempt for attempt in record.attempts if attempt.outcome == "running"]
        if running and not FileLock.is_held(trial.evaluations.lock) and over:
            yield f"{path.stem}: an attempt is open"
    summary = _summary(trial)
    recorded = {name for name, record in records.items() if record.status == "recorded"}
    if over and set(summary) != recorded:
        yield f"the summary lists {sorted(summary)}, recorded are {sorted(recorded)}"


def _result(trial: TrialLayout, record: CheckpointRecord, run: Run) -> Iterator[str]:
    outcomes = [attempt.outcome for attempt in record.attempts]
    if outcomes.count("recorded") != (0 if record.same_as else 1) or "running" in outcomes:
        yield f"attempts ended as {outcomes}"
    render = trial.evaluations.checkpoint(record.checkpoint)
    metrics = read_model(render.metrics, Metrics)
    if (metrics.checkpoint_sha256, metrics.plan_hash) != (record.checkpoint_sha256, run.plan_hash):
        yield "metrics.json is about other content or another plan"
    assert run.plan is not None
    pictures = {path.name for path in render.folder.glob("sample_*.png")}
    if pictures != {f"sample_{index}.png" for index in range(run.plan.num_samples)}:
        yield f"has the pictures {sorted(pictures)}"


def _summary(trial: TrialLayout) -> dict[str, object]:
    if not trial.evaluations.summary.exists():
        return {}
    return dict(read_model(trial.evaluations.summary, EvaluationSummary).checkpoints)


def _end(study: StudyLayout, finished: int) -> Iterator[str]:
    """The study has ended, and its results are what the trials' files say."""
    run = read_model(study.run, Run)
    if run.status != "finished":
        yield f"run.json says {run.status}"
    states = {trial.number: read_model(trial.state, TrialState) for trial in study.list_trials()}
    open_trials = [number for number, state in states.items() if state.state not in TERMINAL_STATES]
    if open_trials:
        yield f"trials {open_trials} are not over"
    complete = {number: state for number, state in states.items() if state.state == "complete"}
    if len(complete) != finished:
        failed = {number: state.reason for number, state in states.items() if state.state == "failed"}
        yield f"{len(complete)} trials are complete instead of {finished}; failed: {failed}"
    for number in complete:
        trial = study.trial(number)
        final = read_model(trial.final_evaluation.metrics, Metrics)
        if final.checkpoint != trial.output_name:
            yield f"trial {number}: evaluation/ is about {final.checkpoint}"
        if trial.training_state.exists():
            yield f"trial {number}: the training state is left"
    listed = read_model(study.results.all_trials, AllTrials)
    if {t.trial: (t.state, t.value) for t in listed.trials} != {n: (s.state, s.value) for n, s in states.items()}:
        yield "results/all_trials.json differs from the trials' own files"
    feasible = [(state.value, number) for number, state in complete.items() if state.feasible is not False]
    origins = {number: read_model(study.trial(number).params, TrialParams).origin for number in states}
    searched = max((number for number, origin in origins.items() if origin == "sampler"), default=0)
    after = [(value, number) for value, number in feasible if number > searched]
    if any(origins[number] == "finalist" for _, number in after):
        feasible = after
    if feasible:
        best = read_model(study.results.best_parameters, BestParameters)
        if (best.value, best.trial) != min(feasible):
            yield f"best_parameters.json names trial {best.trial}, the best is {min(feasible)[1]}"
    if any(re.search(r"Traceback \(most recent", log.read_text(errors="replace")) for log in _logs(study)):
        yield "a log holds a traceback"


def _logs(study: StudyLayout) -> list[Path]:
    return [*study.root.glob("*.log"), *study.root.glob("trial_*/*.log")]

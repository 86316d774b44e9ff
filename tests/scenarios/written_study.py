"""A study folder whose weight files a test writes: the optimizer's side in files, for the real evaluator daemon."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from examples.tiny_world.paths import BASE_MODEL
from shared.files import read_model, write_model
from shared.layout import StudyLayout, TrialLayout
from shared.planning import make_plan
from shared.safetensors_file import read_checkpoint
from shared.schemas import (
    CheckpointRecord,
    EvaluationState,
    EvaluationSummary,
    Metrics,
    Run,
    Trainer,
    TrialParams,
    TrialState,
)
from tests.scenarios.lab import Lab
from tests.scenarios.lora_files import ALPHA, RANK

NOW = datetime.now().astimezone()
LAST_EPOCH = 40
PATIENCE_S = 900.0  # of a machine with much else to do


@contextmanager
def lab_in(folder: Path) -> Iterator[Lab]:
    with Lab(folder) as lab:
        plan_study(lab.study)
        yield lab


def plan_study(study: StudyLayout) -> None:
    study.root.mkdir()
    plan = make_plan(
        base_model=BASE_MODEL,
        prompts=("a red ball", "a blue cube"),
        device="cpu",
        num_samples=2,
        steps=2,
        cfg_scale=3.0,
    )
    run = Run(
        folder_id=secrets.token_hex(8),
        study_name="faults",
        storage=f"sqlite:///{study.database}",
        workload="sd-lora",
        score_source="evaluator",
        status="running",
        created=NOW,
        updated=NOW,
        base_model=str(BASE_MODEL),
        plan=plan,
        plan_hash=plan.digest(),
        trainer=Trainer(name="native"),
        settings={},
        threads_per_process=1,
        versions={},
    )
    write_model(study.run, run)


def make_trial(study: StudyLayout, number: int, state: str = "complete", **parameters) -> TrialLayout:
    """A trial as the optimizer leaves it."""
    trial = study.trial(number)
    trial.folder.mkdir()
    params = {"network_dim": RANK, "network_alpha": ALPHA, "text_encoder_lr": 1e-4, "max_train_epochs": LAST_EPOCH}
    write_model(
        trial.params,
        TrialParams(
            trial=number,
            optuna_number=number - 1,
            parameters={**params, **parameters},
            origin="sampler",
            training_seed=1,
        ),
    )
    set_state(trial, state)
    return trial


def set_state(trial: TrialLayout, state: str) -> None:
    assert trial.number is not None
    ended = {"ended": NOW, "value": 0.5} if state == "complete" else {}
    write_model(
        trial.state,
        TrialState(
            trial=trial.number, optuna_number=trial.number - 1, state=state, attempt=1, drawn=NOW, started=NOW, **ended
        ),
    )


def records_of(trial: TrialLayout) -> dict[str, CheckpointRecord]:
    if not trial.evaluations.state.exists():
        return {}
    return {r.checkpoint: r for r in read_model(trial.evaluations.state, EvaluationState).checkpoints}


def verdict(record: CheckpointRecord | None) -> str:
    """The code of the reason, else the status."""
    if record is None:
        return "no record"
    return record.quarantine.code if record.quarantine else record.status


def verdicts(trial: TrialLayout) -> dict[str, str]:
    return {name: verdict(record) for name, record in records_of(trial).items()}


def outcomes(record: CheckpointRecord) -> list[str]:
    return [attempt.outcome for attempt in record.attempts]


def false_claims(trial: TrialLayout) -> list[str]:
    """Recorded checkpoints whose record, figures or summary are about other content than what stands at the name."""
    found = []
    records = records_of(trial)
    for name, record in records.items():
        if record.status != "recorded":
            continue
        path = trial.folder / f"{name}.safetensors"
        metrics = read_model(trial.evaluations.checkpoint(name).metrics, Metrics)
        if metrics.checkpoint_sha256 != record.checkpoint_sha256:
            found.append(f"{name}: metrics.json is about other content")
        if path.exists() and read_checkpoint(path, trial.folder).sha256 != record.checkpoint_sha256:
            found.append(f"{name}: other content stands there")
    summary = read_model(trial.evaluations.summary, EvaluationSummary).checkpoints
    if set(summary) != {name for name, record in records.items() if record.status == "recorded"}:
        found.append(f"the summary lists {sorted(summary)}")
    return found

"""Study folders to look at, in files alone: documents are written through their models, weight files are only names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import BaseModel

from shared.files import to_bytes
from shared.layout import StudyLayout, TrialLayout
from shared.schemas import (
    TERMINAL_STATES,
    Attempt,
    CheckpointRecord,
    EvaluationPlan,
    EvaluationState,
    EvaluationSummary,
    EvaluatorManagerState,
    Gate,
    Metric,
    Metrics,
    PhaseSeconds,
    Quarantine,
    Run,
    Sample,
    Score,
    ScoringPreset,
    SummaryEntry,
    Trainer,
    TrialParams,
    TrialState,
)

NOW = datetime(2025, 11, 15, 12, 0, 0, tzinfo=UTC)
EVERY = 2  # epochs between two checkpoints
EPOCHS = 8

PLAN = EvaluationPlan(
    prompts=("a red ball",), negative_prompt="", num_samples=1, base_seed=42, width=64, height=64, steps=2,
    sampler="dpmpp_2m_karras", cfg_scale=7.5, clip_skip=1, base_digest="a" * 64, vae_digest=None, lora_scale=1.0,
    dtype="float32", batch_size=1, scoring=ScoringPreset(name="combined", objective="combined_score", values={}),
)  # fmt: skip
BAR = "steps:  25%|##5       | {step}/{steps} [00:46<05:28, 23.48s/it, avr_loss=1.17]"


def write_model(path: Path, model: BaseModel) -> None:
    """As the daemons write it, by a rename, but for the syncs: some tests need a thousand files."""
    new = path.with_name("new")
    new.write_bytes(to_bytes(model))
    new.replace(path)


def write_run(study: StudyLayout, *, name: str = "pixar", n_trials: int | None = 20, status: str = "running") -> Run:
    study.root.mkdir(parents=True, exist_ok=True)
    run = Run(
        folder_id="f" * 16, study_name=name, storage=f"sqlite:///{study.database}", workload="sd-lora",
        score_source="evaluator", status=status, created=NOW, updated=NOW, plan=PLAN, plan_hash=PLAN.digest(),
        trainer=Trainer(name="native"), settings={"n-trials": n_trials, "save-every-n-epochs": EVERY},
        threads_per_process=1, versions={},
    )  # fmt: skip
    write_model(study.run, run)
    return run


def write_trial(
    study: StudyLayout,
    number: int,
    state: str,
    scores: Sequence[float | None] = (),
    *,
    failed_gate: Sequence[int] = (),
    reason: str | None = None,
    minutes: float = 30.0,
    waiting: int = 0,
    value: float | None = None,
    **parameters: float | int | str,
) -> TrialLayout:
    """A trial with scored checkpoints and `waiting` more that nobody has scored.

    Args:
        scores: by checkpoint; the last one of all epochs is the final, unsuffixed file.
        failed_gate: epochs whose checkpoint failed its gate.
        minutes: how long the trial took, or trains already.
    """
    trial = study.trial(number)
    trial.evaluations.folder.mkdir(parents=True, exist_ok=True)
    known = {"network_dim": 64, "network_alpha": 32, "learning_rate": 1e-4, "max_train_epochs": EPOCHS} | parameters
    write_model(
        trial.params,
        TrialParams(trial=number, optuna_number=number - 1, parameters=known, origin="sampler", training_seed=1),
    )
    over = state in TERMINAL_STATES
    told = value if value is not None else scores[-1] if state == "complete" else None
    if reason is None and state in ("pruned", "failed", "interrupted"):
        reason = "because"
    write_model(
        trial.state,
        TrialState(
            trial=number, optuna_number=number - 1, state=state, reason=reason, attempt=1, drawn=NOW,
            started=NOW - timedelta(minutes=minutes), ended=NOW if over else None, value=told,
            feasible=(EPOCHS not in failed_gate) if state == "complete" else None,
        ),
    )  # fmt: skip
    for index in range(len(scores) + waiting):
        file(trial, index).write_bytes(b"weights")
    write_scores(trial, scores, failed_gate=failed_gate)
    return trial


def file(trial: TrialLayout, index: int) -> Path:
    epoch = EVERY * (index + 1)
    return trial.final_checkpoint if epoch >= EPOCHS else trial.intermediate_checkpoint(epoch)


def write_scores(trial: TrialLayout, scores: Sequence[float | None], *, failed_gate: Sequence[int] = ()) -> None:
    """The evaluator's files: a summary and a state with these checkpoints recorded."""
    trial.evaluations.folder.mkdir(parents=True, exist_ok=True)
    entries = {
        file(trial, index).stem: SummaryEntry(
            epoch=EVERY * (index + 1), mean_brightness=0.5, mean_contrast=0.2, mean_saturation=0.4,
            evaluation_time=NOW, scores={"combined_score": score}, feasible=EVERY * (index + 1) not in failed_gate,
            plan_hash=PLAN.digest(),
        )
        for index, score in enumerate(scores)
    }  # fmt: skip
    write_model(
        trial.evaluations.summary,
        EvaluationSummary(
            trial_name=trial.name, total_checkpoints_evaluated=len(entries), checkpoints=entries, last_update=NOW
        ),
    )
    write_records(trial, *(record(name) for name in entries))


def write_records(trial: TrialLayout, *records: CheckpointRecord) -> None:
    state = EvaluationState(trial_name=trial.name, updated=NOW, checkpoints=records)
    write_model(trial.evaluations.state, state)


def record(checkpoint: str, status: str = "recorded", **fields: object) -> CheckpointRecord:
    return CheckpointRecord(
        checkpoint=checkpoint, checkpoint_sha256=hashlib.sha256(checkpoint.encode()).hexdigest(),
        plan_hash=PLAN.digest(), epoch=None, size=7, modified_ns=1, status=status, **fields,
    )  # fmt: skip


def quarantined(checkpoint: str, reason: str, since: datetime = NOW) -> CheckpointRecord:
    verdict = Quarantine(code="not_finite", reason=reason, since=since)
    return record(checkpoint, "quarantined", quarantine=verdict)


def struck(checkpoint: str, reason: str, ended: datetime = NOW) -> CheckpointRecord:
    return record(checkpoint, "waiting", attempts=(Attempt(started=NOW, ended=ended, outcome="strike", reason=reason),))


def evaluating(checkpoint: str) -> CheckpointRecord:
    return record(checkpoint, "evaluating", attempts=(Attempt(started=NOW, outcome="running"),))


def write_metrics(trial: TrialLayout, checkpoint: str, direction: str) -> None:
    render = trial.evaluations.checkpoint(checkpoint)
    render.folder.mkdir(parents=True)
    brightness = Metric(version="1", direction="target", status="ok", value=0.5)
    write_model(
        render.metrics,
        Metrics(
            trial_name=trial.name, checkpoint=checkpoint, checkpoint_sha256="c" * 64, plan_hash=PLAN.digest(), epoch=2,
            evaluation_time=NOW, samples=(Sample(file="sample_0.png", prompt="a red ball", seed=42),),
            metrics={"brightness": brightness}, scores={"combined_score": Score(value=0.3, direction=direction)},
            gate=Gate(feasible=True, checks={}), seconds=PhaseSeconds(load=0, render=0, measure=0, total=0),
            batch_size=1, device="cpu", library_versions={},
        ),
    )  # fmt: skip


def write_manager(study: StudyLayout, **fields: object) -> None:
    known: Mapping[str, object] = {
        "status": "running", "host": "here", "pid": 1, "started": NOW, "heartbeat": NOW, "device": "cpu",
        "gpu_policy": "share", "waiting_checkpoints": 0,
    }  # fmt: skip
    write_model(study.manager_state, EvaluatorManagerState(**{**known, **fields}))


def write_bar(trial: TrialLayout, step: int, steps: int) -> None:
    """What the native trainer draws: one bar over another, the lines ended by carriage returns."""
    bars = [BAR.format(step=n, steps=steps) for n in range(step + 1)]
    trial.training_log.write_text("loading\n" + "\r".join(bars))

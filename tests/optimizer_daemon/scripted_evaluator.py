"""Stands in for `evaluator-daemon evaluate --trial DIR` where tests need many scores quickly: the same files, no model.

Every checkpoint gets one attempt. Its score is what the scripted trainer wrote into its metadata; SCRIPTED_GATE names a
trial that fails, SCRIPTED_TRADE_OFF makes brightness and contrast contradict each other.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from datetime import datetime
from pathlib import Path

from shared.files import read_model, write_bytes, write_model
from shared.layout import RenderLayout, StudyLayout, TrialLayout
from shared.locks import FileLock
from shared.safetensors_file import read_checkpoint
from shared.schemas import (
    Attempt,
    CheckpointRecord,
    EvaluationState,
    EvaluationSummary,
    Gate,
    GateCheck,
    Metric,
    Metrics,
    PhaseSeconds,
    Quarantine,
    Run,
    Sample,
    Score,
    SummaryEntry,
)


def evaluate(trial: TrialLayout) -> None:
    trial.evaluations.folder.mkdir(exist_ok=True)
    with FileLock(trial.evaluations.lock), (trial.folder / "realtime_evaluation.log").open("a") as log:
        known: dict[str, CheckpointRecord] = {}
        if trial.evaluations.state.exists():
            state = read_model(trial.evaluations.state, EvaluationState)
            known = {record.checkpoint: record for record in state.checkpoints}
        run = read_model(StudyLayout(trial.folder.parent).run, Run)
        for path in trial.list_checkpoints():
            checkpoint = read_checkpoint(path, trial.folder)
            if path.stem in known and known[path.stem].checkpoint_sha256 == checkpoint.sha256:
                continue
            log.write(f"{path.stem}\n")
            known[path.stem] = record(trial, path, checkpoint, run)
            time = datetime.now().astimezone()
            state = EvaluationState(trial_name=trial.name, updated=time, checkpoints=tuple(known.values()))
            write_model(trial.evaluations.state, state)
        entries = {name: entry(known[name]) for name in known}
        summary = EvaluationSummary(
            trial_name=trial.name,
            total_checkpoints_evaluated=len(entries),
            checkpoints=entries,
            last_update=datetime.now().astimezone(),
        )
        write_model(trial.evaluations.summary, summary)


def entry(record: CheckpointRecord) -> SummaryEntry:
    figures = {
        f"{short}_{name}": None for name in ("brightness", "contrast", "saturation") for short in ("mean", "std")
    }
    return SummaryEntry(
        epoch=record.epoch,
        evaluation_time=record.attempts[-1].ended,
        **figures,
        scores={},
        metric_status={},
        feasible=True,
        checkpoint_sha256=record.checkpoint_sha256,
        plan_hash=record.plan_hash,
        seconds=0.0,
    )


def record(
    trial: TrialLayout, path: Path, checkpoint, run: Run, render: RenderLayout | None = None
) -> CheckpointRecord:
    started = datetime.now().astimezone()
    render = render or trial.evaluations.checkpoint(path.stem)
    render.folder.mkdir(exist_ok=True)
    score = float(checkpoint.metadata.get("score", "0.5"))  # other trainers write none
    collapsed = os.environ.get("SCRIPTED_GATE") == str(trial.number)
    write_bytes(render.sample(0), one_pixel())
    write_bytes(render.grid, one_pixel())
    metrics = Metrics(
        trial_name=trial.name,
        checkpoint=path.stem,
        checkpoint_sha256=checkpoint.sha256,
        plan_hash=run.plan_hash,
        epoch=checkpoint.epoch,
        evaluation_time=datetime.now().astimezone(),
        samples=(Sample(file="sample_0.png", prompt="a red ball", seed=42),),
        metrics={
            name: Metric(version="1", direction="target", status="ok", value=value, std=0.03, per_image=(value,))
            for name, value in figures(score).items()
        },
        scores={"combined_score": Score(value=score, direction="minimise")},
        gate=Gate(
            feasible=not collapsed,
            checks={"sentinels": GateCheck(passed=not collapsed, reason="image 0 is black" if collapsed else None)},
        ),
        seconds=PhaseSeconds(load=0.0, render=0.0, measure=0.0, total=0.0),
        batch_size=1,
        device="cpu",
        library_versions={},
    )
    write_model(render.metrics, metrics)
    return CheckpointRecord(
        checkpoint=path.stem,
        checkpoint_sha256=checkpoint.sha256,
        plan_hash=run.plan_hash or "",
        epoch=checkpoint.epoch,
        size=checkpoint.stamp.size,
        modified_ns=checkpoint.stamp.mtime_ns,
        status="recorded",
        attempts=(Attempt(started=started, ended=datetime.now().astimezone(), outcome="recorded"),),
    )


def figures(score: float) -> dict[str, float]:
    """With SCRIPTED_TRADE_OFF brightness is the farther from its target, and up to 0.8 contrast the nearer to its own,
    the greater the score; beyond that both are worse.
    """
    if not os.environ.get("SCRIPTED_TRADE_OFF"):
        return {"brightness": 0.5, "contrast": 0.3}
    return {"brightness": 0.5 + score, "contrast": 0.2 + abs(score - 0.8)}


def one_pixel() -> bytes:
    """A grey PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\x00\x80")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def evaluate_files(study: StudyLayout, label: str, files: list[Path]) -> None:
    """As `evaluate FILE ... --label NAME` where no manager lives; SCRIPTED_REFUSED names one that is refused."""
    layout = study.evaluations(label)
    layout.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(layout.lock):
        run = read_model(study.run, Run)
        known: dict[str, CheckpointRecord] = {}
        if layout.state.exists():
            known = {record.checkpoint: record for record in read_model(layout.state, EvaluationState).checkpoints}
        for path in files:
            if path.stem in known:
                continue
            checkpoint = read_checkpoint(path, study.root)
            known[path.stem] = record(TrialLayout(layout.folder), path, checkpoint, run, layout.checkpoint(path.stem))
            if os.environ.get("SCRIPTED_REFUSED") == path.stem:
                layout.checkpoint(path.stem).metrics.unlink()
                known[path.stem] = known[path.stem].model_copy(
                    update={
                        "status": "quarantined",
                        "quarantine": Quarantine(code="not_applied", reason="no such layers", since=time()),
                    }
                )
            state = EvaluationState(trial_name=label, updated=time(), checkpoints=tuple(known.values()))
            write_model(layout.state, state)


def time() -> datetime:
    return datetime.now().astimezone()


if __name__ == "__main__":
    verb, *words = sys.argv[1:]
    assert verb == "evaluate", sys.argv
    if words[0] == "--trial":
        evaluate(TrialLayout(Path(words[1])))
    else:
        flags = words.index("--label")
        _, label, _, root = words[flags : flags + 4]
        evaluate_files(StudyLayout(Path(root)), label, [Path(file) for file in words[:flags]])

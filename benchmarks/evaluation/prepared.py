"""Study folders as thousands of finished trials leave them, written in seconds: no rendering, no fsync."""

from __future__ import annotations

import json
import os
import struct
import time
from datetime import datetime
from pathlib import Path

from shared.files import to_bytes
from shared.layout import StudyLayout, TrialLayout
from shared.schemas import Attempt, CheckpointRecord, EvaluationState, TrialParams, TrialState

CHECKPOINTS = 15
NOW = datetime.now().astimezone()
_AGE_S = 3600


def whole_file(content: bytes) -> bytes:
    """Return a weight file that is complete, and nothing else: the least that counts as waiting."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}).encode()
    return struct.pack("<Q", len(header)) + header + content


def add_finished_trial(study: StudyLayout, number: int, plan_hash: str) -> TrialLayout:
    """Write a complete trial of CHECKPOINTS recorded checkpoints, an hour old."""
    trial = study.trial(number)
    trial.evaluations.folder.mkdir(parents=True)
    content = whole_file(bytes(8))
    modified_ns = (time.time_ns() // 10**9 - _AGE_S) * 10**9
    paths = [trial.intermediate_checkpoint(2 * epoch) for epoch in range(1, CHECKPOINTS)] + [trial.final_checkpoint]
    for path in paths:
        path.write_bytes(content)
        os.utime(path, ns=(modified_ns, modified_ns))
    write_documents(trial, "complete")
    records = tuple(_recorded(path, plan_hash, len(content), modified_ns) for path in paths)
    state = EvaluationState(trial_name=trial.name, updated=NOW, checkpoints=records)
    trial.evaluations.state.write_bytes(to_bytes(state))
    return trial


def write_documents(trial: TrialLayout, state: str) -> None:
    """Write params.json and trial_state.json."""
    number = trial.number
    assert number is not None
    params = TrialParams(
        trial=number,
        optuna_number=number - 1,
        parameters={"max_train_epochs": 2 * CHECKPOINTS, "learning_rate": 1e-4, "network_dim": 8, "network_alpha": 4},
        origin="sampler",
        training_seed=1,
    )
    ended = {"ended": NOW, "value": 0.5} if state == "complete" else {}
    found = TrialState.model_validate(
        {"trial": number, "optuna_number": number - 1, "state": state, "attempt": 1, "drawn": NOW, "started": NOW}
        | ended
    )
    trial.params.write_bytes(to_bytes(params))
    trial.state.write_bytes(to_bytes(found))


def _recorded(path: Path, plan_hash: str, size: int, modified_ns: int) -> CheckpointRecord:
    return CheckpointRecord(
        checkpoint=path.stem,
        checkpoint_sha256="c" * 64,
        plan_hash=plan_hash,
        epoch=None,
        size=size,
        modified_ns=modified_ns,
        status="recorded",
        attempts=(Attempt(started=NOW, ended=NOW, outcome="recorded"),),
    )

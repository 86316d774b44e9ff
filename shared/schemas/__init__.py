"""Every file that crosses a process boundary, as a strict pydantic model; one module per writer.

`DOCUMENTS` lists them all. docs/file_formats.md is generated from it (`python -m shared.format_docs`), and every
later version must read the golden files of tests/data/formats/v1/.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from pydantic import BaseModel

from shared import layout
from shared.schemas.base import SCHEMA_VERSION, Record, Scalar, Time, VersionedFile
from shared.schemas.evaluator import (
    Attempt,
    BestCheckpoint,
    CheckpointRecord,
    EvaluationState,
    EvaluationSummary,
    Gate,
    GateCheck,
    LabelledPlan,
    Metric,
    Metrics,
    PhaseSeconds,
    Quarantine,
    Sample,
    Score,
    SummaryEntry,
)
from shared.schemas.manager import ActiveEvaluator, EvaluatorManagerState, QuarantinedCheckpoint
from shared.schemas.optimizer import (
    TERMINAL_STATES,
    AllTrials,
    Baseline,
    BaselineResult,
    BestParameters,
    CurvePoint,
    FrontGrowth,
    FrontMember,
    Objective,
    ParetoFront,
    Run,
    StageOfRun,
    Trainer,
    TrialParams,
    TrialResult,
    TrialState,
    TrialStateName,
    WarmUpRule,
)
from shared.schemas.plan import EvaluationPlan, PlannedSample, PromptOptions, ScoringPreset
from shared.schemas.requests import (
    Analyze,
    Answer,
    Enqueue,
    Evaluate,
    EvaluatorRequest,
    OptimizerRequest,
    Pause,
    Resume,
    Retry,
    Set,
    Stop,
)
from shared.schemas.results import SummaryStatistics
from shared.schemas.trainer import TrainerExit

__all__ = [
    "DOCUMENTS",
    "SCHEMA_VERSION",
    "TERMINAL_STATES",
    "ActiveEvaluator",
    "AllTrials",
    "Analyze",
    "Answer",
    "Attempt",
    "Baseline",
    "BaselineResult",
    "BestCheckpoint",
    "BestParameters",
    "CheckpointRecord",
    "CurvePoint",
    "Document",
    "Enqueue",
    "Evaluate",
    "EvaluationPlan",
    "EvaluationState",
    "EvaluationSummary",
    "EvaluatorManagerState",
    "EvaluatorRequest",
    "FrontGrowth",
    "FrontMember",
    "Gate",
    "GateCheck",
    "LabelledPlan",
    "Metric",
    "Metrics",
    "Objective",
    "OptimizerRequest",
    "ParetoFront",
    "Pause",
    "PhaseSeconds",
    "PlannedSample",
    "PromptOptions",
    "Quarantine",
    "QuarantinedCheckpoint",
    "Record",
    "Resume",
    "Retry",
    "Run",
    "Sample",
    "Scalar",
    "Score",
    "ScoringPreset",
    "Set",
    "StageOfRun",
    "Stop",
    "SummaryEntry",
    "SummaryStatistics",
    "Time",
    "Trainer",
    "TrainerExit",
    "TrialParams",
    "TrialResult",
    "TrialState",
    "TrialStateName",
    "VersionedFile",
    "WarmUpRule",
]


@dataclass(frozen=True)
class Document:
    """One kind of file.

    Args:
        name: its name in the documentation; its golden file is called so too, with .json.
        patterns: where it lies, in the notation of `layout.WRITERS`; the usual place first.
        model: what it holds.
        purpose: one line for people.
    """

    name: str
    patterns: tuple[str, ...]
    model: type[BaseModel]
    purpose: str

    @property
    def writer(self) -> layout.Writer:
        """Who alone writes it at its usual place."""
        return layout.writer_of(PurePosixPath(self.patterns[0]))


DOCUMENTS: tuple[Document, ...] = (
    Document("run", (layout.RUN,), Run, "What the study is and under which settings it runs."),
    Document("params", (f"trial_*/{layout.PARAMS}",), TrialParams, "The hyperparameters one trial runs with."),
    Document("trial_state", (f"trial_*/{layout.TRIAL_STATE}",), TrialState, "How far a trial got, and why it ended."),
    Document("trainer_exit", (f"trial_*/{layout.TRAINER_EXIT}",), TrainerExit, "How a training ended."),
    Document(
        "evaluation_state",
        (f"trial_*/realtime_evaluations/{layout.EVALUATION_STATE}", f"evaluations/*/{layout.EVALUATION_STATE}"),
        EvaluationState,
        "Which checkpoints were tried, recorded, quarantined or found truncated.",
    ),
    Document(
        "evaluation_summary",
        (f"trial_*/realtime_evaluations/{layout.EVALUATION_SUMMARY}", f"evaluations/*/{layout.EVALUATION_SUMMARY}"),
        EvaluationSummary,
        "Each checkpoint's main figures in epoch order.",
    ),
    Document(
        "evaluation_plan",
        (f"evaluations/*/{layout.EVALUATION_PLAN}",),
        LabelledPlan,
        "What is evaluated outside the trials under one label, and with which plan.",
    ),
    Document(
        "metrics",
        (
            f"trial_*/realtime_evaluations/*/{layout.METRICS}",
            f"evaluations/*/*/{layout.METRICS}",
            f"trial_*/evaluation/{layout.METRICS}",
            f"reference/*/{layout.METRICS}",
        ),
        Metrics,
        "Everything measured for one checkpoint.",
    ),
    Document(
        "evaluator_manager_state",
        (layout.MANAGER_STATE,),
        EvaluatorManagerState,
        "What the evaluator manager is doing; for display only.",
    ),
    Document(
        "optimizer_request",
        (f"requests/optimizer/{layout.REQUEST}",),
        OptimizerRequest,
        "A command to the optimizer daemon.",
    ),
    Document(
        "evaluator_request",
        (f"requests/evaluator/{layout.REQUEST}",),
        EvaluatorRequest,
        "A command to the evaluator daemon.",
    ),
    Document(
        "answer",
        (f"requests/optimizer/{layout.ANSWER}", f"requests/evaluator/{layout.ANSWER}"),
        Answer,
        "What became of a request.",
    ),
    Document(
        "best_parameters",
        (f"results/{layout.BEST_PARAMETERS}",),
        BestParameters,
        "The best trial so far, ready to be trained again.",
    ),
    Document("all_trials", (f"results/{layout.ALL_TRIALS}",), AllTrials, "Every trial of the study."),
    Document(
        "pareto_front",
        (f"results/analysis/{layout.PARETO_FRONT}",),
        ParetoFront,
        "The best trade-offs, when the study has several objectives.",
    ),
    Document(
        "summary_statistics",
        (f"results/analysis/{layout.SUMMARY_STATISTICS}",),
        SummaryStatistics,
        "What the study found, in figures.",
    ),
)
"""Every kind of file that crosses a process boundary."""

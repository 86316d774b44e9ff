"""A study folder as both daemons leave it, written in milliseconds: every figure of it is known beforehand.

Trial `n`, epoch `e` shows brightness `target + (n - 1) * step + LEARNING / e`, plus a wave over the pictures that is
the same for all checkpoints but for a little noise: trial 1 is the best, and its last epoch. `Written` says
what differs.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import fmean, pstdev

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from optimizer_daemon.results import all_trials, write_results
from optimizer_daemon.search.objectives import objectives_of_run
from optimizer_daemon.trial_table import TrialTable
from shared.files import read_model, to_bytes
from shared.layout import RenderLayout, StudyLayout
from shared.schemas import (
    Attempt,
    Baseline,
    CheckpointRecord,
    CurvePoint,
    EvaluationPlan,
    EvaluationState,
    Gate,
    GateCheck,
    Metric,
    Metrics,
    PhaseSeconds,
    Run,
    Sample,
    ScoringPreset,
    Trainer,
    TrainerExit,
    TrialParams,
    TrialState,
)
from shared.scores.from_values import scores_from_values, values_of

BEGIN = datetime(2025, 11, 15, 10, 0, tzinfo=UTC)
LEARNING = 0.05
WAVE = (0.01, -0.02, 0.03, 0.0, -0.01, 0.02, -0.03, 0.005)
OBJECTIVES = ("brightness_score", "contrast_score")
PROMPTS = ("a red ball", "a blue cube", "a green cone", "a yellow ring")


@dataclass(frozen=True)
class Written:
    """What a written study is made of.

    Args:
        trials: how many.
        epochs: whose checkpoints were kept, the last of them the final one.
        pictures: per checkpoint.
        step: how much brighter each trial is than the one before.
        states: trial -> its state, where it is not complete.
        black: trials whose final checkpoint shows black pictures.
        shift: (trial, epoch) -> what is added to its brightness.
        noise: spread of what differs between two checkpoints' pictures besides their means.
        base_shift: brightness of the base model above the target; None for a base that was not rendered yet.
        finalists: trial -> the trial that it repeats.
        objectives: (brightness_score, contrast_score) besides the one score, where asked.
        baselines: name -> its brightness above the target.
        parameters: further parameters of every trial.
        trainer: of the study.
        base_model: its path.
        settings: of run.json.
    """

    trials: int = 3
    epochs: tuple[int, ...] = (2, 4, 6)
    pictures: int = 8
    step: float = 0.01
    states: Mapping[int, str] = field(default_factory=dict)
    black: tuple[int, ...] = ()
    shift: Mapping[tuple[int, int], float] = field(default_factory=dict)
    noise: float = 0.0002
    base_shift: float | None = 0.3
    finalists: Mapping[int, int] = field(default_factory=dict)
    objectives: bool = False
    baselines: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, str | int | float] = field(default_factory=dict)
    trainer: Trainer = field(default_factory=lambda: Trainer(name="native"))
    base_model: str = "/models/base"
    settings: Mapping[str, str | int | None] = field(
        default_factory=lambda: {"dataset-config": "/data/dataset.toml", "save-every-n-epochs": 2, "seed": 42}
    )


def write_study(root: Path, written: Written | None = None, *, storage: bool = True) -> StudyLayout:
    """Write the folder with results/all_trials.json, and Optuna's storage of the same trials where asked."""
    written = written or Written()
    study = StudyLayout(root)
    root.mkdir(exist_ok=True)
    plan = plan_of(written.pictures)
    _write(study.run, _run(study, plan, written))
    for number in range(1, written.trials + 1):
        _write_trial(study, plan, number, written)
    if written.base_shift is not None:
        _write_render(study.base_render(plan.digest()), plan, "reference", "base", None, written.base_shift, written, 0)
    for name, shift in written.baselines.items():
        place = study.evaluations("baseline").checkpoint(name)
        _write_render(place, plan, "baseline", name, None, shift, written, 0)
    table = TrialTable(study)
    objectives = objectives_of_run(read_model(study.run, Run))
    trials = all_trials(table, "written", plan.scoring.objective, BEGIN, objectives)
    write_results(study, trials, table)
    if storage:
        stored = optuna.create_study(study_name="written", storage=f"sqlite:///{study.database}")
        stored.add_trials([_stored(study, trial) for trial in trials.trials])
    return study


def _write(path: Path, model) -> None:
    path.write_bytes(to_bytes(model))  # thousands of files: nobody needs them to survive a loss of power


def plan_of(pictures: int) -> EvaluationPlan:
    return EvaluationPlan(
        prompts=PROMPTS, negative_prompt="", num_samples=pictures, base_seed=42, width=64, height=64, steps=2,
        sampler="dpmpp_2m_karras", cfg_scale=7.5, clip_skip=1, base_digest="a" * 64, vae_digest=None, lora_scale=1.0,
        dtype="float32", batch_size=8, scoring=ScoringPreset(name="combined", objective="combined_score", values={}),
    )  # fmt: skip


def brightness_of(number: int, epoch: int, written: Written) -> float:
    """The mean that a checkpoint of a trial is written with."""
    return 0.5 + (number - 1) * written.step + LEARNING / epoch + written.shift.get((number, epoch), 0.0)


def parameters_of(number: int, written: Written) -> dict[str, str | int | float]:
    rng = random.Random(number)
    dim = rng.choice((64, 128))
    return {
        "learning_rate": 1e-4 * (1 + 0.01 * number),
        "text_encoder_lr": 10 ** rng.uniform(-4.5, -4),
        "network_dim": dim,
        "network_alpha": dim // 2,
        "optimizer_type": rng.choice(("AdamW", "AdamW8bit")),
        "max_train_epochs": written.epochs[-1],
        **written.parameters,
    }


def _run(study: StudyLayout, plan: EvaluationPlan, written: Written) -> Run:
    baselines = {name: Baseline(file=f"/loras/{name}.safetensors", sha256="0" * 64) for name in written.baselines}
    objectives = {"objectives": ",".join(OBJECTIVES)} if written.objectives else {}
    return Run(
        folder_id=secrets.token_hex(8), study_name="written", storage=f"sqlite:///{study.database}",
        workload="sd-lora", score_source="evaluator", status="finished", created=BEGIN, updated=BEGIN,
        base_model=written.base_model, plan=plan, plan_hash=plan.digest(), trainer=written.trainer,
        settings={**written.settings, **objectives}, baselines=baselines, threads_per_process=1,
        versions={"lora-tuner": "0.1.0"},
    )  # fmt: skip


def _write_trial(study: StudyLayout, plan: EvaluationPlan, number: int, written: Written) -> None:
    trial = study.trial(number)
    trial.evaluations.folder.mkdir(parents=True, exist_ok=True)
    state = written.states.get(number, "complete")
    params = TrialParams(
        trial=number, optuna_number=number - 1, parameters=parameters_of(number, written),
        derived=("network_alpha",), training_seed=number, finalist_of=written.finalists.get(number),
        origin="finalist" if number in written.finalists else "sampler",
    )  # fmt: skip
    _write(trial.params, params)
    epochs = written.epochs if state in ("complete", "trained") else written.epochs[:-1]
    if state in ("failed", "drawn"):
        epochs = ()
    records, curve, final = [], [], None
    for epoch in epochs:
        name = trial.output_name if epoch == written.epochs[-1] else f"{trial.output_name}-{epoch:06d}"
        (trial.folder / f"{name}.safetensors").write_bytes(b"")
        shift = brightness_of(number, epoch, written) - 0.5
        render = trial.evaluations.checkpoint(name)
        metrics = _write_render(render, plan, trial.name, name, epoch, shift, written, number)
        value = metrics.scores[plan.scoring.objective].value
        assert value is not None
        curve.append(CurvePoint(epoch=epoch, value=value, checkpoint=name))
        attempt = Attempt(started=BEGIN, ended=BEGIN, outcome="recorded")
        record = CheckpointRecord(
            checkpoint=name, checkpoint_sha256=metrics.checkpoint_sha256, plan_hash=plan.digest(), epoch=epoch, size=0,
            modified_ns=1, status="recorded", attempts=(attempt,),
        )  # fmt: skip
        records.append(record)
        final = metrics
    _write(trial.evaluations.state, EvaluationState(trial_name=trial.name, updated=BEGIN, checkpoints=tuple(records)))
    started = BEGIN + timedelta(hours=number - 1)
    ends = state in ("complete", "pruned", "failed")
    complete = state == "complete" and final is not None
    if complete:
        assert final is not None
        trial.final_evaluation.folder.mkdir(exist_ok=True)
        _write(trial.final_evaluation.metrics, final)
    _write(
        trial.state,
        TrialState(
            trial=number, optuna_number=number - 1, state=state, attempt=1, drawn=started,
            started=None if state == "drawn" else started, ended=started + timedelta(minutes=40) if ends else None,
            reason=None if state in ("complete", "training", "trained", "drawn") else f"the {state} trial's reason",
            value=curve[-1].value if complete else None,
            objectives=_objectives(final) if complete and written.objectives else {},
            feasible=final.gate.feasible if complete and final is not None else None, curve=tuple(curve),
        ),
    )  # fmt: skip
    if ends:
        _write(
            trial.trainer_exit,
            TrainerExit(
                command=("train",), pid=1, exit_status=0, signal=None, started=started,
                ended=started + timedelta(minutes=30), seconds=1800.0, peak_memory=2**30,
            ),
        )  # fmt: skip


def _objectives(final: Metrics | None) -> dict[str, float]:
    assert final is not None
    found = {name: final.scores[name].value for name in OBJECTIVES}
    return {name: value for name, value in found.items() if value is not None}


def _write_render(
    render: RenderLayout, plan: EvaluationPlan, place: str, name: str, epoch: int | None, shift: float,
    written: Written, number: int,
) -> Metrics:  # fmt: skip
    render.folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{place} {name}")
    waves = [WAVE[i % len(WAVE)] + rng.gauss(0, written.noise) for i in range(plan.num_samples)]
    of = {
        "brightness": [0.5 + shift + wave for wave in waves],
        "contrast": [0.2 + wave / 4 for wave in waves],
        "saturation": [0.4 + wave for wave in waves],
    }
    figures = {
        key: Metric(
            version="1", direction="target", status="ok", value=fmean(values), std=pstdev(values),
            per_image=tuple(values),
        )
        for key, values in of.items()
    }  # fmt: skip
    black = number in written.black and epoch == written.epochs[-1]
    check = GateCheck(passed=not black, reason="image 0 is black" if black else None)
    metrics = Metrics(
        trial_name=place, checkpoint=name, plan_hash=plan.digest(), epoch=epoch, evaluation_time=BEGIN,
        checkpoint_sha256=None if place == "reference" else f"{number:032x}{epoch or 0:032x}",
        samples=tuple(
            Sample(file=f"sample_{i}.png", prompt=plan.sample(i).prompt, seed=plan.sample(i).seed)
            for i in range(plan.num_samples)
        ),
        metrics=figures, scores=scores_from_values(values_of(figures), plan.scoring),
        gate=Gate(feasible=not black, checks={"sentinels": check}),
        seconds=PhaseSeconds(load=0.1, render=4.0, measure=0.9, total=5.0), batch_size=8, device="cpu",
        library_versions={},
    )  # fmt: skip
    _write(render.metrics, metrics)
    return metrics


def _stored(study: StudyLayout, trial) -> FrozenTrial:
    """The trial as the optimizer tells it to Optuna."""
    distributions = {
        "learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
        "text_encoder_lr": FloatDistribution(1e-5, 1e-3, log=True),
        "network_dim": CategoricalDistribution((64, 128)),
        "optimizer_type": CategoricalDistribution(("AdamW", "AdamW8bit")),
    }
    known = {name: distribution for name, distribution in distributions.items() if name in trial.parameters}
    states = {"complete": OptunaState.COMPLETE, "pruned": OptunaState.PRUNED, "failed": OptunaState.FAIL}
    return create_trial(
        state=states.get(trial.state, OptunaState.RUNNING),
        value=trial.value,
        params={name: trial.parameters[name] for name in known},
        distributions=known,
        system_attrs={"constraints": (1.0,) if trial.feasible is False else (0.0,)} if trial.value is not None else {},
        intermediate_values={point.epoch: point.value for point in trial.curve},
    )

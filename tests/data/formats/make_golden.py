"""Makes the golden files beside it: one of every format, from one imaginary but consistent study.

`python -m tests.data.formats.make_golden` writes v1/. Golden files are never changed once released: every later
version must read them, so a format that changes gets a folder of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from datetime import datetime, timedelta, timezone
from pathlib import Path

from pydantic import BaseModel

from shared import files
from shared import schemas as s
from shared.schemas import results as r
from shared.schemas.pictures import Picture, StudyPictures

V1 = Path(__file__).parent / "v1"
TAIPEI = timezone(timedelta(hours=8))
PROMPTS = (
    "a red ball on black background, pixar style",
    "a blue cube on white background, pixar style",
    "a green cone on grey background, pixar style",
    "黃色的球, 藍色背景, pixar style",
)
PARAMETERS: dict[str, s.Scalar] = {
    "learning_rate": 8.7e-05,
    "text_encoder_lr": 4.1e-05,
    "network_dim": 128,
    "network_alpha_ratio": 0.75,
    "network_alpha": 96,
    "optimizer_type": "AdamW",
    "lr_scheduler": "cosine",
    "gradient_accumulation_steps": 2,
    "max_train_epochs": 4,
    "lr_warmup_steps": 150,
}
VERSIONS = {"lora-tuner": "0.1.0", "python": "3.11.7", "torch": "2.8.0", "diffusers": "0.36.0"}


def at(clock: str) -> datetime:
    """Return a moment of the study's day in Taipei."""
    return datetime.fromisoformat(f"2025-11-15T{clock}+08:00")


def digest(of: str) -> str:
    return hashlib.sha256(of.encode()).hexdigest()


PLAN = s.EvaluationPlan(
    prompts=PROMPTS,
    negative_prompt="",
    num_samples=4,
    base_seed=42,
    width=64,
    height=64,
    steps=20,
    sampler="dpmpp_2m_karras",
    cfg_scale=7.5,
    clip_skip=1,
    base_digest=digest("tiny base model"),
    vae_digest=None,
    lora_scale=1.0,
    dtype="float32",
    batch_size=4,
    scoring=s.ScoringPreset(
        name="seed",
        objective="combined_score",
        values={"target.brightness": 0.5, "target.contrast": 0.2, "weight.std": 0.5, "gate.clip_margin": -0.02},
    ),
)
EPOCH_2, FINAL = "lora_trial_5-000002", "lora_trial_5"


def documents() -> dict[str, BaseModel]:
    """Return one document of each kind by its name in `DOCUMENTS`."""
    return _of_the_optimizer() | _of_the_evaluator() | _of_commands()


def _of_the_optimizer() -> dict[str, BaseModel]:
    curve = (
        s.CurvePoint(epoch=2, value=0.069232, checkpoint=EPOCH_2),
        s.CurvePoint(epoch=4, value=0.044, checkpoint=FINAL),
    )
    pruned = PARAMETERS | {"learning_rate": 6.2e-05, "network_alpha_ratio": 0.25, "network_alpha": 32}
    return {
        "run": s.Run(
            folder_id="4f2a9c0d7be14c55",
            study_name="tiny_pixar",
            storage="sqlite:////data/tiny_pixar/optuna_study.db",
            workload="sd-lora",
            score_source="evaluator",
            status="running",
            created=at("09:00:00"),
            updated=at("09:00:02"),
            base_model="/data/models/tiny_base",
            plan=PLAN,
            plan_hash=PLAN.digest(),
            pictures=StudyPictures(
                held_out=(Picture(path="/data/luca/images/07.png", sha256=digest("07.png")),),
                training=(Picture(path="/data/luca/images/08.png", sha256=digest("08.png")),),
            ),
            dataset_files={
                f"/data/luca/{name}": digest(name) for name in ("dataset.toml", "images/08.png", "images/08.txt")
            },
            trainer=s.Trainer(name="native", version="0.1.0", python="/opt/lora-tuner/bin/python"),
            settings={
                "dataset-config": "/data/luca/dataset.toml",
                "n-trials": 20,
                "max-epochs": None,
                "seed": 42,
                "gpus": ("0",),
            },
            warm_up_rule=s.WarmUpRule(
                when="2 * lr_warmup_steps > -(-36 // gradient_accumulation_steps) * max_train_epochs",
                reason="A warm-up takes at most half of all optimizer steps (here of 36 batches an epoch)",
            ),
            stage=s.StageOfRun(name="fine", number=2, of=3, trials=20, epochs=12, study_trials=35),
            threads_per_process=1,
            versions=VERSIONS,
        ),
        "params": s.TrialParams(
            trial=5,
            optuna_number=4,
            parameters=PARAMETERS,
            derived=("network_alpha",),
            origin="sampler",
            training_seed=1337,
        ),
        "trial_state": s.TrialState(
            trial=5,
            optuna_number=4,
            state="complete",
            attempt=1,
            drawn=at("10:00:00"),
            started=at("10:00:03"),
            ended=at("10:46:30"),
            value=0.044,
            feasible=True,
            curve=curve,
            deleted=(f"{EPOCH_2}.safetensors",),
        ),
        "trainer_exit": s.TrainerExit(
            command=("/opt/lora-tuner/bin/python", "-m", "optimizer_daemon.lora_training.train", "trial_0005"),
            pid=48123,
            exit_status=0,
            signal=None,
            started=at("10:00:03"),
            ended=at("10:44:41"),
            seconds=2678.4,
            start_ticks=7_203_115,
            boot_id="6d1f3b6a-8f5c-4c0e-9a57-2f0c1f9f7a11",
            peak_memory=6_818_373_632,
            oom_kills=0,
        ),
        "best_parameters": s.BestParameters(
            study_name="tiny_pixar",
            updated=at("10:46:31"),
            trial=5,
            optuna_number=4,
            objective="combined_score",
            direction="minimise",
            value=0.044,
            checkpoint=f"trial_0005/{FINAL}.safetensors",
            checkpoint_sha256=digest(FINAL),
            epoch=4,
            parameters=PARAMETERS,
            derived=("network_alpha",),
            tie_set=(3, 5),
        ),
        "all_trials": s.AllTrials(
            study_name="tiny_pixar",
            updated=at("10:46:31"),
            objective="combined_score",
            direction="minimise",
            trials=(
                s.TrialResult(
                    trial=4,
                    optuna_number=3,
                    state="pruned",
                    reason="epoch 4: 0.251 is worse than the median of 6 peers",
                    value=0.251,
                    feasible=True,
                    parameters=pruned,
                    derived=("network_alpha",),
                    curve=(s.CurvePoint(epoch=4, value=0.251, checkpoint="lora_trial_4-000004"),),
                    started=at("09:15:00"),
                    ended=at("09:58:12"),
                ),
                s.TrialResult(
                    trial=5,
                    optuna_number=4,
                    state="complete",
                    value=0.044,
                    feasible=True,
                    parameters=PARAMETERS,
                    derived=("network_alpha",),
                    curve=curve,
                    started=at("10:00:03"),
                    ended=at("10:46:30"),
                ),
            ),
        ),
        "pareto_front": s.ParetoFront(
            study_name="tiny_pixar",
            updated=at("10:46:31"),
            objectives=(
                s.Objective(name="brightness", direction="minimise", target=0.5),
                s.Objective(name="clip_consistency", direction="maximise"),
            ),
            front=(
                s.FrontMember(
                    trial=5,
                    optuna_number=4,
                    values={"brightness": 0.012, "clip_consistency": 0.31},
                    value=0.044,
                    checkpoint=f"trial_0005/{FINAL}.safetensors",
                    knee_distance=0.0,
                ),
                s.FrontMember(
                    trial=4,
                    optuna_number=3,
                    values={"brightness": 0.031, "clip_consistency": 0.33},
                    value=0.251,
                    checkpoint="trial_0004/lora_trial_4.safetensors",
                    knee_distance=0.0,
                ),
            ),
            knee=5,
            reference_point={"brightness": 0.033, "clip_consistency": 0.308},
            hypervolume=0.000082,
            history=(s.FrontGrowth(trial=4, hypervolume=0.000044), s.FrontGrowth(trial=5, hypervolume=0.000082)),
        ),
    }


def _of_the_evaluator() -> dict[str, BaseModel]:
    return {
        "metrics": s.Metrics(
            trial_name="trial_0005",
            checkpoint=EPOCH_2,
            checkpoint_sha256=digest(EPOCH_2),
            plan_hash=PLAN.digest(),
            epoch=2,
            evaluation_time=at("10:23:45"),
            samples=tuple(s.Sample(file=f"sample_{i}.png", **dataclasses.asdict(PLAN.sample(i))) for i in range(4)),
            metrics={
                "brightness": _measured(0.451, 0.498, 0.523, 0.576),
                "contrast": _measured(0.142, 0.17, 0.189, 0.211),
                "saturation": _measured(0.38, 0.41, 0.437, 0.465),
                "lpips_diversity": s.Metric(
                    version="1",
                    direction="target",
                    status="unavailable",
                    reason="no LPIPS weights at /data/models/lpips; pass --lpips-weights",
                    value=None,
                ),
            },
            scores={
                "brightness_score": s.Score(value=0.03455, direction="minimise"),
                "contrast_score": s.Score(value=0.034682, direction="minimise"),
                "combined_score": s.Score(value=0.069232, direction="minimise"),
                "preset_40_30_30": s.Score(value=None, direction="minimise", left_out=("lpips_diversity",)),
            },
            gate=s.Gate(
                feasible=True,
                checks={
                    "not_black": s.GateCheck(passed=True, value=0.451, limit=0.02),
                    "clip_consistency": s.GateCheck(passed=None, limit=-0.02, reason="no CLIP weights were given"),
                },
            ),
            seconds=s.PhaseSeconds(load=0.71, render=1.94, measure=0.12, total=2.83),
            batch_size=4,
            device="cpu",
            library_versions=VERSIONS,
        ),
        "evaluation_summary": s.EvaluationSummary(
            trial_name="trial_0005",
            total_checkpoints_evaluated=2,
            checkpoints={
                EPOCH_2: _summary_entry(
                    2, (0.512, 0.178, 0.423), (0.0451, 0.025364, 0.031662), 0.069232, EPOCH_2, "10:23:45"
                ),
                FINAL: _summary_entry(4, (0.505, 0.191, 0.418), (0.04, 0.02, 0.03), 0.044, FINAL, "10:46:29"),
            },
            last_update=at("10:46:30"),
            best=s.BestCheckpoint(
                checkpoint=FINAL,
                epoch=4,
                objective="combined_score",
                score=0.044,
                certainty=0.87,
                tie_set=(FINAL, EPOCH_2),
            ),
        ),
        "evaluation_plan": s.LabelledPlan(
            label="finalists",
            plan=PLAN,
            files={EPOCH_2: f"/data/study/trial_0005/{EPOCH_2}.safetensors", "base": None},
        ),
        "evaluation_state": s.EvaluationState(
            trial_name="trial_0005",
            updated=at("10:46:30"),
            checkpoints=(
                s.CheckpointRecord(
                    checkpoint=EPOCH_2,
                    checkpoint_sha256=digest(EPOCH_2),
                    plan_hash=PLAN.digest(),
                    epoch=2,
                    size=226113,
                    modified_ns=1763173418120000000,
                    status="recorded",
                    attempts=(
                        s.Attempt(
                            started=at("10:23:31"),
                            ended=at("10:23:36"),
                            outcome="interruption",
                            reason="stopped by signal 15",
                        ),
                        s.Attempt(started=at("10:23:42"), ended=at("10:23:45"), outcome="recorded"),
                    ),
                ),
                s.CheckpointRecord(
                    checkpoint="lora_trial_5-000003",
                    checkpoint_sha256=None,
                    plan_hash=PLAN.digest(),
                    epoch=3,
                    size=1024,
                    modified_ns=1763174018120000000,
                    changed_s=1763174018.1234567,
                    status="quarantined",
                    quarantine=s.Quarantine(
                        code="overlap", reason="two tensors share bytes 512 to 1024", since=at("10:33:40")
                    ),
                ),
            ),
        ),
        "evaluator_manager_state": s.EvaluatorManagerState(
            status="running",
            host="workstation",
            pid=47990,
            started=at("09:00:05"),
            heartbeat=at("10:23:43"),
            device="cpu",
            gpu_policy="share",
            waiting_checkpoints=1,
            evaluators=(
                s.ActiveEvaluator(
                    trial_name="trial_0005",
                    pid=48200,
                    started=at("10:00:10"),
                    activity="evaluating",
                    checkpoint=EPOCH_2,
                ),
            ),
            quarantine=(
                s.QuarantinedCheckpoint(
                    trial_name="trial_0002",
                    checkpoint="lora_trial_2",
                    code="three_strikes",
                    reason="rendering ended three times by signal 11",
                    since=at("09:31:12"),
                ),
            ),
        ),
    }


def _measured(*per_image: float) -> s.Metric:
    return s.Metric(
        version="1",
        direction="target",
        status="ok",
        value=round(statistics.fmean(per_image), 6),
        std=round(statistics.pstdev(per_image), 6),
        per_image=per_image,
    )


def _summary_entry(
    epoch: int, means: tuple[float, ...], stds: tuple[float, ...], score: float, content: str, clock: str
) -> s.SummaryEntry:
    """Return an entry; `means` and `stds` are those of brightness, contrast and saturation."""
    return s.SummaryEntry(
        epoch=epoch,
        mean_brightness=means[0],
        mean_contrast=means[1],
        mean_saturation=means[2],
        evaluation_time=at(clock),
        std_brightness=stds[0],
        std_contrast=stds[1],
        std_saturation=stds[2],
        scores={"combined_score": score, "preset_40_30_30": None},
        metric_status={"brightness": "ok", "contrast": "ok", "saturation": "ok", "lpips_diversity": "unavailable"},
        feasible=True,
        checkpoint_sha256=digest(content),
        plan_hash=PLAN.digest(),
        seconds=2.83,
    )


def _of_commands() -> dict[str, BaseModel]:
    return {
        "summary_statistics": r.SummaryStatistics(
            study_name="tiny_pixar",
            updated=at("10:46:40"),
            objective="combined_score",
            direction="minimise",
            trials={"complete": 3, "pruned": 1, "failed": 1},
            winner=r.WinnerFigures(
                trial=5,
                optuna_number=4,
                value=0.044,
                checkpoint=f"trial_0005/{FINAL}.safetensors",
                epoch=4,
                certainty=0.71,
                tie_set=(5, 3),
                compared=3,
                pictures=4,
                why_not="",
            ),
            values=r.Spread(count=3, mean=0.086, std=0.045, minimum=0.044, median=0.066, maximum=0.148),
            metrics={
                "brightness": r.Spread(count=3, mean=0.52, std=0.02, minimum=0.49, median=0.52, maximum=0.55),
            },
            goals={"winner": {"brightness": r.GoalFigures(low=0.45, high=0.55, value=0.51, missed_by=0.0)}},
            against={
                "base model": {
                    "combined_score": r.DifferenceFigures(
                        winner=0.044, other=0.251, difference=-0.207, low=-0.26, high=-0.154, verdict="better"
                    )
                }
            },
            rates={
                "stable": r.RateFigures(
                    count=3,
                    of=4,
                    share=0.75,
                    meaning="trained to the end, no picture black or flat",
                    before="40-50 %",
                    hoped="80-90 %",
                )
            },
            importances={"learning_rate": r.ImportanceFigures(share=0.62, low=0.31, high=0.84)},
            correlations=(
                r.CorrelationFigures(
                    parameter="learning_rate", figure="combined_score", rho=-0.4, low=-0.9, high=0.6, trials=4
                ),
            ),
            overtaken=(
                r.EarlierCheckpoint(
                    trial=3,
                    checkpoint="lora_trial_3-000002",
                    file="trial_0003/lora_trial_3-000002.safetensors",
                    epoch=2,
                    score=0.051,
                    final_score=0.066,
                    tie_set=("lora_trial_3-000002",),
                ),
            ),
            best_checkpoint=r.BestAnywhere(trial=5, checkpoint=FINAL, epoch=4, score=0.044),
            failures=(r.Failure(trial=2, reason="out of memory on the GPU"),),
            times=r.TimeFigures(
                first=at("10:02:11"),
                last=at("10:46:31"),
                training=1820.5,
                evaluation=301.2,
                median_trial=512.0,
                median_evaluation=25.1,
            ),
            problems=("trial_0001/params.json: missing",),
        ),
        "optimizer_request": s.OptimizerRequest(
            s.Enqueue(
                kind="enqueue",
                parameters={"learning_rate": 0.0001, "network_dim": 128, "network_alpha_ratio": 0.5},
                asked_by="anna@workstation",
                asked=at("11:02:10"),
            )
        ),
        "evaluator_request": s.EvaluatorRequest(
            s.Evaluate(
                kind="evaluate",
                file=f"trial_0005/{FINAL}.safetensors",
                label="finalists",
                priority=5,
                asked_by="optimizer-daemon",
                asked=at("12:00:00"),
            )
        ),
        "answer": s.Answer(
            request="20251115T030210.000000Z-7c1e9a52.json",
            kind="enqueue",
            ok=True,
            result={"trial": 6},
            answered=at("11:02:11"),
        ),
    }


def write_all(folder: Path) -> None:
    """Write every document to <folder>/<name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in documents().items():
        files.write_model(folder / f"{name}.json", model)


if __name__ == "__main__":
    write_all(V1)

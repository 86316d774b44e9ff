"""A study's run.json as the optimizer leaves it, for evaluators that have the trials to themselves."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from shared.files import write_model
from shared.layout import StudyLayout
from shared.planning import make_plan
from shared.schemas import Run, Trainer

NOON = datetime(2025, 11, 15, 12, tzinfo=UTC)


def write_run(
    study: StudyLayout,
    base_model: Path,
    prompts: Sequence[str],
    *,
    samples: int,
    steps: int,
    threads: int = 1,
    clip_model: Path | None = None,
) -> None:
    """Make the folder of a finished study whose trials are evaluated on the CPU.

    Args:
        samples: pictures per checkpoint.
        steps: sampling steps of each.
        threads: CPU threads of an evaluator.
    """
    plan = make_plan(
        base_model=base_model,
        prompts=prompts,
        device="cpu",
        num_samples=samples,
        steps=steps,
        clip_model=clip_model,
    )
    run = Run(
        folder_id="0123456789abcdef",
        study_name="written",
        storage=f"sqlite:///{study.database}",
        workload="stable_diffusion_lora",
        score_source="evaluator",
        status="finished",
        created=NOON,
        updated=NOON,
        base_model=str(base_model),
        plan=plan,
        plan_hash=plan.digest(),
        trainer=Trainer(name="native"),
        settings={"clip-model": str(clip_model)} if clip_model else {},
        threads_per_process=threads,
        versions={},
    )
    study.root.mkdir(parents=True, exist_ok=True)
    write_model(study.run, run)

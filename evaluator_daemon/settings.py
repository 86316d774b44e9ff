"""What the evaluator daemon can be told."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from shared.gpu_lease import GpuPolicy
from shared.settings import DaemonSettings


class EvaluatorSettings(DaemonSettings):
    """Flags, `[evaluator]` in the study file, or EVALUATOR_DAEMON_* variables."""

    table: ClassVar[str] = "evaluator"

    optimization_dir: Path | None = Field(None, description="study folder to watch (the optimizer's --output-dir)")
    base_model: Path | None = Field(
        None, description="base model, a diffusers folder or one .safetensors file (default: the study's)"
    )
    clip_model: Path | None = Field(
        None, description="local CLIP folder for the CLIP consistency (default: the study's)"
    )
    dino_model: Path | None = Field(
        None, description="local DINOv2 folder for likeness and memorisation (default: the study's)"
    )
    lpips_weights: Path | None = Field(
        None, description="file of LPIPS' backbone, e.g. torchvision's AlexNet (default: the study's)"
    )
    metrics: str | None = Field(None, description="what is measured, names with commas between (default: the study's)")
    scoring: str | None = Field(None, description="a scoring preset or a TOML file (default: the study's, or combined)")
    reference_pictures: Path | None = Field(
        None, description="folder of pictures that likeness is measured to, in a folder without run.json"
    )
    prompts: Path | None = Field(
        None, description="prompt file: lines, TOML or JSON, see docs/prompts.md (default: the study's)"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    num_samples: int = Field(8, ge=1, description="pictures per checkpoint")
    lora_scale: float = Field(
        1.0,
        allow_inf_nan=False,
        description="strength the LoRA is applied with; 1 is as trained",
    )
    gpu_policy: GpuPolicy | None = Field(
        None,
        description="share: evaluate beside the training when memory allows; defer: wait until no training runs, on a "
        "CPU too (default: the study's, else share)",
    )
    check_interval: float = Field(30.0, gt=0, description="seconds until a new trial is seen at the latest")
    evaluator_check_interval: float = Field(
        30.0, gt=0, description="seconds until a live evaluator sees a new checkpoint at the latest"
    )
    idle_timeout: float = Field(
        900.0, gt=0, description="seconds without a change after which a trial without state files counts as over"
    )

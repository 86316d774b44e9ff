"""What the optimizer daemon can be told."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, field_validator

from optimizer_daemon.search.load import preset_names as search_spaces
from optimizer_daemon.search.objectives import split
from optimizer_daemon.search.pruning import PrunerName
from optimizer_daemon.trainers import TRAINERS
from shared.errors import SettingsError
from shared.gpu_lease import GpuPolicy
from shared.scoring_presets import preset_names as scorings
from shared.settings import DaemonSettings, LoadedSettings, load_settings, read_trainer_options

COMMAND_LINES = {"command": ("command", "resume")}
"""By trainer: settings of its table that may be a whole command line."""

DEFAULT_FINALISTS = 3  # of 15 trials or more

ModelFamily = Literal["sd15", "sdxl"]


class OptimizerSettings(DaemonSettings):
    """Flags, `[optimizer]` in the study file, or OPTIMIZER_DAEMON_* variables."""

    table: ClassVar[str] = "optimizer"

    dataset_config: Path | None = Field(None, description="training data set, a kohya dataset TOML file")
    base_model: Path | None = Field(
        None, description="Stable Diffusion base model, a diffusers folder or one .safetensors file"
    )
    clip_model: Path | None = Field(
        None, description="CLIP model folder for the prompt check of every checkpoint (default: not checked)"
    )
    dino_model: Path | None = Field(
        None, description="local DINOv2 folder for likeness and memorisation (default: not measured)"
    )
    lpips_weights: Path | None = Field(
        None, description="file of LPIPS' backbone, e.g. torchvision's AlexNet (default: not measured)"
    )
    output_dir: Path | None = Field(
        None,
        description="study folder; everything of the study is written below it. Latents of the native trainer, which "
        "studies share, lie in [trainer.native] latent_cache_dir",
    )
    study_name: str = Field("lora_study", min_length=1, description="name of the study; the same name continues it")
    storage: str | None = Field(None, description="Optuna storage URL (default: SQLite in the study folder)")
    n_trials: int = Field(30, ge=1, description="finished trials to reach, counted over all runs of the stage")
    max_epochs: int | None = Field(None, ge=1, description="train every trial for exactly this many epochs")
    stages: Path | None = Field(
        None,
        description="TOML file of a staged search, in place of --n-trials and --max-epochs, see docs/stages.md",
    )
    timeout: float | None = Field(None, gt=0, description="seconds after which this run starts no new trial")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    gpus: str | None = Field(
        None, description="train once on each of these GPUs, numbers with commas between (default: --device)"
    )
    jobs: int | None = Field(None, ge=1, description="trainings at once on --device (default: 1)")
    gpu_policy: GpuPolicy = Field(
        "share",
        description="share: score beside the training when memory allows; defer: train and score in turns, without "
        "pruning, on a CPU too",
    )
    search_space: str = Field("v2.1", description="a preset (v1, v2.1) or a TOML file")
    trainer: str | None = Field(
        None,
        min_length=1,
        description="who trains: native, kohya, command, or one of your own as module:attribute (default: kohya with "
        "--sd-scripts-dir, else native)",
    )
    sd_scripts_dir: Path | None = Field(
        None, description="checkout of kohya-ss/sd-scripts (default: SD_SCRIPTS_DIR); for --trainer kohya"
    )
    trainer_python: Path | None = Field(
        None, description="Python of the trainer's own environment (default: this one; kohya: its checkout's venv)"
    )
    model_family: ModelFamily | None = Field(
        None, description="family of the base model, sd15 or sdxl (default: as the model itself says)"
    )
    baseline: tuple[str, ...] = Field(
        (),
        description="a LoRA of yours as NAME=FILE, repeatable: scored like a checkpoint before the first trial, and "
        "shown beside every trial",
    )
    sampler: str = Field(
        "tpe",
        min_length=1,
        description="how parameters are drawn: tpe, gp, auto (gp and tpe in turns), cmaes, nsga2, random",
    )
    finalists: int | None = Field(
        None,
        ge=0,
        description="how many of the last trials train the best configurations again with fresh seeds; the winner is "
        "named from them (default: with --sampler auto every fifth trial, at most 3; else or with --objectives none)",
    )
    pruner: PrunerName = Field(
        "median",
        description="which running trainings are stopped by their scores: what is worse than the median of its peers, "
        "than three quarters of them (percentile), or none",
    )
    pruner_warmup_epochs: int = Field(4, ge=1, description="no training is stopped before this epoch")
    metrics: str | None = Field(
        None,
        description="what is measured, names with commas between, see evaluator-daemon metrics (default: pixels, "
        "clip_consistency, what --scoring needs, lpips_diversity with --lpips-weights, memorisation with a CLIP or "
        "DINOv2)",
    )
    scoring: str = Field("combined", min_length=1, description="what is optimised: a scoring preset or a TOML file")
    objectives: str | None = Field(
        None,
        min_length=1,
        description="several things to optimise at once, two or more scores or metrics with commas between, such as "
        "brightness,contrast: a front of trade-offs in place of one winner (default: the score of --scoring)",
    )
    seed: int = Field(42, ge=0, lt=2**63, description="seed of the search and of every trial's draw")
    save_every_n_epochs: int = Field(2, ge=1, description="epochs between two checkpoints")
    num_samples: int = Field(8, ge=1, description="pictures per checkpoint")
    lora_scale: float = Field(
        1.0, allow_inf_nan=False, description="strength the LoRA is applied with in the pictures; 1 is as trained"
    )
    prompts: Path | None = Field(
        None,
        description="prompt file: lines, TOML or JSON, see docs/prompts.md (default: captions of the data set)",
    )
    cfg_scale: float = Field(7.5, ge=0, description="classifier-free guidance scale of the pictures")
    render_steps: int = Field(20, ge=1, description="sampling steps of the pictures")

    @field_validator("objectives")
    @classmethod
    def _one_spelling(cls, names: str | None) -> str | None:
        return None if names is None else ",".join(split(names))

    _trainer_options: dict[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("gpus", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Take the list, or the one number, that people write in a TOML file."""
        numbers = value if isinstance(value, list) else [value]
        return ",".join(map(str, numbers)) if all(type(number) is int for number in numbers) else value

    def finalists_of(self, trials: int) -> int:
        """Return how many of the last of so many trials are finalists, the default resolved."""
        if self.finalists is not None:
            return self.finalists
        by_default = self.sampler == "auto" and self.objectives is None  # a front has no one best to make certain of
        return min(DEFAULT_FINALISTS, trials // 5) if by_default else 0

    @property
    def trainer_name(self) -> str:
        """Who trains, the default resolved."""
        return self.trainer or ("native" if self.sd_scripts_dir is None else "kohya")

    @property
    def trainer_options(self) -> Mapping[str, Any]:
        """The study file's [trainer.<name>] table."""
        return self._trainer_options


def load_optimizer_settings(arguments: argparse.Namespace) -> OptimizerSettings:
    """Return the effective settings; a search space or scoring file that the study file names lies beside it.

    Raises:
        SettingsError: a value will not do.
    """
    loaded = load_settings(OptimizerSettings, arguments)
    _refuse_beside_stages(loaded)
    changes: dict[str, Any] = {}
    # A scoring without suffix or folder is a misspelt preset, and is to be shown as it was written.
    for field, presets in (("search_space", search_spaces()), ("scoring", scorings())):
        name = getattr(loaded.settings, field)
        if name not in presets and (field != "scoring" or Path(name).suffix or "/" in name):
            config = arguments.config
            beside = config is not None and loaded.origins[field].startswith(str(config))
            changes[field] = str((config.parent / name if beside else Path(name)).absolute())
    settings = loaded.settings
    if arguments.config is not None and loaded.origins["baseline"].startswith(str(arguments.config)):
        changes["baseline"] = tuple(_file_beside(arguments.config.parent, entry) for entry in settings.baseline)
    name = settings.trainer_name
    # A variable that all programs see names the checkout, but never chooses the trainer.
    directory = settings.sd_scripts_dir or (Path(text) if (text := os.environ.get("SD_SCRIPTS_DIR")) else None)
    settings = settings.model_copy(update={**changes, "trainer": name, "sd_scripts_dir": directory})
    settings._trainer_options = read_trainer_options(
        arguments.config,
        name,
        TRAINERS.names,
        chosen=loaded.origins["trainer"] != "default",
        lines=COMMAND_LINES.get(name, ()),
    )
    return settings


def _file_beside(folder: Path, entry: str) -> str:
    """Make the file of NAME=FILE relative to a folder; what has another form is refused later."""
    name, equals, file = entry.partition("=")
    return f"{name}={(folder / file).absolute()}" if name and equals and file else entry


def _refuse_beside_stages(loaded: LoadedSettings[OptimizerSettings]) -> None:
    for field in ("n_trials", "max_epochs"):
        origin = loaded.origins[field]
        if loaded.settings.stages is not None and origin != "default":
            raise SettingsError(
                origin,
                getattr(loaded.settings, field),
                f"the stages of {loaded.settings.stages} say it; take it out, or run without --stages",
            )

"""The kohya trainer: sd-scripts' train_network.py or sdxl_train_network.py, started directly, on a file of its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optimizer_daemon.trainers import kohya_checks as checks
from optimizer_daemon.trainers.base import LaunchPlan, ResumePoint, TrainerInput
from optimizer_daemon.trainers.kohya_config import (
    CLIP_SKIP,
    PYTHON_PATH,
    SCRIPTS,
    StudySettings,
    require_options,
    to_toml,
    training_config,
)
from optimizer_daemon.trainers.kohya_data import dataset_path, make_dataset, remove_broken_latents
from optimizer_daemon.trainers.kohya_diagnosis import diagnose
from optimizer_daemon.trainers.kohya_state import newest_state
from shared.clip_tokenizers import kohya_tokenizer_folder
from shared.devices import resolve_device
from shared.errors import DiskError, SettingsError, UserError
from shared.layout import StudyLayout, TrialLayout
from shared.model_folders import family_of
from shared.progress_bar import Progress, parse_bar, parse_epoch, parse_unnamed_bar
from shared.schemas import Run, Trainer, TrainerExit, TrialParams

TRAIN_CONFIG = "train_config.toml"

_TORCH_OPTIMIZERS = Path(__file__).resolve().parents[1] / "torch_optim"


class KohyaTrainer:
    """Stable Diffusion 1.5 and SDXL LoRA training by kohya's sd-scripts, in their own environment."""

    holds_out = True  # they are not among the links that kohya trains on
    starts_apart = True  # a half-written file of latents is an error for whoever finds it

    def check_input(self, given: TrainerInput) -> str:
        """Look at the checkout, its environment, the base model, the data set and every setting of the trials.

        Returns:
            What git calls the checkout.
        Raises:
            UserError: something of it will not do.
        """
        family = _family(given)
        directory = checks.require_directory(given.trainer, family)
        study = _settings_of_input(given, family)
        require_options(study)
        python = checks.require_python(given.trainer)
        checks.require_kohya_base_model(given.base_model, given.trainer.options)
        dataset = checks.require_dataset(given.dataset_config, given.trainer.options)
        checks.require_bucket_steps(given.dataset_config, dataset, given.trainer.options, family)
        trial = StudyLayout(Path("/study")).trial(1)
        configs = [training_config(params, trial, study) for params in given.trials]
        for config in configs:
            checks.require_fixed_pictures(given, dataset, config)
        script = SCRIPTS[family].removesuffix(".py")
        with TemporaryDirectory() as folder:
            if _TORCH_OPTIMIZERS.is_dir():
                publish_optimizers(_TORCH_OPTIMIZERS, Path(folder))
            path = [folder, *_python_path(given.trainer)]
            answer = checks.ask(directory, python, script, configs, dataset, python_path=path)
        version = checks.version_of(directory)
        for config in configs:
            checks.require_known(given, config, answer, version)
        checks.require_accepted(given.dataset_config, answer)
        return version

    def clip_skip(self, given: TrainerInput) -> int:
        """Return the layer that is trained and rendered with; SDXL has one of its own whatever it is told."""
        return 1 if _family(given) == "sdxl" else _clip_skip(given.trainer)

    def prepare(self, run: Run, study: StudyLayout) -> None:
        """Link the data set, and put tokenizers and the optimizers of this program where kohya finds them."""
        make_dataset(run, study)
        kohya_tokenizer_folder(_tokenizers(study))
        if _TORCH_OPTIMIZERS.is_dir():
            publish_optimizers(_TORCH_OPTIMIZERS, _optimizers(study))

    def tidy(self, trial: TrialLayout, run: Run) -> None:
        """Remove latents of which a killed training wrote only a part."""
        remove_broken_latents(StudyLayout(trial.folder.parent))

    def plan(
        self,
        params: TrialParams,
        trial: TrialLayout,
        run: Run,
        gpu: str | None = None,
        resume: ResumePoint | None = None,
    ) -> LaunchPlan:
        """Return the plan; a parameter may be any option of the script, or `optimizer_args.<name>` and the like.

        Raises:
            UserError: a parameter or an option is nothing that can be written.
        """
        trial = TrialLayout(trial.folder.absolute())
        study = StudyLayout(trial.folder.parent)
        settings = _settings_of_run(run, study)
        config = training_config(params, trial, settings)
        directory = Path(str(run.trainer.directory))
        argv = [checks.python_of(run.trainer), str(directory / SCRIPTS[settings.family])]
        argv += ["--config_file", str(trial.folder / TRAIN_CONFIG)]
        if resume is not None and resume.epoch is not None:
            # Left to itself kohya counts from a state of a resumed training, and trains epochs again that are done.
            argv += ["--resume", str(resume.state.absolute()), "--initial_epoch", str(resume.epoch + 1)]
        return LaunchPlan(tuple(argv), _environment(run, study, gpu), {TRAIN_CONFIG: to_toml(config)}, directory)

    def resume_point(self, trial: TrialLayout) -> ResumePoint | None:
        """Return the newest whole state."""
        return newest_state(trial)

    def parse_progress(self, line: str) -> Progress | None:
        """Read `epoch N/M`, the progress bar, and the bars before it."""
        return parse_bar(line) or parse_epoch(line) or parse_unnamed_bar(line)

    def diagnose(self, record: TrainerExit | None, last_lines: Sequence[str]) -> str:
        """Return what kohya's end and its last lines mean."""
        return diagnose(record, last_lines)


TRAINER = KohyaTrainer()


def publish_optimizers(source: Path, target: Path) -> None:
    """Copy a package of optimizers to target/optimizer_daemon/<its name>, alone.

    Not the folder that holds this program: kohya's Python would find our libraries there instead of its pins.

    Raises:
        DiskError: it could not be copied.
    """
    package = target / "optimizer_daemon"
    try:
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("")
        shutil.copytree(source, package / source.name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise DiskError(package, error) from error


def _family(given: TrainerInput) -> str:
    found = family_of(given.base_model)
    if given.family is not None and found is not None and given.family != found:
        raise SettingsError("--model-family", given.family, f"the base model {given.base_model} is {found}")
    family = given.family or found
    if family is None:
        raise SettingsError(
            "--model-family", None, f"the base model {given.base_model} does not say what it is; pass sd15 or sdxl"
        )
    return family


def _settings_of_input(given: TrainerInput, family: str) -> StudySettings:
    return StudySettings(
        family=family,
        base_model=str(given.base_model.absolute()),
        dataset_config=str(given.dataset_config.absolute()),
        tokenizers="/tokenizers",
        half=resolve_device(given.device).startswith("cuda"),
        clip_skip=_clip_skip(given.trainer),
        save_every_n_epochs=1,
        seed=given.trials[0].training_seed if given.trials else 0,
        options=given.trainer.options,
    )


def _settings_of_run(run: Run, study: StudyLayout) -> StudySettings:
    if run.trainer.family is None or run.trainer.directory is None:
        flag = "--model-family" if run.trainer.family is None else "--sd-scripts-dir"
        raise SettingsError(flag, None, "the kohya trainer cannot do without; pass it")
    device = str(run.settings.get("device") or "auto")
    rendered_in_half = run.plan is not None and run.plan.dtype == "float16"
    seed, every = run.settings.get("seed"), run.settings.get("save-every-n-epochs")
    return StudySettings(
        family=run.trainer.family,
        base_model=str(run.base_model),
        dataset_config=str(dataset_path(run, study)),
        tokenizers=str(_tokenizers(study)),
        half=device != "cpu" and (rendered_in_half or device.startswith("cuda")),
        clip_skip=run.plan.clip_skip if run.plan is not None else _clip_skip(run.trainer),
        save_every_n_epochs=every if isinstance(every, int) else 2,
        seed=seed if isinstance(seed, int) else 42,
        options=run.trainer.options,
    )


def _clip_skip(trainer: Trainer) -> int:
    # Stable Diffusion 2 has its last but one layer as its last.
    asked = trainer.options.get("clip_skip", 1 if trainer.options.get("v2") is True else CLIP_SKIP)
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
        raise UserError(
            f"[trainer.kohya] clip_skip: {asked!r} will not do; write 1 for the last layer, 2 for the one before"
        )
    return asked


def _environment(run: Run, study: StudyLayout, gpu: str | None) -> dict[str, str]:
    threads = str(run.threads_per_process)
    environment = {
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "240",  # rich would break its lines, and paths in them, at 80
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": ":".join([str(_optimizers(study)), *_python_path(run.trainer)]),
    }
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu  # kohya has no other switch for it
    return environment


def _python_path(trainer: Trainer) -> list[str]:
    given: Any = trainer.options.get(PYTHON_PATH, [])
    folders = [given] if isinstance(given, str) else given
    if not isinstance(folders, list) or not all(
        isinstance(folder, str) and Path(folder).is_absolute() for folder in folders
    ):
        raise UserError(
            f"[trainer.kohya] {PYTHON_PATH}: {given!r} will not do; write a folder, or a list of them, each "
            "absolute or beginning with ./"
        )
    return folders


def _tokenizers(study: StudyLayout) -> Path:
    return study.trainer_cache / "tokenizers"


def _optimizers(study: StudyLayout) -> Path:
    return study.trainer_cache / "python"

"""What the evaluators of one study folder need to know: taken from its run.json, else made from flags."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from evaluator_daemon.settings import EvaluatorSettings
from shared.devices import require_device, resolve_device
from shared.errors import SettingsError, StudyMismatchError
from shared.files import read_kept
from shared.layout import StudyLayout
from shared.model_folders import digest_model, require_base_model, require_clip_model
from shared.planning import make_plan
from shared.prompts import read_prompt_file
from shared.schemas import EvaluationPlan, Run
from shared.settings import LoadedSettings, make_writable_folder


@dataclass(frozen=True)
class Job:
    """Everything an evaluator is told.

    Args:
        root: the study folder.
        base_model: diffusers folder; its content is the plan's.
        clip_model: local CLIP folder, None to do without.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads of one evaluator.
        check_interval_s: how late a new checkpoint may be seen.
        idle_timeout_s: after how much quiet a trial without state files is over.
    """

    root: Path
    plan: EvaluationPlan
    base_model: Path
    clip_model: Path | None
    device: str
    threads: int
    check_interval_s: float
    idle_timeout_s: float


def study_folder(settings: EvaluatorSettings, *, make: bool) -> StudyLayout:
    """Return the folder to watch.

    Args:
        make: make it where it is missing, for a manager that was started before its study.
    Raises:
        SettingsError: none was named, or it is not there and cannot or must not be made.
    """
    if settings.optimization_dir is None:
        raise SettingsError("--optimization-dir", None, "name the study folder (the optimizer's --output-dir)")
    if not make and not settings.optimization_dir.is_dir():
        raise SettingsError("--optimization-dir", str(settings.optimization_dir), "make that folder or name another")
    make_writable_folder("--optimization-dir", settings.optimization_dir)
    return StudyLayout(settings.optimization_dir.resolve())


def find_job(
    loaded: LoadedSettings[EvaluatorSettings], study: StudyLayout, *, override_plan: bool = False
) -> Job | None:
    """Return the study's job, or the one the flags describe in a folder without run.json.

    Args:
        override_plan: flags that differ from the study's plan change it, for results outside the trials.
    Returns:
        None where there is no run.json and the flags do not suffice: the study has not been started yet.
    Raises:
        StudyMismatchError: a flag or a model on disk differs from the frozen plan.
        SettingsError: a flag, the base model or the CLIP is not usable.
        ResourceError: the device is not there.
    """
    settings = loaded.settings
    require_device(settings.device)
    run = read_run(study)
    if run is not None and run.plan is not None:
        plan = overridden(loaded, run.plan) if override_plan else run.plan
        return _job_of_study(loaded, study, run, plan)
    if run is not None:
        raise StudyMismatchError(
            f"{study.run}: the trainer of this study scores its trials itself; nothing to evaluate"
        )
    if settings.base_model is None or settings.prompts is None:
        return None
    require_base_model(settings.base_model)
    if settings.clip_model is not None:
        require_clip_model(settings.clip_model)
    plan = make_plan(
        base_model=settings.base_model,
        prompts=read_prompt_file(settings.prompts),
        device=settings.device,
        num_samples=settings.num_samples,
        clip_model=settings.clip_model,
    )
    threads = max(1, (os.cpu_count() or 1) // 2)
    return _job(settings, study, plan, settings.base_model, settings.clip_model, threads)


def overridden(loaded: LoadedSettings[EvaluatorSettings], plan: EvaluationPlan) -> EvaluationPlan:
    """Return the plan as the flags would have it.

    Raises:
        SettingsError: the prompt file is not usable.
    """
    settings = loaded.settings
    updates: dict[str, object] = {
        name: getattr(settings, name)
        for name in type(plan).model_fields.keys() & loaded.origins.keys() - {"prompts"}
        if loaded.origins[name] != "default"
    }
    if settings.prompts is not None:
        updates["prompts"] = read_prompt_file(settings.prompts)
    return EvaluationPlan.model_validate({**dict(plan), **updates})


def read_run(study: StudyLayout) -> Run | None:
    """Return run.json, None while there is none."""
    try:
        return read_kept(study.run, Run)
    except FileNotFoundError:
        return None


def _job_of_study(loaded: LoadedSettings[EvaluatorSettings], study: StudyLayout, run: Run, plan: EvaluationPlan) -> Job:
    settings = loaded.settings
    if loaded.origins["num_samples"] != "default" and settings.num_samples != plan.num_samples:
        raise _differs(loaded.origins["num_samples"], settings.num_samples, plan.num_samples)
    if settings.prompts is not None and (prompts := read_prompt_file(settings.prompts)) != plan.prompts:
        raise _differs(loaded.origins["prompts"], list(prompts), list(plan.prompts))
    base_model = settings.base_model or (Path(run.base_model) if run.base_model else None)
    if base_model is None:
        raise SettingsError("--base-model", None, f"{study.run} names no base model; name it here")
    if digest_model(base_model) != plan.base_digest:
        raise StudyMismatchError(
            f"{base_model}: its content is not that of the base model the study was started with; put that one back "
            "or start a new study"
        )
    recorded = run.settings.get("clip-model", run.settings.get("clip_model"))
    clip_model = settings.clip_model or (Path(recorded) if isinstance(recorded, str) else None)
    planned = plan.scoring.values.get("clip_digest")
    if planned is None:
        clip_model = None  # the study was started without: its scores stay comparable
    elif clip_model is None or digest_model(clip_model, setting="--clip-model") != planned:
        raise StudyMismatchError(
            f"{clip_model or 'no CLIP model'}: the study was started with another CLIP; name that one by --clip-model"
        )
    return _job(settings, study, plan, base_model, clip_model, run.threads_per_process)


def _job(
    settings: EvaluatorSettings,
    study: StudyLayout,
    plan: EvaluationPlan,
    base_model: Path,
    clip_model: Path | None,
    threads: int,
) -> Job:
    return Job(
        root=study.root,
        plan=plan,
        base_model=base_model.resolve(),
        clip_model=clip_model and clip_model.resolve(),
        device=resolve_device(settings.device),
        threads=threads,
        check_interval_s=settings.evaluator_check_interval,
        idle_timeout_s=settings.idle_timeout,
    )


def _differs(flag: str, here: object, there: object) -> StudyMismatchError:
    return StudyMismatchError(
        f"{flag} is {here!r}, but the study's run.json has {there!r}; leave the flag out "
        "(only `evaluate FILE --override-plan` may differ)"
    )

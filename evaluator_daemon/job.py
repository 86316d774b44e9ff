"""What the evaluators of one study folder need to know: taken from its run.json, else made from flags."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evaluator_daemon.folder import file_stamp
from evaluator_daemon.settings import EvaluatorSettings
from shared.devices import require_device, resolve_device
from shared.errors import SettingsError, StudyMismatchError
from shared.files import read_kept
from shared.gpu_lease import GpuPolicy
from shared.held_out import pictures_in, require_unchanged
from shared.layout import StudyLayout
from shared.metric_names import MetricInputs, parse_metrics
from shared.model_folders import digest_model, require_base_model
from shared.planning import make_plan, overrides_of
from shared.prompts import read_prompt_file
from shared.schemas import EvaluationPlan, PromptOptions, Run
from shared.schemas.pictures import Picture, StudyPictures
from shared.scoring_presets import COMBINED, load_preset, lpips_digest, metrics_of, plan_scoring
from shared.settings import LoadedSettings, make_writable_folder


@dataclass(frozen=True)
class Job:
    """Everything an evaluator is told.

    Args:
        root: the study folder.
        base_model: diffusers folder or single file; its content is the plan's.
        clip_model: local CLIP folder, None to do without.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads of one evaluator.
        check_interval_s: how late a new checkpoint may be seen.
        idle_timeout_s: after how much quiet a trial without state files is over.
        gpu_policy: as the flag says; None to leave it to the study, see `gpu_policy.policy_of`.
        from_run: the plan is that of run.json, not one made from flags.
        dino_model: local DINOv2 folder, None to do without.
        lpips_weights: file of LPIPS' backbone, or the word "random"; None to do without.
        pictures: the data set's, as they were when the study began.
    """

    root: Path
    plan: EvaluationPlan
    base_model: Path
    clip_model: Path | None
    device: str
    threads: int
    check_interval_s: float
    idle_timeout_s: float
    gpu_policy: GpuPolicy | None = None
    from_run: bool = False
    dino_model: Path | None = None
    lpips_weights: Path | None = None
    pictures: StudyPictures = field(default_factory=StudyPictures)


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
    inputs = inputs_of_flags(settings)
    preset = load_preset(settings.scoring or COMBINED)
    metrics = parse_metrics(settings.metrics, inputs, preset.needed_metrics)
    plan = make_plan(
        base_model=settings.base_model,
        prompts=read_prompt_file(settings.prompts),
        device=settings.device,
        num_samples=settings.num_samples,
        lora_scale=settings.lora_scale,
        scoring=plan_scoring(preset, metrics, inputs, _measure_targets),
    )
    threads = max(1, (os.cpu_count() or 1) // 2)
    return _job(settings, study, plan, settings.base_model, inputs, threads)


def adopt_run(loaded: LoadedSettings[EvaluatorSettings], study: StudyLayout, job: Job, run: Run | None) -> Job:
    """Return the job that holds now that run.json says `run`.

    A manager that was started before its study goes by its flags until run.json appears; when no flag contradicts it,
    the study's plan, with all that no flag names, takes the place of theirs. Where the plans differ in that, whatever
    evaluates by the old one has to be started anew.

    Raises:
        StudyMismatchError: a flag differs, and the message has both values; or the run.json that the job is from was
            replaced by another study's.
    """
    if run is None or (job.from_run and run.plan == job.plan):
        return job
    if job.from_run:
        raise StudyMismatchError(f"{study.run} holds another plan than the one evaluated here; start again")
    adopted = find_job(loaded, study)
    assert adopted is not None, "there is a run.json"
    return adopted


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
    changed = EvaluationPlan.model_validate({**dict(plan), **updates})
    if settings.prompts is None:
        return changed
    prompts = read_prompt_file(settings.prompts)
    texts = tuple(prompt.text for prompt in prompts)
    # options count for the plan's prompts, so both change together
    return EvaluationPlan.model_validate(
        {**dict(changed), "prompts": texts, "overrides": overrides_of(prompts, changed)}
    )


def read_run(study: StudyLayout) -> Run | None:
    """Return run.json, None while there is none; read again only when the file has changed."""
    try:
        return _run_at(study.run, file_stamp(study.run))
    except FileNotFoundError:
        return None


@functools.lru_cache(maxsize=1)  # it grows with the data set's pictures, and a sweep asks for it several times
def _run_at(path: Path, stamp: tuple[int, ...] | None) -> Run:
    """`stamp` was taken before: what is written meanwhile is read again the next time."""
    return read_kept(path, Run)


def policy_in(run: Run) -> GpuPolicy | None:
    """Return how the study has its trainings and evaluations share the device; None where its run.json is older."""
    recorded = run.settings.get("gpu-policy")
    return "defer" if recorded == "defer" else "share" if recorded == "share" else None


def _job_of_study(loaded: LoadedSettings[EvaluatorSettings], study: StudyLayout, run: Run, plan: EvaluationPlan) -> Job:
    settings = loaded.settings
    for name in ("num_samples", "lora_scale"):
        here, there = getattr(settings, name), getattr(plan, name)
        if loaded.origins[name] != "default" and here != there:
            raise _differs(loaded.origins[name], here, there)
    policy = policy_in(run)
    if settings.gpu_policy is not None and policy is not None and settings.gpu_policy != policy:
        raise _differs(loaded.origins["gpu_policy"], settings.gpu_policy, policy)
    if settings.prompts is not None:
        prompts = read_prompt_file(settings.prompts)
        texts, options = tuple(prompt.text for prompt in prompts), overrides_of(prompts, plan)
        if texts != plan.prompts:
            raise _differs(loaded.origins["prompts"], list(texts), list(plan.prompts))
        if options != plan.overrides:
            raise _differs(f"{loaded.origins['prompts']} (the options)", _shown(options), _shown(plan.overrides))
    base_model = settings.base_model or (Path(run.base_model) if run.base_model else None)
    if base_model is None:
        raise SettingsError("--base-model", None, f"{study.run} names no base model; name it here")
    if digest_model(base_model) != plan.base_digest:
        raise StudyMismatchError(
            f"{base_model}: its content is not that of the base model the study was started with; put that one back "
            "or start a new study"
        )
    _require_same_scoring(loaded, plan)
    there = inputs_of_run(settings, run)
    inputs = MetricInputs(
        clip_model=_of_plan(plan, "clip_digest", "CLIP", "--clip-model", there.clip_model),
        dino_model=_of_plan(plan, "dino_digest", "DINOv2", "--dino-model", there.dino_model),
        lpips_weights=_of_plan(plan, "lpips_digest", "LPIPS backbone", "--lpips-weights", there.lpips_weights),
        pictures=there.pictures,
    )
    require_unchanged(inputs.pictures.held_out, "held-out")
    return replace(_job(settings, study, plan, base_model, inputs, run.threads_per_process), from_run=True)


def inputs_of_flags(settings: EvaluatorSettings) -> MetricInputs:
    """Return the networks and pictures that the flags name.

    Raises:
        SettingsError: the folder of --reference-pictures holds no picture, or one cannot be read.
    """
    folder = settings.reference_pictures
    held_out = () if folder is None else pictures_in(folder, "--reference-pictures")
    return MetricInputs(
        settings.clip_model, settings.dino_model, settings.lpips_weights, StudyPictures(held_out=held_out)
    )


def inputs_of_run(settings: EvaluatorSettings, run: Run) -> MetricInputs:
    """Return the networks and pictures of a study as run.json names them; flags say where a network lies now."""
    return MetricInputs(
        clip_model=settings.clip_model or _recorded(run, "clip-model"),
        dino_model=settings.dino_model or _recorded(run, "dino-model"),
        lpips_weights=settings.lpips_weights or _recorded(run, "lpips-weights"),
        pictures=run.pictures or StudyPictures(),
    )


def _recorded(run: Run, setting: str) -> Path | None:
    path = run.settings.get(setting, run.settings.get(setting.replace("-", "_")))
    return Path(path) if isinstance(path, str) else None


def _require_same_scoring(loaded: LoadedSettings[EvaluatorSettings], plan: EvaluationPlan) -> None:
    """A study's metrics, scoring and held-out pictures are those of its plan."""
    settings = loaded.settings
    if settings.reference_pictures is not None:
        raise StudyMismatchError(
            f"{loaded.origins['reference_pictures']}: likeness in a study is measured to the held-out pictures of its "
            "run.json; leave the flag out"
        )
    if settings.scoring is not None and load_preset(settings.scoring).name != plan.scoring.name:
        raise _differs(loaded.origins["scoring"], settings.scoring, plan.scoring.name)
    if settings.metrics is not None and (named := parse_metrics(settings.metrics)) != metrics_of(plan):
        raise _differs(loaded.origins["metrics"], ",".join(named), ",".join(metrics_of(plan)))


def _of_plan(plan: EvaluationPlan, identity: str, network: str, flag: str, path: Path | None) -> Path | None:
    """Return where a network of the study lies.

    Returns:
        None for one the study was started without, whatever the flag says: its scores stay comparable.
    Raises:
        StudyMismatchError: it is not the one the study was started with.
    """
    planned = plan.scoring.values.get(identity)
    if planned is None:
        return None
    if path is not None:
        found = lpips_digest(path) if flag == "--lpips-weights" else digest_model(path, setting=flag)
        if found == planned:
            return path
    no_network = f"no {network}" if flag == "--lpips-weights" else f"no {network} model"
    raise StudyMismatchError(
        f"{path or no_network}: the study was started with another {network}; name that one by {flag}"
    )


def _measure_targets(pictures: Sequence[Picture]) -> Mapping[str, float]:
    # By name: only this needs the imaging library, and only for targets = "dataset".
    module: Any = importlib.import_module("evaluator_daemon.metrics.targets")
    found: Mapping[str, float] = module.measure_targets(pictures)
    return found


def _job(
    settings: EvaluatorSettings,
    study: StudyLayout,
    plan: EvaluationPlan,
    base_model: Path,
    inputs: MetricInputs,
    threads: int,
) -> Job:
    return Job(
        root=study.root,
        plan=plan,
        base_model=base_model.resolve(),
        clip_model=inputs.clip_model and inputs.clip_model.resolve(),
        device=resolve_device(settings.device),
        threads=threads,
        check_interval_s=settings.evaluator_check_interval,
        idle_timeout_s=settings.idle_timeout,
        gpu_policy=settings.gpu_policy,
        dino_model=inputs.dino_model and inputs.dino_model.resolve(),
        lpips_weights=inputs.lpips_weights and inputs.lpips_weights.absolute(),
        pictures=inputs.pictures,
    )


def _shown(overrides: Sequence[PromptOptions]) -> list[dict[str, object]]:
    return [options.model_dump(exclude_none=True) for options in overrides]


def _differs(flag: str, here: object, there: object) -> StudyMismatchError:
    return StudyMismatchError(
        f"{flag} is {here!r}, but the study's run.json has {there!r}; leave the flag out "
        "(only `evaluate FILE --override-plan` may differ)"
    )

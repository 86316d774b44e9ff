"""From a base model, prompts and a device to the evaluation plan. Both daemons make plans here, so equal input gives
equal plans; nothing here imports a network library.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from shared.errors import CheckpointError, ResourceError, SettingsError, UnknownPluginError
from shared.safetensors_file import read_header
from shared.schemas.base import Scalar
from shared.schemas.plan import EvaluationPlan, ScoringPreset

STEPS = 20
SAMPLER = "dpmpp_2m_karras"
CFG_SCALE = 7.5
BASE_SEED = 42
NUM_SAMPLES = 8

METRIC_SOURCES = ("clip_consistency", "pixels")
"""What a study measures unless told otherwise; the evaluator's registry holds one metric for each name."""
PIXELS = "pixels"
CLIP_CONSISTENCY = "clip_consistency"

_PIPELINE = "StableDiffusionPipeline"
_COMPONENTS = {  # component -> the file that says what it is
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
_WITH_WEIGHTS = ("unet", "vae", "text_encoder")
_NOT_RENDERING = {"safety_checker", "feature_extractor", "image_encoder"}


def digest_model(folder: Path, *, setting: str = "--base-model") -> str:
    """Return the identity of a model folder: SHA-256 over the names and contents of what a loader reads.

    Args:
        folder: a diffusers folder, or one model in transformers' layout, such as a CLIP.
        setting: how the user named the folder, for messages.
    Raises:
        SettingsError: there is no such model, or a file of it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in _model_files(folder, setting):
            content = hashlib.sha256()
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    content.update(block)
            digest.update(f"{file.relative_to(folder).as_posix()}\0{content.hexdigest()}\n".encode())
    except OSError as error:
        raise SettingsError(setting, str(folder), f"make {error.filename} readable ({error.strerror})") from error
    return digest.hexdigest()


def require_base_model(folder: Path, *, setting: str = "--base-model") -> None:
    """Refuse what is no whole Stable Diffusion 1.x or 2.x pipeline; only its small files and headers are read.

    Raises:
        SettingsError: a single file, no diffusers folder, another family, or a part that is missing or cut short.
    """
    if folder.is_file():
        raise SettingsError(
            setting, str(folder), "a single file cannot be used; convert it to a diffusers folder and name that"
        )
    index = folder / "model_index.json"
    if not index.is_file():
        raise SettingsError(setting, str(folder), "name a diffusers folder; it holds model_index.json")
    pipeline = _read_json(index, setting).get("_class_name")
    if pipeline != _PIPELINE:
        raise SettingsError(setting, str(folder), f"it is a {pipeline}; name a {_PIPELINE} (Stable Diffusion 1.x)")
    missing = [f"{part}/{file}" for part, file in _COMPONENTS.items() if not (folder / part / file).is_file()]
    if missing:
        raise SettingsError(setting, str(folder), f"it lacks {', '.join(missing)}; copy the whole model")
    for part in _WITH_WEIGHTS:
        _require_weights(folder / part, setting)


def require_clip_model(folder: Path, *, setting: str = "--clip-model") -> None:
    """Refuse what is no whole CLIP in transformers' layout; only its small files and headers are read.

    Raises:
        SettingsError: no such folder, another kind of model, or a part that is missing or cut short.
    """
    if not (folder / "config.json").is_file():
        raise SettingsError(setting, str(folder), "name the local folder of a CLIP model; it holds config.json")
    kind = _read_json(folder / "config.json", setting).get("model_type")
    if kind != "clip":
        raise SettingsError(
            setting, str(folder), f"its config.json says model_type {kind!r}; name a whole CLIP, 'clip'"
        )
    lacking = [name for name in ("preprocessor_config.json",) if not (folder / name).is_file()]
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        lacking.append("tokenizer.json")
    if lacking:
        raise SettingsError(setting, str(folder), f"it lacks {', '.join(lacking)}; copy the whole model")
    _require_weights(folder, setting)


def require_device(device: str) -> None:
    """Refuse a CUDA device that is not there.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
    Raises:
        ResourceError: the driver shows no such device, or torch is a CPU build.
    """
    if not device.startswith("cuda"):
        return
    count = cuda_device_count()
    if count == 0 or _torch_is_cpu_build():
        why = "the CUDA driver shows no device" if count == 0 else "the installed torch is a CPU build"
        raise ResourceError(f"--device {device}: {why}; repair that, or use --device cpu")
    if int(device.partition(":")[2] or 0) >= count:
        raise ResourceError(f"--device {device}: there are only {count} CUDA devices, counted from 0; name another")


def parse_metrics(names: str | None, clip_model: Path | None) -> tuple[str, ...]:
    """Return the metric sources that `--metrics` names, sorted; all of them for None.

    Raises:
        UnknownPluginError: there is no such metric.
        SettingsError: the pixel metrics are left out, or a CLIP is named that nothing would use.
    """
    if names is None:
        return METRIC_SOURCES
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in METRIC_SOURCES:
            raise UnknownPluginError("metric", name, METRIC_SOURCES)
    if PIXELS not in wanted:
        raise SettingsError("--metrics", names, f"the score is computed from {PIXELS}; add it")
    if CLIP_CONSISTENCY not in wanted and clip_model is not None:
        raise SettingsError(
            "--metrics", names, f"--clip-model only serves {CLIP_CONSISTENCY}; add that or leave it out"
        )
    return tuple(sorted(set(wanted)))


def metrics_of(plan: EvaluationPlan) -> tuple[str, ...]:
    """Return the metric sources the plan's study measures.

    Raises:
        UnknownPluginError: the plan was made by a program that knows more metrics.
    """
    recorded = plan.scoring.values.get("metrics")
    return METRIC_SOURCES if recorded is None else parse_metrics(str(recorded), None)


def default_size(base_model: Path) -> tuple[int, int]:
    """Return the (width, height) in pixels the base model was made for.

    Raises:
        SettingsError: its UNet or VAE says nothing usable.
    """
    sample = _config(base_model, "unet").get("sample_size")
    blocks = _config(base_model, "vae").get("block_out_channels")
    height, width = sample if isinstance(sample, list) and len(sample) == 2 else (sample, sample)
    if not isinstance(height, int) or not isinstance(width, int) or not isinstance(blocks, list) or not blocks:
        raise SettingsError(
            "--base-model", str(base_model), "its unet/config.json needs sample_size, its vae's block_out_channels"
        )
    factor = 2 ** (len(blocks) - 1)
    return width * factor, height * factor


def draw_prompts(captions: Iterable[str], count: int, seed: int) -> tuple[str, ...]:
    """Draw `count` different captions; the same for the same captions in any order. Fewer when there are fewer.

    Raises:
        SettingsError: there is no caption at all.
    """
    known = sorted({" ".join(caption.split()) for caption in captions} - {""})
    if not known:
        raise SettingsError("--prompts", None, "the data set has no captions to draw prompts from; pass a prompt file")
    return tuple(random.Random(seed).sample(known, min(count, len(known))))


def read_prompt_file(path: Path) -> tuple[str, ...]:
    """Return the prompts of a text file, one a line; empty lines and lines that start with # do not count.

    Raises:
        SettingsError: not readable text, no prompt, or an option such as ` --n`, which would be rendered as words.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError("--prompts", str(path), f"name a readable UTF-8 text file ({error})") from error
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        prompt = " ".join(line.split())
        if not prompt or prompt.startswith("#"):
            continue
        if option := re.search(r"(?:^|\s)(--\w+)", prompt):
            raise SettingsError(
                f"{path} line {number}", option[1], "options are not known here; write the prompt alone"
            )
        prompts.append(prompt)
    if not prompts:
        raise SettingsError("--prompts", str(path), "it holds no prompt; write one a line")
    return tuple(prompts)


def resolve_device(device: str) -> str:
    """Turn "auto" into "cuda" where a CUDA driver shows a device and torch is no CPU build, else "cpu"."""
    if device != "auto":
        return device
    return "cuda" if cuda_device_count() > 0 and not _torch_is_cpu_build() else "cpu"


def cuda_device_count() -> int:
    """Ask the CUDA driver itself, which takes milliseconds, makes no context and heeds CUDA_VISIBLE_DEVICES."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def default_dtype(device: str) -> Literal["float32", "float16"]:
    """The number format to render in: float16 on CUDA, float32 on a CPU."""
    return "float16" if resolve_device(device).startswith("cuda") else "float32"


def make_plan(
    *,
    base_model: Path,
    prompts: Sequence[str],
    device: str = "auto",
    num_samples: int = NUM_SAMPLES,
    steps: int = STEPS,
    cfg_scale: float = CFG_SCALE,
    clip_skip: int = 1,
    base_seed: int = BASE_SEED,
    clip_model: Path | None = None,
    metrics: Sequence[str] = METRIC_SOURCES,
) -> EvaluationPlan:
    """Freeze everything that decides a checkpoint's pixels and scores; settings beyond these have their defaults.

    Args:
        base_model: diffusers folder.
        device: decides the number format only; "auto", "cpu", "cuda" or "cuda:N".
        clip_skip: the training's, 1 for the text encoder's last layer.
        clip_model: local CLIP folder, None to do without CLIP consistency.
        metrics: what is measured, from `parse_metrics`.
    Raises:
        SettingsError: the base model or the CLIP is not usable.
    """
    width, height = default_size(base_model)
    return EvaluationPlan(
        prompts=tuple(prompts),
        negative_prompt="",
        num_samples=num_samples,
        base_seed=base_seed,
        width=width,
        height=height,
        steps=steps,
        sampler=SAMPLER,
        cfg_scale=cfg_scale,
        clip_skip=clip_skip,
        base_digest=digest_model(base_model),
        vae_digest=None,
        lora_scale=1.0,
        dtype=default_dtype(device),
        batch_size=num_samples,
        scoring=combined_preset(clip_model, metrics),
    )


def combined_preset(clip_model: Path | None = None, metrics: Sequence[str] = METRIC_SOURCES) -> ScoringPreset:
    """The default scoring: distance to the brightness and contrast targets, behind the sentinels and the CLIP gate."""
    values: dict[str, Scalar] = {
        "target.brightness": 0.50,
        "target.contrast": 0.20,
        "weight.std": 0.5,
        "gate.clip_tolerance": 0.02,
    }
    if clip_model is not None:
        values["clip_digest"] = digest_model(clip_model, setting="--clip-model")
    if tuple(metrics) != METRIC_SOURCES:  # the default stays unwritten: the plans of earlier studies keep their hash
        values["metrics"] = ",".join(metrics)
    return ScoringPreset(name="combined", objective="combined_score", values=values)


def _model_files(folder: Path, setting: str) -> list[Path]:
    """List the configuration and weights of every component, sorted by path."""
    index = folder / "model_index.json"
    if index.is_file():
        named = [name for name, value in _read_json(index, setting).items() if isinstance(value, list)]
        components = [folder / name for name in named if name not in _NOT_RENDERING and (folder / name).is_dir()]
    elif (folder / "config.json").is_file():
        components = [folder]
    else:
        raise SettingsError(setting, str(folder), "name a local model folder; it holds model_index.json or config.json")
    files = [index] if index.is_file() else []
    for component in components:
        inside = [file for file in component.iterdir() if file.is_file() and not file.name.startswith(".")]
        weights = [file for file in inside if file.suffix == ".safetensors"]
        weights = weights or [file for file in inside if file.suffix == ".bin"]
        files += [file for file in inside if file.suffix in (".json", ".txt", ".model")] + weights
    if not any(file.suffix in (".safetensors", ".bin") for file in files):
        raise SettingsError(setting, str(folder), "it holds no weights (*.safetensors or *.bin); copy the whole model")
    return sorted(files)


def _require_weights(folder: Path, setting: str) -> None:
    """See by their headers that the weights of one part are whole; *.bin files are left to the loader."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    if not files:
        raise SettingsError(setting, str(folder), "it holds no weights (*.safetensors or *.bin); copy the whole model")
    for file in files:
        if file.suffix == ".safetensors":
            real = file.resolve()  # a download cache keeps the content elsewhere and links to it
            try:
                read_header(real, real.parent)
            except CheckpointError as error:
                raise SettingsError(setting, str(file), f"{error.reason}; copy that file again") from error


def _config(base_model: Path, component: str) -> dict[str, Any]:
    if not (base_model / "model_index.json").is_file():
        raise SettingsError("--base-model", str(base_model), "name a diffusers folder; it holds model_index.json")
    return _read_json(base_model / component / "config.json", "--base-model")


def _read_json(path: Path, setting: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(setting, str(path), f"mend or copy that file again ({error})") from error
    if not isinstance(document, dict):
        raise SettingsError(setting, str(path), "that file must hold a JSON object")
    return document


def _torch_is_cpu_build() -> bool:
    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return True

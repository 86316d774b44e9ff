"""Base models and other networks on disk: what may be used, and its identity. No network library is needed.

A base model is a diffusers folder or one .safetensors file; other networks are folders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from shared.errors import CheckpointError, SettingsError
from shared.held_out import file_digest
from shared.safetensors_file import MAX_MODEL_BYTES, read_header
from shared.single_file import SingleFile, config_folder, read_single_file

_COMPONENTS = {  # component -> the file that says what it is
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
_PIPELINES = {
    "StableDiffusionPipeline": _COMPONENTS,
    "StableDiffusionXLPipeline": _COMPONENTS
    | {"text_encoder_2": "config.json", "tokenizer_2": "tokenizer_config.json"},
}
_FAMILIES = {"StableDiffusionPipeline": "Stable Diffusion 1.x", "StableDiffusionXLPipeline": "SDXL"}
_FAMILY_OF_PIPELINE: dict[str, Literal["sd15", "sdxl"]] = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
}
_WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_NEEDS = "its unet/config.json needs sample_size, its vae's block_out_channels"
_NAME_A_MODEL = "name a diffusers folder, which holds model_index.json, or one .safetensors file"
_NOT_RENDERING = {"safety_checker", "feature_extractor", "image_encoder"}


def digest_model(model: Path, *, setting: str = "--base-model") -> str:
    """Return the identity of a model: of a single file its SHA-256, by which other programs know it as well.

    Of a folder it is SHA-256 over the names and contents of what a loader reads; so it is of a single file that has
    configurations of its own beside it.

    Args:
        model: a single file, a diffusers folder, or one model in transformers' layout, such as a CLIP.
        setting: how the user named it, for messages.
    Raises:
        SettingsError: there is no such model, or a file of it cannot be read.
    """
    if not model.is_file():
        return _digest_files(model, _model_files(model, setting), setting)
    whole = file_digest(model, setting)
    own = config_folder(model)
    if not own.is_dir():
        return whole
    files = sorted(file for file in own.rglob("*") if file.is_file())
    return hashlib.sha256(f"{whole}\n{_digest_files(own, files, setting)}\n".encode()).hexdigest()


def digest_part(base_model: Path, part: str, *, setting: str = "--base-model") -> str:
    """Return the identity of one part of a base model, such as "vae"; raises as `digest_model`."""
    if not base_model.is_file():
        return digest_model(base_model / part, setting=setting)
    single = read_single_file(base_model, setting=setting)
    try:
        return single.part_digest(part)
    except OSError as error:
        raise SettingsError(setting, str(base_model), f"make it readable ({error.strerror})") from error


def single_file_of(base_model: Path, *, setting: str = "--base-model") -> SingleFile | None:
    """Return what a single-file base model holds; None for a diffusers folder. Raises as `read_single_file`."""
    return read_single_file(base_model, setting=setting) if base_model.is_file() else None


def _digest_files(folder: Path, files: Collection[Path], setting: str) -> str:
    digest = hashlib.sha256()
    try:
        for file in files:
            content = hashlib.sha256()
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    content.update(block)
            digest.update(f"{file.relative_to(folder).as_posix()}\0{content.hexdigest()}\n".encode())
    except OSError as error:
        raise SettingsError(setting, str(folder), f"make {error.filename} readable ({error.strerror})") from error
    return digest.hexdigest()


def require_base_model(
    folder: Path, *, setting: str = "--base-model", pipelines: Collection[str] = tuple(_PIPELINES)
) -> None:
    """Refuse what is no whole Stable Diffusion 1.x, 2.x or SDXL model; only its small files and headers are read.

    Args:
        folder: a diffusers folder, or a single file of Stable Diffusion 1.x or SDXL.
        pipelines: the classes that will do here.
    Raises:
        SettingsError: neither, another family, or a part that is missing or cut short.
    """
    if (single := single_file_of(folder, setting=setting)) is not None:
        _require_pipeline(folder, single.pipeline, pipelines, setting)
        return
    index = folder / "model_index.json"
    if not index.is_file():
        raise SettingsError(setting, str(folder), _NAME_A_MODEL)
    pipeline = str(_read_json(index, setting).get("_class_name"))
    _require_pipeline(folder, pipeline, pipelines, setting)
    components = _PIPELINES[pipeline]
    missing = [f"{part}/{file}" for part, file in components.items() if not (folder / part / file).is_file()]
    if missing:
        raise SettingsError(setting, str(folder), f"it lacks {', '.join(missing)}; copy the whole model")
    for part in _WITH_WEIGHTS:
        if part in components:
            _require_weights(folder / part, setting)


def family_of(base_model: Path) -> Literal["sd15", "sdxl"] | None:
    """Return what --model-family calls the family of a base model; None where it says none that is known.

    Raises:
        SettingsError: its model_index.json or its header cannot be read.
    """
    if (single := single_file_of(base_model)) is not None:
        return single.family
    index = base_model / "model_index.json"
    if not index.is_file():
        return None
    return _FAMILY_OF_PIPELINE.get(str(_read_json(index, "--base-model").get("_class_name")))


def _require_pipeline(model: Path, pipeline: str, pipelines: Collection[str], setting: str) -> None:
    if pipeline not in pipelines:
        named = " or a ".join(f"{name} ({_FAMILIES[name]})" for name in pipelines)
        raise SettingsError(setting, str(model), f"it is a {pipeline}; name a {named}")


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


def require_dino_model(folder: Path, *, setting: str = "--dino-model") -> None:
    """Refuse what is no whole DINOv2 in transformers' layout; only its small files and headers are read.

    Raises:
        SettingsError: no such folder, another kind of model, or a part that is missing or cut short.
    """
    if not (folder / "config.json").is_file():
        raise SettingsError(setting, str(folder), "name the local folder of a DINOv2 model; it holds config.json")
    kind = _read_json(folder / "config.json", setting).get("model_type")
    if kind not in ("dinov2", "dinov2_with_registers"):
        raise SettingsError(setting, str(folder), f"its config.json says model_type {kind!r}; name a DINOv2, 'dinov2'")
    if not (folder / "preprocessor_config.json").is_file():
        raise SettingsError(setting, str(folder), "it lacks preprocessor_config.json; copy the whole model")
    _require_weights(folder, setting)


def default_size(base_model: Path) -> tuple[int, int]:
    """Return the (width, height) in pixels the base model was made for.

    Raises:
        SettingsError: its UNet or VAE says nothing usable.
    """
    sample = _config(base_model, "unet").get("sample_size")
    height, width = sample if isinstance(sample, list) and len(sample) == 2 else (sample, sample)
    if not isinstance(height, int) or not isinstance(width, int):
        raise SettingsError("--base-model", str(base_model), _NEEDS)
    factor = vae_factor(base_model)
    return width * factor, height * factor


def vae_factor(base_model: Path) -> int:
    """Return how many pixels wide and high one element of the latents is.

    Raises:
        SettingsError: the VAE says nothing usable.
    """
    blocks = _config(base_model, "vae").get("block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        raise SettingsError("--base-model", str(base_model), _NEEDS)
    return int(2 ** (len(blocks) - 1))


def cross_attention_dim(base_model: Path) -> int | None:
    """Return how wide the text is that the UNet reads: 768 for SD 1.x, 1024 for 2.x, 2048 for SDXL; None if unsaid.

    Raises:
        SettingsError: it is no base model, or its configuration cannot be read.
    """
    width = _config(base_model, "unet").get("cross_attention_dim")
    return width if isinstance(width, int) else None


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
                read_header(real, real.parent, max_bytes=MAX_MODEL_BYTES)
            except CheckpointError as error:
                raise SettingsError(setting, str(file), f"{error.reason}; copy that file again") from error


def _config(base_model: Path, component: str) -> dict[str, Any]:
    if (single := single_file_of(base_model)) is not None:
        return single.configs[component]
    if not (base_model / "model_index.json").is_file():
        raise SettingsError("--base-model", str(base_model), _NAME_A_MODEL)
    return _read_json(base_model / component / "config.json", "--base-model")


def _read_json(path: Path, setting: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(setting, str(path), f"mend or copy that file again ({error})") from error
    if not isinstance(document, dict):
        raise SettingsError(setting, str(path), "that file must hold a JSON object")
    return document

"""A base model in one file: whole or refused in one line, told by its header alone."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.clip_tokenizers import BASE_CONFIGS, tokenizer_files
from shared.errors import CheckpointError, DiskError, SettingsError
from shared.safetensors_file import MAX_MODEL_BYTES, Header, read_header
from shared.single_file import names
from shared.single_file.names import Shapes
from shared.single_file.sizes import Configs, Family, derive_configs, shipped_config

PIPELINES: Mapping[Family, str] = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
CLIP_WORDS, CLIP_TOKENS = 49_408, 77

_FIRST_TENSORS: Mapping[Family, str] = {
    "sdxl": f"{names.TEXT_ENCODER_2}token_embedding.weight",
    "sd15": f"{names.TEXT_ENCODER['sd15']}embeddings.token_embedding.weight",
}
_OTHERS = {  # the start of a tensor's name -> what such a file is
    "cond_stage_model.model.": "a Stable Diffusion 2 model; convert it to a diffusers folder and name that",
    "conditioner.embedders.0.model.": "an SDXL refiner; name an SDXL base model",
    "model.diffusion_model.double_blocks.": "a FLUX model; name a Stable Diffusion 1.5 or SDXL model",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 model; name a Stable Diffusion 1.5 or SDXL model",
    "cond_stage_model.transformer.embeddings.": (
        "an old merge, whose text encoder's names lack text_model.; save it again with a program of today"
    ),
    "lora_": "a LoRA; name the base model it was trained on",
    names.UNET: "a UNet without its text encoder; name a whole model",
}
_UNUSED = re.compile(
    r"model_ema\..*"  # the averaged weights of full files; diffusers and sd-scripts take the others too
    r"|(sqrt_)?(one_minus_)?alphas_cumprod(_prev)?|log_one_minus_alphas_cumprod|sqrt_recipm?1?_alphas_cumprod"
    r"|sqrt_one_minus_alphas_cumprod|betas|posterior_.*|logvar|scale_factor|denoiser\.sigmas|v_pred|ztsnr"
    r"|.*\.embeddings\.position_ids|.*\.logit_scale|.*\.attn_mask|cond_stage_model\..*text_projection(\.weight)?"
    r"|conditioner\.embedders\.0\..*text_projection(\.weight)?|first_stage_model\.(loss|model_ema)\..*"
    r"|embedding_manager\..*"
)
"""Tensors beside the three models: schedules and counters that loaders make anew."""
_FORMATS = {"F32", "F16", "BF16"}
_VAE_ATTENTION = ".mid.attn_1."


@dataclass(frozen=True)
class SingleFile:
    """A whole base model in one safetensors file.

    Args:
        path: the file.
        family: sd15 or sdxl.
        configs: the config.json of each part that has weights, in diffusers' words.
        scheduler: the scheduler_config.json.
        shapes: of each tensor that is used, by part.
        header: the file's.
        own: the folder of configurations beside the file; None where those of the family serve.
    """

    path: Path
    family: Family
    configs: Configs
    scheduler: dict[str, Any]
    shapes: Mapping[str, Shapes]
    header: Header
    own: Path | None

    @property
    def pipeline(self) -> str:
        """The class of diffusers that the file makes."""
        return PIPELINES[self.family]

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The names of its tokenizers."""
        return ("tokenizer",) if self.family == "sd15" else ("tokenizer", "tokenizer_2")

    def write_configs(self, into: Path, parts: Collection[str] | None = None) -> None:
        """Write a diffusers folder without weights, as `from_single_file` takes it for `config`.

        Args:
            into: a folder that is there, for as long as the model is being loaded: nothing is synchronised.
            parts: only these, e.g. ("unet",) or ("tokenizer",); None for all.
        Raises:
            DiskError: it could not be written.
        """
        wanted = [*self.configs, "scheduler", *self.tokenizers] if parts is None else parts
        index = (self.own or BASE_CONFIGS / self.family) / "model_index.json"
        try:
            shutil.copyfile(index, into / index.name)
            for part in wanted:
                (into / part).mkdir(exist_ok=True)
                if part in self.configs:
                    _write_json(into / part / "config.json", self.configs[part])
                elif part == "scheduler":
                    _write_json(into / part / "scheduler_config.json", self.scheduler)
                else:
                    for file in self._tokenizer_files(part):
                        shutil.copyfile(file, into / part / file.name)
        except OSError as error:
            raise DiskError(into, error) from error

    def _tokenizer_files(self, part: str) -> list[Path]:
        if self.own is None:
            return tokenizer_files(f"{self.family}/{part}")
        return [file for file in (self.own / part).iterdir() if file.is_file()]

    def part_digest(self, part: str) -> str:
        """Return the identity of one part: SHA-256 over its configuration and its tensors' names, shapes and bytes.

        Raises:
            OSError: the file cannot be read.
        """
        digest = hashlib.sha256(json.dumps(self.configs[part], sort_keys=True).encode())
        with self.path.open("rb") as file:
            for name in sorted(self.shapes[part]):
                tensor = self.header.tensors[name]
                digest.update(f"\0{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
                start, end = self.header.bounds(name)
                file.seek(start)
                digest.update(file.read(end - start))
        return digest.hexdigest()


def config_folder(file: Path) -> Path:
    """Return where a file's own configurations lie if it has any: model.config beside model.safetensors."""
    return file.with_name(f"{file.stem}.config")


def read_single_file(file: Path, *, setting: str = "--base-model") -> SingleFile:
    """Read the header of a base model, and see that every tensor of its family is there in its size, and no other.

    Args:
        setting: how the user named the file, for messages.
    Raises:
        SettingsError: no safetensors file, cut short, of another family, or with missing, unknown or misshapen tensors.
    """
    header = _header(file, setting)
    family = _family(file, header, setting)
    own = config_folder(file)
    try:
        if own.is_dir():
            configs, scheduler = _own_configs(own, family)
        else:
            configs, scheduler = derive_configs(family, header.tensors), _scheduler(family, header)
            _require_clip_sizes(configs)
        shapes = _expected(family, configs)
    except KeyError as error:
        lack = (
            f"{own} lacks {error.args[0]}; mend it" if own.is_dir() else f"it lacks {error.args[0]}; name a whole model"
        )
        raise _refused(file, setting, lack) from error
    except (ValueError, TypeError, IndexError) as error:
        remedy = f"mend {own}" if own.is_dir() else f"put its configuration into {own}, a diffusers folder"
        raise _refused(file, setting, f"{error}; {remedy}") from error
    _require_fit(file, setting, configs)
    _require_tensors(file, setting, header, {name: size for part in shapes.values() for name, size in part.items()})
    return SingleFile(file, family, configs, scheduler, shapes, header, own if own.is_dir() else None)


def _header(file: Path, setting: str) -> Header:
    if file.suffix.lower() != ".safetensors":
        raise _refused(
            file, setting, "it is no .safetensors file, and a pickle (.ckpt, .pt, .bin) may run code; convert it first"
        )
    real = file.resolve()  # a download cache keeps the content elsewhere and links to it
    try:
        return read_header(real, real.parent, max_bytes=MAX_MODEL_BYTES)
    except CheckpointError as error:
        raise _refused(file, setting, f"{error.reason}; copy that file again") from error


def _family(file: Path, header: Header, setting: str) -> Family:
    for family, name in _FIRST_TENSORS.items():
        if name in header.tensors:
            return family
    for start, kind in _OTHERS.items():
        if any(name.startswith(start) for name in header.tensors):
            raise _refused(file, setting, f"it is {kind}")
    raise _refused(
        file,
        setting,
        f"it holds no Stable Diffusion 1.5 or SDXL model in the original names ({names.UNET}...), its first tensor is "
        f"{next(iter(header.tensors))!r}; name a whole model",
    )


def _own_configs(folder: Path, family: Family) -> tuple[Configs, dict[str, Any]]:
    """Read what lies beside the file.

    Raises:
        ValueError: a file is missing or says something else.
    """
    index = _read_json(folder / "model_index.json")
    if index.get("_class_name") != PIPELINES[family]:
        raise ValueError(f"the file is for {PIPELINES[family]}, its configuration for {index.get('_class_name')}")
    second = () if family == "sd15" else ("_2",)
    encoders = ("text_encoder", *(f"text_encoder{number}" for number in second))
    for number in ("", *second):
        if not (folder / f"tokenizer{number}" / "tokenizer_config.json").is_file():
            raise ValueError(f"its configuration lacks tokenizer{number}/tokenizer_config.json")
    configs = {part: _read_json(folder / part / "config.json") for part in ("unet", "vae", *encoders)}
    return configs, _read_json(folder / "scheduler" / "scheduler_config.json")


def _scheduler(family: Family, header: Header) -> dict[str, Any]:
    """Return the family's noise schedule with what the file tells about its training.

    Raises:
        ValueError: the file's mark has no meaning in the family.
    """
    scheduler = shipped_config(family, "scheduler/scheduler_config.json")
    if "v_pred" in header.tensors or header.metadata.get("modelspec.prediction_type") == "v":
        scheduler["prediction_type"] = "v_prediction"
    if "ztsnr" in header.tensors:
        if family != "sdxl":
            raise ValueError("its mark ztsnr, a schedule down to zero signal, is SDXL's")
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return scheduler


def _require_clip_sizes(configs: Configs) -> None:
    """The tokenizer that comes with the program is CLIP's.

    Raises:
        ValueError: a text encoder reads another vocabulary.
    """
    encoders = {part: config for part, config in configs.items() if part.startswith("text_encoder")}
    for part, config in encoders.items():
        sizes = config["vocab_size"], config["max_position_embeddings"]
        if sizes != (CLIP_WORDS, CLIP_TOKENS):
            raise ValueError(
                f"its {part} reads {sizes[0]} words and {sizes[1]} tokens, not CLIP's {CLIP_WORDS} and {CLIP_TOKENS}"
            )


def _expected(family: Family, configs: Configs) -> dict[str, Shapes]:
    shapes = {
        "unet": names.unet_tensors(configs["unet"]),
        "vae": names.vae_tensors(configs["vae"]),
        "text_encoder": names.clip_tensors(configs["text_encoder"], names.TEXT_ENCODER[family]),
    }
    if family == "sdxl":
        shapes["text_encoder_2"] = names.open_clip_tensors(configs["text_encoder_2"], names.TEXT_ENCODER_2)
    return shapes


def _require_fit(file: Path, setting: str, configs: Configs) -> None:
    """See that the parts were made for each other."""
    unet, latent = configs["unet"], configs["vae"]["latent_channels"]
    if unet["in_channels"] != latent:
        raise _refused(
            file,
            setting,
            f"its UNet takes {unet['in_channels']} channels, its VAE makes {latent}; inpainting models will not do, "
            "name another model",
        )
    widths = [config["hidden_size"] for part, config in configs.items() if part.startswith("text_encoder")]
    if unet["cross_attention_dim"] != sum(widths):
        raise _refused(
            file,
            setting,
            f"its UNet expects text of width {unet['cross_attention_dim']}, its text encoders make {sum(widths)}; name "
            "another model",
        )
    if len(widths) > len(set(widths)):  # diffusers' loader tells them apart by their width
        raise _refused(
            file, setting, f"both text encoders have width {widths[0]}, which no SDXL model has; name another model"
        )


def _require_tensors(file: Path, setting: str, header: Header, expected: Shapes) -> None:
    missing = [name for name in expected if name not in header.tensors]
    if missing:
        raise _refused(file, setting, f"it lacks {_some(missing)} of {len(expected)} tensors; name a whole model")
    unknown = [name for name in header.tensors if name not in expected and not _UNUSED.fullmatch(name)]
    if unknown:
        raise _refused(
            file, setting, f"it holds {_some(unknown)} that its family does not have; save it again without them"
        )
    for name, shape in expected.items():
        tensor = header.tensors[name]
        shapes = {shape, shape[:2]} if _VAE_ATTENTION in name else {shape}  # saved as linear layers by some
        if tensor.shape not in shapes:
            raise _refused(
                file, setting, f"its {name} has shape {list(tensor.shape)}, not {list(shape)}; name another model"
            )
        if tensor.dtype not in _FORMATS:
            raise _refused(
                file, setting, f"its {name} is of {tensor.dtype}; save it in one of {', '.join(sorted(_FORMATS))}"
            )


def _some(tensors: list[str]) -> str:
    return tensors[0] if len(tensors) == 1 else f"{tensors[0]} and {len(tensors) - 1} more"


def _refused(file: Path, setting: str, reason: str) -> SettingsError:
    return SettingsError(setting, str(file), reason)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} of its configuration cannot be read ({error})") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path.parent.name}/{path.name} of its configuration holds no JSON object")  # noqa: TRY004
    return document


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")

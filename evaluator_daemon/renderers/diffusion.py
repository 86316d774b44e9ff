"""Stable Diffusion 1.x and 2.x from a local diffusers folder: resident, offline, one LoRA at a time, never fused."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import peft  # noqa: F401  diffusers imports it on the first LoRA; here it is part of what a fork shares
import torch
from diffusers import (
    AutoencoderKL,  # noqa: F401  loaded lazily otherwise, as are the next ones with this mark
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,  # noqa: F401
)
from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer
from safetensors.torch import load as load_tensors
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401  loaded lazily otherwise
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

from evaluator_daemon.job import Job
from evaluator_daemon.renderers.base import OnStep, Rendering
from shared.errors import DeviceMemoryError, RefusedCheckpointError, ResourceError, SettingsError, UnknownPluginError
from shared.gpu_lease import GpuLease
from shared.safetensors_file import Checkpoint, Family, LoraLayout
from shared.schemas import PlannedSample

# name in the plan -> diffusers scheduler and its options
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpmpp_2m_karras": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
}
_ADAPTER = "checkpoint"
# Classes whose Linear and 1x1 Conv2d layers sd-scripts' networks.lora adapts
_USUAL_BLOCKS = ("Transformer2DModel", "CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
_SCALE_TOLERANCE = 0.01  # half precision rounds


class DiffusionRenderer:
    """Holds one pipeline.

    Raises:
        SettingsError: the folder is no Stable Diffusion 1.x or 2.x pipeline.
        ResourceError: the device is not there.
    """

    def __init__(self, job: Job) -> None:
        samplers = {job.plan.sample(index).sampler for index in range(job.plan.num_samples)}
        if unknown := sorted(samplers - SAMPLERS.keys()):
            raise UnknownPluginError("image sampler", unknown[0], SAMPLERS)
        torch.set_num_threads(job.threads)
        self.plan = job.plan
        self.device = _device(job.device)
        self._pipeline = _load_pipeline(job.base_model, getattr(torch, job.plan.dtype)).to(self.device)
        self._schedulers = {name: _scheduler(name, self._pipeline.scheduler.config) for name in samplers}
        self._pipeline.vae.enable_slicing()
        self._pipeline.set_progress_bar_config(disable=True)
        self._layers = _layers(self._pipeline)
        self._usual = _usual_layers(self._pipeline)
        self._base_embeddings: dict[str, torch.Tensor] = {}
        self._text_encoder_changed = False

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def versions(self) -> dict[str, str]:
        names = ("torch", "diffusers", "transformers", "peft", "numpy")
        return {name: version(name) for name in names}

    # ------------------------------------------------------------------------------------------------------- LoRA

    @contextmanager
    def lora(self, checkpoint: Checkpoint, layout: LoraLayout) -> Iterator[None]:
        """Apply a checkpoint from the bytes already read; see `Renderer.lora`."""
        wanted = {_layer_name(module.name, layout.family): module.scale for module in layout.modules}
        self._require_layers(checkpoint, set(wanted), layout)
        try:
            self._load(checkpoint)
            applied = _applied(self._pipeline)
            if differing := wanted.keys() ^ applied.keys():
                raise _not_applied(checkpoint, differing, "were not applied by the loader")
            if misread := {n for n, scale in wanted.items() if abs(applied[n] / scale - 1) > _SCALE_TOLERANCE}:
                raise _not_applied(checkpoint, misread, "were applied at another strength than alpha / rank", _RESAVE)
            self._pipeline.set_adapters([_ADAPTER], [self.plan.lora_scale])
            self._text_encoder_changed = any(name.startswith("te_") for name in wanted)
            yield
        finally:
            self._pipeline.unload_lora_weights()
            self._text_encoder_changed = False

    def left_out(self, layout: LoraLayout) -> set[str]:
        """See `Renderer.left_out`."""
        names = {_layer_name(module.name, layout.family) for module in layout.modules}
        return {
            layer
            for part in {name.partition("_")[0] for name in names}
            for layer in self._usual
            if layer.startswith(f"{part}_") and layer not in names
        }

    def _load(self, checkpoint: Checkpoint) -> None:
        try:
            self._pipeline.load_lora_weights(load_tensors(checkpoint.raw), adapter_name=_ADAPTER)
        except (KeyError, ValueError) as error:  # how diffusers says that it does not know a file's form
            raise RefusedCheckpointError(
                checkpoint.path, "not_applied", f"diffusers cannot load it ({error}); {_RESAVE}"
            ) from error

    def _require_layers(self, checkpoint: Checkpoint, wanted: set[str], layout: LoraLayout) -> None:
        """Loaders drop modules they do not know, and stumble over shapes that do not fit."""
        if unknown := wanted - self._layers.keys():
            raise _not_applied(checkpoint, unknown, "do not exist in the base model")
        misfits = set()
        for module in layout.modules:
            down, up = _pair_shapes(checkpoint, module.name)
            out, into, *_ = self._layers[_layer_name(module.name, layout.family)]
            if (up[0], down[1]) != (out, into):
                misfits.add(module.name)
        if misfits:
            raise _not_applied(
                checkpoint, misfits, "have another width than the base model's; trained on another model"
            )

    # -------------------------------------------------------------------------------------------------- rendering

    @torch.inference_mode()
    def render(self, on_step: OnStep) -> Rendering:
        """Render the plan's grid; a batch that does not fit into memory is halved once."""
        for batch_size in (self.plan.batch_size, max(1, self.plan.batch_size // 2)):
            try:
                return Rendering(self._render_all(batch_size, on_step), batch_size)
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            torch.cuda.empty_cache()  # outside the except: the traceback holds the tensors
        raise DeviceMemoryError(
            f"the {self.device_name} has too little memory for {batch_size} pictures at once ({reason}); free it, "
            "or start a study with a smaller --num-samples"
        )

    def _render_all(self, batch_size: int, on_step: OnStep) -> list[NDArray[np.uint8]]:
        pictures: dict[int, NDArray[np.uint8]] = {}
        with warnings.catch_warnings():
            # diffusers' scheduler turns tensors into arrays in a way that numpy 2 deprecates
            warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy", DeprecationWarning)
            for batch in self.plan.batches(batch_size):
                samples = [self.plan.sample(index) for index in batch]
                pictures |= zip(batch, self._render_batch(samples, on_step), strict=True)
        return [pictures[index] for index in range(self.plan.num_samples)]

    def _render_batch(self, samples: list[PlannedSample], on_step: OnStep) -> list[NDArray[np.uint8]]:
        """Render samples of equal `shape_of_work` at once."""

        def after_step(pipeline: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return values

        alike = samples[0]
        self._pipeline.scheduler = self._schedulers[alike.sampler]
        images = self._pipeline(
            prompt_embeds=self._embed([sample.prompt for sample in samples]),
            negative_prompt_embeds=self._embed([sample.negative_prompt for sample in samples]),
            latents=self._noise(samples),
            num_inference_steps=alike.steps,
            guidance_scale=alike.cfg_scale,
            width=alike.width,
            height=alike.height,
            output_type="np",
            callback_on_step_end=after_step,
        ).images
        images[np.isnan(images).any(axis=(1, 2, 3))] = 0  # all black, which a sentinel reports
        return list((images.clip(0, 1) * 255).round().astype(np.uint8))

    def _noise(self, samples: list[PlannedSample]) -> torch.Tensor:
        """(n, channels, h, w) from one CPU generator per sample, so that device and batch do not choose the noise."""
        factor = self._pipeline.vae_scale_factor
        channels = self._pipeline.unet.config.in_channels
        noise = [
            torch.randn(
                (channels, sample.height // factor, sample.width // factor),
                generator=torch.Generator().manual_seed(sample.seed),
            )
            for sample in samples
        ]
        return torch.stack(noise).to(self.device, self._pipeline.unet.dtype)

    def _embed(self, prompts: list[str]) -> torch.Tensor:
        """(n, tokens, width); remembered as long as no LoRA changes the text encoder."""
        if self._text_encoder_changed:
            distinct = {prompt: self._encode(prompt) for prompt in dict.fromkeys(prompts)}
            return torch.cat([distinct[prompt] for prompt in prompts])
        for prompt in prompts:
            if prompt not in self._base_embeddings:
                self._base_embeddings[prompt] = self._encode(prompt)
        return torch.cat([self._base_embeddings[prompt] for prompt in prompts])

    def _encode(self, prompt: str) -> torch.Tensor:
        tokenizer, encoder = self._pipeline.tokenizer, self._pipeline.text_encoder
        ids = tokenizer(
            prompt,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.device)
        states = encoder(ids, output_hidden_states=True).hidden_states[-self.plan.clip_skip]
        # transformers < 5.6 keeps the layers in .text_model; hidden states come before the last norm
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        return norm(states)  # type: ignore[no-any-return]


def _scheduler(sampler: str, config: Any) -> Any:
    kind, options = SAMPLERS[sampler]
    return kind.from_config(config, **options)


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ResourceError(
            f"--device {name}: torch finds no usable CUDA device; repair the driver or use --device cpu"
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices; name another")
    return torch.device("cuda", device.index or 0)


def gpu_lease(device: str) -> GpuLease:
    """The lease of the card behind "cuda" or "cuda:N", for evaluators."""
    return GpuLease(f"GPU-{torch.cuda.get_device_properties(_device(device)).uuid}", "evaluator")


def _load_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if index.get("_class_name") != StableDiffusionPipeline.__name__:
        raise SettingsError(
            "--base-model", str(folder), f"{index.get('_class_name')} cannot be rendered; StableDiffusionPipeline can"
        )
    disable_diffusers_bars()
    disable_transformers_bars()  # type: ignore[no-untyped-call]
    for noisy in ("transformers.integrations.peft", "diffusers.loaders.peft"):
        # alarming tables about whole files; what was applied is compared with the file's keys here
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        return StableDiffusionPipeline.from_pretrained(
            folder,
            dtype=dtype,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        raise SettingsError(
            "--base-model", str(folder), f"repair the folder, diffusers cannot load it ({error})"
        ) from error


# ------------------------------------------------------------------------------------------------------ layer names
# One spelling for kohya's, peft's and the model's own names: unet_... or te_..., with underscores. Newer versions of
# transformers dropped "text_model" from the text encoder's module names, files keep it.


def _layer_name(module: str, family: Family) -> str:
    name = module.replace(".", "_")
    if family is Family.KOHYA:
        name = name.removeprefix("lora_")
    else:
        name = name.replace("text_encoder_", "te_", 1) if name.startswith("text_encoder_") else name
    return name.replace("te_text_model_", "te_", 1) if name.startswith("te_text_model_") else name


def _named_modules(pipeline: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    for prefix, model in (("unet", pipeline.unet), ("te", pipeline.text_encoder)):
        for name, module in model.named_modules():
            yield _layer_name(f"{prefix}.{name}", Family.DIFFUSERS), module


def _layers(pipeline: Any) -> dict[str, torch.Size]:
    """Layer name -> the shape of its weight, (out, in) or (out, in, h, w)."""
    return {
        name: module.weight.shape
        for name, module in _named_modules(pipeline)
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def _usual_layers(pipeline: Any) -> set[str]:
    """Names of the layers that a usual LoRA adapts."""
    return {
        _layer_name(f"{prefix}.{path}.{inner}", Family.DIFFUSERS)
        for prefix, model in (("unet", pipeline.unet), ("te", pipeline.text_encoder))
        for path, block in model.named_modules()
        if type(block).__name__ in _USUAL_BLOCKS
        for inner, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear) or (isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (1, 1))
    }


def _applied(pipeline: Any) -> dict[str, float]:
    """Layer name -> what up @ down is multiplied with, of every layer that holds the whole pair."""
    return {
        name: float(module.scaling[_ADAPTER])
        for name, module in _named_modules(pipeline)
        if isinstance(module, LoraLayer) and _ADAPTER in module.lora_A and _ADAPTER in module.lora_B
    }


def _pair_shapes(checkpoint: Checkpoint, module: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    def shape(*endings: str) -> tuple[int, ...]:
        return next(checkpoint.tensors[name].shape for e in endings if (name := f"{module}.{e}") in checkpoint.tensors)

    return shape("lora_down.weight", "lora_A.weight"), shape("lora_up.weight", "lora_B.weight")


_RESAVE = "save it in kohya's form"


def _not_applied(
    checkpoint: Checkpoint, modules: set[str], what: str, remedy: str = "train on this base model"
) -> RefusedCheckpointError:
    shown = ", ".join(sorted(modules)[:3])
    return RefusedCheckpointError(
        checkpoint.path,
        "not_applied",
        f"{len(modules)} of its modules {what}, such as {shown}; {remedy}",
    )

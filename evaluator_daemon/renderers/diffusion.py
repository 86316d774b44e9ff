"""Stable Diffusion from a local diffusers folder: resident, offline, one LoRA at a time, never fused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray

from evaluator_daemon.job import Job
from evaluator_daemon.renderers.base import OnStep, Rendering, is_out_of_memory
from evaluator_daemon.renderers.families import TextEmbedding, load_family
from evaluator_daemon.renderers.layer_names import LayerNames, component_of
from evaluator_daemon.renderers.lora_layers import applied, require_used
from evaluator_daemon.renderers.sampling import decode, denoise, make_scheduler, noise, require_sampler
from shared.errors import DeviceMemoryError, ResourceError
from shared.safetensors_file import Checkpoint, LoraLayout
from shared.schemas import PlannedSample


class DiffusionRenderer:
    """Holds one pipeline.

    Raises:
        SettingsError: the folder is no Stable Diffusion 1.x, 2.x or SDXL pipeline.
        ResourceError: the device is not there.
    """

    def __init__(self, job: Job) -> None:
        samples = [job.plan.sample(index) for index in range(job.plan.num_samples)]
        for sample in samples:
            require_sampler(sample.sampler)
        torch.set_num_threads(job.threads)
        torch.backends.cudnn.allow_tf32 = False  # on by default: float32 would be 10 bits wide on some cards only
        self.plan = job.plan
        self.device = _device(job.device)
        dtype: torch.dtype = getattr(torch, job.plan.dtype)
        self._family = load_family(job.base_model, dtype)
        self._pipeline = self._family.pipeline.to(self.device)
        if dtype is torch.float16 and self._family.keeps_vae_precise():
            self._pipeline.vae.to(torch.float32)
        if self.device.type == "cuda":  # how its convolutions like pictures to lie
            self._pipeline.unet.to(memory_format=torch.channels_last)
            self._pipeline.vae.to(memory_format=torch.channels_last)
        names = {sample.sampler for sample in samples}
        self._schedulers = {name: make_scheduler(name, self._pipeline.scheduler) for name in names}
        self._pipeline.vae.enable_slicing()
        self._names = LayerNames(self._family.adaptable, self._family.kohya_prefixes)
        self._base_embeddings: dict[str, TextEmbedding] = {}
        self._text_encoder_changed = False
        self._has_rendered = False

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def versions(self) -> dict[str, str]:
        names = ("torch", "diffusers", "transformers", "numpy")
        return {name: version(name) for name in names}

    # ------------------------------------------------------------------------------------------------------- LoRA

    @contextmanager
    def lora(self, checkpoint: Checkpoint, layout: LoraLayout) -> Iterator[None]:
        """Apply a checkpoint from the bytes already read; see `Renderer.lora`."""
        with applied(checkpoint, layout, self._names, self.plan.lora_scale) as pairs:
            self._text_encoder_changed = any(component_of(layer) != "unet" for layer in pairs)
            self._has_rendered = False
            try:
                yield
            finally:
                self._text_encoder_changed = False
        if self._has_rendered:
            require_used(checkpoint, pairs)

    def left_out(self, layout: LoraLayout) -> set[str]:
        """See `Renderer.left_out`."""
        return self._names.left_out({layer for layer in self._names.resolve(layout).values() if layer is not None})

    # -------------------------------------------------------------------------------------------------- rendering

    @torch.inference_mode()
    def render(self, on_step: OnStep) -> Rendering:
        """Render the plan's grid; a batch that does not fit into memory is halved once."""
        for batch_size in (self.plan.batch_size, max(1, self.plan.batch_size // 2)):
            try:
                return Rendering(self._render_all(batch_size, on_step), batch_size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0] or type(error).__name__
            torch.cuda.empty_cache()  # outside the except: the traceback holds the tensors
        raise DeviceMemoryError(
            f"the {self.device_name} has too little memory for {batch_size} pictures at once ({reason}); free it, "
            "or start a study with a smaller --num-samples"
        )

    def _render_all(self, batch_size: int, on_step: OnStep) -> list[NDArray[np.uint8]]:
        samples = [self.plan.sample(index) for index in range(self.plan.num_samples)]
        embedded = self._embed([text for one in samples for text in (one.prompt, one.negative_prompt)])
        pictures: dict[int, NDArray[np.uint8]] = {}
        for batch in self.plan.batches(batch_size):
            rendered = self._render_batch([samples[index] for index in batch], embedded, on_step)
            pictures |= zip(batch, rendered, strict=True)
        self._has_rendered = True
        return [pictures[index] for index in range(self.plan.num_samples)]

    def _render_batch(
        self, samples: list[PlannedSample], embedded: dict[str, TextEmbedding], on_step: OnStep
    ) -> list[NDArray[np.uint8]]:
        """Render samples of equal `shape_of_work` at once."""
        unet, factor, alike = self._pipeline.unet, self._pipeline.vae_scale_factor, samples[0]
        shape = (unet.config.in_channels, alike.height // factor, alike.width // factor)
        latents = denoise(
            self._family,
            self._schedulers[alike.sampler],
            noise(shape, [sample.seed for sample in samples]).to(self.device, unet.dtype),
            TextEmbedding.stacked([embedded[sample.prompt] for sample in samples]),
            TextEmbedding.stacked([embedded[sample.negative_prompt] for sample in samples]),
            steps=alike.steps,
            guidance=alike.cfg_scale,
            on_step=on_step,
        )
        return decode(self._pipeline.vae, latents)

    def _embed(self, of_samples: list[str]) -> dict[str, TextEmbedding]:
        """Every prompt, negative ones too, encoded once and all in one batch; the base model's are remembered."""
        if self._base_embeddings and not self._text_encoder_changed:
            return self._base_embeddings
        prompts = list(dict.fromkeys(of_samples))
        batch = self._family.encode(prompts, self.plan.clip_skip)
        embedded = {prompt: batch.row(index) for index, prompt in enumerate(prompts)}
        if not self._text_encoder_changed:
            self._base_embeddings = embedded
        return embedded


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

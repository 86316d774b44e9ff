"""The networks, the optimizer, and one step of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optimizer_daemon.lora_training.base_model import BaseModel
from optimizer_daemon.lora_training.captions import varies
from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.lora_training.dataset import Batch
from optimizer_daemon.lora_training.dataset_config import BatchShape
from optimizer_daemon.lora_training.latents import Latents
from optimizer_daemon.lora_training.lora import LoraNetwork
from optimizer_daemon.lora_training.models import (
    Hardware,
    load_noise_scheduler,
    load_tokenizers,
)
from optimizer_daemon.lora_training.objective import Objective
from optimizer_daemon.lora_training.optimizers import create_optimizer
from optimizer_daemon.lora_training.packed import is_packed
from optimizer_daemon.lora_training.resident import frozen_networks
from optimizer_daemon.lora_training.schedulers import create_lr_scheduler
from optimizer_daemon.lora_training.size_conditions import time_ids
from optimizer_daemon.lora_training.start_weights import load_start_weights
from optimizer_daemon.lora_training.state import Position, Randomness, TrainingState
from optimizer_daemon.lora_training.text import TextConditioning, TextEmbedding


class Learner:
    """A LoRA in training.

    Args:
        config: what it is told.
        base: the base model.
        hardware: where it runs.
        latents: the images.
        total_steps: optimizer steps of the whole training, for the learning rates' course.
        batch_shape: of all batches; None where they have several.
    """

    def __init__(
        self,
        config: TrainConfig,
        base: BaseModel,
        hardware: Hardware,
        latents: Latents,
        total_steps: int,
        batch_shape: BatchShape | None = None,
    ) -> None:
        self.hardware = hardware
        self.predicts_velocity = config.predicts_velocity(base.predicts_velocity)
        self._config = config
        self._latents = latents
        unet, encoders = frozen_networks(base, hardware, batch_shape)
        self._unet: Any = unet
        self._text = TextConditioning(
            load_tokenizers(base),
            encoders,
            config.clip_skip,
            max_token_length=config.max_token_length,
            trained=config.trains_text_encoder,
        )
        self._objective = Objective(
            config,
            load_noise_scheduler(base).alphas_cumprod,
            predicts_velocity=self.predicts_velocity,
            device=hardware.device,
        )
        torch.manual_seed(config.seed)  # whatever was loaded or encoded before
        self.network = LoraNetwork(
            self._unet,
            encoders,
            rank=config.network_dim,
            alpha=config.network_alpha,
            dropout=config.network_dropout,
            args=config.network_args,
            untrained=config.untrained(base.text_encoders),
        ).to(hardware.device)
        if config.network_weights is not None:
            load_start_weights(self.network, config.network_weights)
        self._trained_encoders = encoders if config.trains_text_encoder else []
        self.saves_memory = False
        if config.gradient_checkpointing is True:
            self.save_memory()
        self.torch_optimizer = create_optimizer(config, self.network)
        self._optimizer = self.torch_optimizer.optimizer
        self._lr_scheduler = create_lr_scheduler(config, self._optimizer, total_steps)
        self._scaler = torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16)
        self._weights = list(self.network.parameters())

    def loss(self, batch: Batch, timestep: int | None = None) -> Tensor:
        """Return the loss of a batch with fresh noise; a scalar, float32.

        Args:
            batch: the images; those for regularisation count `prior_loss_weight` times.
            timestep: of all of them; drawn for each if None.
        """
        clean = self._latents.of(batch)
        times = None if timestep is None else torch.full((len(batch),), timestep, device=clean.device)
        question = self._objective.ask(clean, times)
        with self.hardware.autocast():
            text = self._text.of([draw.caption for draw in batch], [varies(draw.image.subset) for draw in batch])
            predicted = self._unet(
                question.noisy,
                question.times,
                text.states,
                added_cond_kwargs=_beside_text(text, batch),
                return_dict=False,
            )[0]
        return self._objective.loss(predicted, question, self._weights_of(batch, clean.device))

    @contextmanager
    def evaluating(self, seed: int) -> Iterator[None]:
        """Within it nothing is learned, nothing dropped, and noise is that of `seed`; afterwards all is as before."""
        before = Randomness.capture(self.hardware.device)
        self.network.eval()
        torch.manual_seed(seed)
        try:
            with torch.no_grad(), self.torch_optimizer.settled():
                yield
        finally:
            self.network.train()
            before.restore(self.hardware.device)

    @property
    def timesteps(self) -> int:
        """Length of the noise schedule."""
        return self._objective.timesteps

    def _weights_of(self, batch: Batch, device: torch.device) -> Tensor | None:
        regularises = [draw.image.subset.is_reg for draw in batch]
        if not any(regularises):
            return None
        return torch.tensor(
            [self._config.prior_loss_weight if is_reg else 1.0 for is_reg in regularises], device=device
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a batch that is one of `gradient_accumulation_steps`."""
        self._scaler.scale(loss / self._config.gradient_accumulation_steps).backward()

    def update(self) -> None:
        """Make one optimizer step of the gradients so far; the learning rates move on with it."""
        if self._config.max_grad_norm > 0:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._weights, self._config.max_grad_norm)
        scale_before = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._scaler.get_scale() >= scale_before:  # smaller when fp16 overflowed and the step was left out
            self._lr_scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._config.scale_weight_norms:
            self.network.limit(self._config.scale_weight_norms)

    @property
    def packed(self) -> bool:
        """Whether the UNet's weights are laid out for this CPU and these batches."""
        return is_packed(self._unet)

    def lay_out_weights(self, memory_format: torch.memory_format) -> None:
        """Change the memory format of the UNet's convolutions; a copy is made where they have another."""
        self._unet.to(memory_format=memory_format)

    def save_memory(self) -> None:
        """Compute activations twice from now on: gradient checkpointing."""
        self.saves_memory = True
        _save_memory(self._unet, self._trained_encoders)

    def forget_gradients(self) -> None:
        """Drop what `backward` has added since the last step."""
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def rates(self) -> list[float]:
        """Learning rates for the next step, as `torch_optimizer.tags` names them."""
        return self.torch_optimizer.rates(self._lr_scheduler.get_last_lr())

    def state(
        self, position: Position, randomness: Randomness, losses: Sequence[float], identity: Mapping[str, Any]
    ) -> TrainingState:
        """Return the state between two optimizer steps."""
        return TrainingState(
            position=position,
            randomness=randomness,
            network=self.network.state_dict(),
            optimizer=self._optimizer.state_dict(),
            lr_scheduler=self._lr_scheduler.state_dict(),
            scaler=self._scaler.state_dict(),
            losses=tuple(losses),
            saves_memory=self.saves_memory,
            identity=identity,
        )

    def restore(self, state: TrainingState) -> None:
        """Become what `state` was."""
        self.network.load_state_dict(state.network)
        self._optimizer.load_state_dict(dict(state.optimizer))
        self._lr_scheduler.load_state_dict(dict(state.lr_scheduler))
        self._scaler.load_state_dict(dict(state.scaler))
        if state.saves_memory and self._config.gradient_checkpointing == "auto" and not self.saves_memory:
            self.save_memory()
        state.randomness.restore(self.hardware.device)


def _beside_text(text: TextEmbedding, batch: Batch) -> dict[str, Tensor] | None:
    """What SDXL's UNet is told beside the text's states: the pooled text, and each picture's sizes, (batch, 6)."""
    if text.pooled is None:
        return None
    sizes = [time_ids(draw.image.size, draw.image.fit.bucket, flipped=draw.flipped) for draw in batch]
    return {"text_embeds": text.pooled, "time_ids": torch.tensor(sizes, device=text.pooled.device)}


def _save_memory(unet: Any, trained_encoders: Sequence[Any]) -> None:
    unet.enable_gradient_checkpointing()
    for encoder in trained_encoders:
        # transformers renamed it within version 5
        old = encoder.gradient_checkpointing_enable
        getattr(encoder, "activation_checkpointing_enable", old)({"use_reentrant": False})
        encoder.train()  # transformers checkpoints in training mode only; CLIP's dropout is 0

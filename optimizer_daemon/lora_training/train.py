"""One training, from the first latent to the final checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from optimizer_daemon.lora_training.base_model import BaseModel
from optimizer_daemon.lora_training.config import TrainConfig
from optimizer_daemon.lora_training.dataset import Batch, TrainingData
from optimizer_daemon.lora_training.dataset_config import batch_shape
from optimizer_daemon.lora_training.identity import identity_of
from optimizer_daemon.lora_training.ignored import ignored_settings
from optimizer_daemon.lora_training.latents import default_cache_dir, load_latents
from optimizer_daemon.lora_training.learner import Learner
from optimizer_daemon.lora_training.memory import memory_that_ran_out, out_of_memory
from optimizer_daemon.lora_training.metadata import Facts, training_metadata
from optimizer_daemon.lora_training.models import Hardware, choose_hardware
from optimizer_daemon.lora_training.reporting import Reporter
from optimizer_daemon.lora_training.saving import checkpoint_path, is_due, save_checkpoint
from optimizer_daemon.lora_training.state import Position, Randomness, load_state, remove_state, save_state
from optimizer_daemon.lora_training.stopping import StopWish
from optimizer_daemon.lora_training.strict_settings import count_steps
from optimizer_daemon.lora_training.toml_file import line_of_key
from optimizer_daemon.lora_training.validation import Validation
from shared.errors import ResourceError, Stopped
from shared.failpoints import reach

_MOST_PIXELS_IN_CHANNELS_LAST, _MOST_PIXELS_WITHOUT_ONEDNN = 160 * 160, 256 * 256


def train(config: TrainConfig, data: TrainingData, base: BaseModel, wish: StopWish) -> None:
    """Train and leave the checkpoints; on a stop leave the state to go on from.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        UserError: a setting turned out to be unusable, or the loss or the weights are not finite.
        ResourceError: memory or the GPU is missing, or the disk failed.
        UnreadableFileError, StudyMismatchError: there is a state that cannot be gone on from.
    """
    with _lack_explained(config, data, lambda: config.gradient_checkpointing is True):
        _train(config, data, base, wish)


def _train(config: TrainConfig, data: TrainingData, base: BaseModel, wish: StopWish) -> None:
    hardware = _set_up_torch(config)
    steps_per_epoch = -(-data.batches_per_epoch // config.gradient_accumulation_steps)
    total_steps = steps_per_epoch * config.max_train_epochs
    cache = config.latent_cache_dir or default_cache_dir()
    images = data.images + data.validation_images
    latents = load_latents(images, base, hardware, cache, wish.check)
    print(f"latents: {latents.cached} from the cache, {latents.encoded} encoded", flush=True)
    shape = batch_shape(images.plan for images in data.sets)
    learner = Learner(config, base, hardware, latents, total_steps, shape)
    identity = identity_of(config, data, base, hardware)
    start, losses = _resumed(config, learner, identity)
    facts = Facts(learner.torch_optimizer.description, hardware.precision, learner.predicts_velocity, total_steps)
    metadata = training_metadata(config, data, base, facts)
    _introduce(config, data, base, learner, total_steps)
    reporter = Reporter(
        epochs=config.max_train_epochs,
        total_steps=total_steps,
        start=start,
        losses=losses,
        logging_dir=config.logging_dir,
        rate_names=learner.torch_optimizer.tags,
    )
    explained = _lack_explained(config, data, lambda: learner.saves_memory)
    with explained, reporter, _quick_convolutions(learner, data):
        validation = Validation.of(config, data, learner.timesteps)
        _Course(config, data, learner, reporter, identity, metadata, validation).run(start, steps_per_epoch, wish)
    reach("trainer.finished")
    remove_state(config.state_folder)


@dataclass(frozen=True)
class _Course:
    """A training that is ready to go."""

    config: TrainConfig
    data: TrainingData
    learner: Learner
    reporter: Reporter
    identity: Mapping[str, Any]
    metadata: Mapping[str, str]
    validation: Validation

    def run(self, position: Position, steps_per_epoch: int, wish: StopWish) -> None:
        """Train from `position` to the end."""
        config, learner, reporter = self.config, self.learner, self.reporter
        every, device = config.gradient_accumulation_steps, learner.hardware.device
        randomness = Randomness.capture(device)
        try:
            for epoch in range(position.epoch, config.max_train_epochs + 1):
                reporter.begin_epoch(epoch)
                batches = self.data.epoch_batches(
                    config.seed, epoch, batches_per_step=every, epochs=config.max_train_epochs
                )
                position = self._validated(position, wish)  # where a stop came into it
                for index in range(position.step_in_epoch, steps_per_epoch):
                    places = range(index * every, min((index + 1) * every, len(batches)))
                    losses = self._add_gradients([batches[place] for place in places], randomness, wish)
                    learner.update()
                    position = Position(epoch, index + 1, position.step + 1, validated=False)
                    randomness = Randomness.capture(device)
                    reporter.step(position.step, places, losses, learner.rates)
                    reach("trainer.step")
                    position = self._validated(position, wish)
                # Before the epoch counts as done: a training that is stopped meanwhile comes back to its end.
                if self.validation.is_due_after_epoch(epoch):
                    reporter.validated("epoch", epoch, self.validation.loss(learner, wish.check))
                position = Position(epoch + 1, 0, position.step)
                reporter.end_epoch(epoch)
                if is_due(config, epoch):
                    self._save_weights(epoch, position.step)
                    if epoch < config.max_train_epochs:
                        self._save_state(position, randomness)
        except Stopped:
            # Batches of an unfinished step count as not seen: their gradients go, their random numbers come again.
            reporter.catch_up()
            self._save_state(position, randomness)
            print(f"\nstate saved after step {position.step}: {config.state_folder}", flush=True)
            raise

    def _validated(self, position: Position, wish: StopWish) -> Position:
        """Return the position with the validation done that is due after its step, where one is."""
        if not position.validated and self.validation.is_due_after_step(position.step):
            self.reporter.validated("step", position.step, self.validation.loss(self.learner, wish.check))
        return replace(position, validated=True)

    def _add_gradients(self, batches: Sequence[Batch], before: Randomness, wish: StopWish) -> list[torch.Tensor]:
        """Return the losses of the batches of a step, still on their device; their gradients were added.

        With gradient_checkpointing = "auto" a step that runs out of memory is begun again with it.

        Args:
            batches: of the step.
            before: the generators at its beginning.
            wish: to stop.
        """
        learner = self.learner
        if self.config.gradient_checkpointing != "auto" or learner.saves_memory:
            return [_add_gradients(learner, batch, wish) for batch in batches]
        try:
            return [_add_gradients(learner, batch, wish) for batch in batches]
        except (RuntimeError, MemoryError) as error:
            if memory_that_ran_out(f"{type(error).__name__}: {error}") is None:
                raise
        # Out of the except block, which holds on to the tensors of the failed attempt.
        learner.forget_gradients()
        if learner.hardware.device.type == "cuda":
            torch.cuda.empty_cache()
        before.restore(learner.hardware.device)
        learner.save_memory()
        print("\nthe memory ran out; gradient checkpointing is on from here", flush=True)
        return [_add_gradients(learner, batch, wish) for batch in batches]

    def _save_weights(self, epoch: int, step: int) -> None:
        path, precision = checkpoint_path(self.config, epoch), self.config.save_precision
        self.reporter.saving(path)
        metadata = {**self.metadata, "ss_gradient_checkpointing": str(self.learner.saves_memory)}
        with self.learner.torch_optimizer.settled():
            save_checkpoint(path, self.learner.network, metadata, epoch=epoch, step=step, precision=precision)
        reach("trainer.checkpoint_saved")

    def _save_state(self, position: Position, randomness: Randomness) -> None:
        state = self.learner.state(position, randomness, self.reporter.mean.losses, self.identity)
        save_state(self.config.state_folder, state)
        reach("trainer.state_saved")


def _add_gradients(learner: Learner, batch: Batch, wish: StopWish) -> torch.Tensor:
    """Return the loss of a batch whose gradients were added, still on its device."""
    wish.check()
    loss = learner.loss(batch)
    learner.backward(loss)
    return loss.detach()


def _set_up_torch(config: TrainConfig) -> Hardware:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it; nothing changes on a CPU
    return choose_hardware(config)


@contextmanager
def _quick_convolutions(learner: Learner, data: TrainingData) -> Iterator[None]:
    """Do without oneDNN where its reordering of plain weights at every convolution costs more than it saves.

    CPU seconds of SD1.5's UNet forward and backward on one thread, in channels_last with and without oneDNN, then
    contiguous without: .97 .91 1.37 at 64 x 64 pixels, 2.4 1.9 2.4 at 128, 6.2 5.2 4.9 at 256, 21 22 23 at 512.
    """
    most = max(width * height for images in data.sets for width, height in images.buckets)
    onednn: Any = torch.backends.mkldnn
    before = onednn.enabled
    on_one_core = learner.hardware.device.type == "cpu" and torch.get_num_threads() == 1
    if not learner.packed and on_one_core and most <= _MOST_PIXELS_WITHOUT_ONEDNN:
        onednn.enabled = False
        if most > _MOST_PIXELS_IN_CHANNELS_LAST:
            learner.lay_out_weights(torch.contiguous_format)
    try:
        yield
    finally:
        onednn.enabled = before


def _resumed(config: TrainConfig, learner: Learner, identity: Mapping[str, Any]) -> tuple[Position, tuple[float, ...]]:
    """Return where to begin, with the losses so far; the learner is brought to that point."""
    state = load_state(config.state_folder, identity) if config.resume else None
    if state is None:
        return Position(), ()
    learner.restore(state)
    print(f"resuming after step {state.position.step}, in epoch {state.position.epoch}", flush=True)
    return state.position, state.losses


def _introduce(config: TrainConfig, data: TrainingData, base: BaseModel, learner: Learner, total_steps: int) -> None:
    sizes = ", ".join(str(images.plan.dataset.batch_size) for images in data.sets)
    network, hardware = learner.network, learner.hardware
    print(
        "running training\n"
        f"  num train images * repeats: {data.num_train_images}\n"
        f"  num validation images: {len(data.validation_images)}\n"
        f"  num reg images: {data.num_reg_images}\n"
        f"  num batches per epoch: {data.batches_per_epoch}\n"
        f"  num epochs: {config.max_train_epochs}\n"
        f"  batch size per device: {sizes}\n"
        f"  gradient accumulation steps = {config.gradient_accumulation_steps}\n"
        f"  total optimization steps: {total_steps}\n"
        f"  LoRA modules: {len(network.text_encoder_names)} text encoder, {len(network.unet_names)} UNet, "
        f"rank {config.network_dim}, alpha {config.network_alpha:g}\n"
        f"  optimizer: {learner.torch_optimizer.description}\n"
        f"  device: {hardware.device}, mixed precision {hardware.precision}, {torch.get_num_threads()} CPU threads",
        flush=True,
    )
    for sentence in ignored_settings(config, base, validates=bool(data.validation_images)):
        print(f"  note: {sentence}", flush=True)
    if both := {image.path for image in data.images} & {image.path for image in data.validation_images}:
        print(
            f"  warning: {len(both)} of the validation images are trained on too: validation_split is rounded as in "
            "sd-scripts; choose one that makes whole numbers of images",
            flush=True,
        )
    if (warmup := count_steps(config.lr_warmup_steps, total_steps)) >= total_steps:
        print(f"  warning: the warm-up of {warmup} steps is never over; lower lr_warmup_steps", flush=True)


@contextmanager
def _lack_explained(config: TrainConfig, data: TrainingData, saves_memory: Callable[[], bool]) -> Iterator[None]:
    """Turn running out of memory into one line with the remedies that are left.

    Raises:
        ResourceError: the memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        memory = memory_that_ran_out(f"{type(error).__name__}: {error}")
        if memory is None:
            raise
        line = line_of_key(data.path, "batch_size")
        lack = out_of_memory(
            memory,
            batch_size=f"batch_size in {data.path} (line {line})" if line else "train_batch_size to 1",
            gradient_checkpointing=saves_memory(),
            network_dim=config.network_dim,
        )
        raise ResourceError(lack) from error

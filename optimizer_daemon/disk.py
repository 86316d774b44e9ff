"""How much disk a study will fill: its checkpoints, by the ranks and epochs that may be drawn, and its pictures."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.layout import expected_checkpoints
from shared.safetensors_file import read_header

BYTES_PER_WEIGHT = {"fp16": 2, "bf16": 2, "float": 4}
HEADER_BYTES = 100_000  # names and shapes of some 800 tensors, and the metadata
STATE_BYTES_PER_WEIGHT = {"native": 12, "kohya": 24}
"""What a trainer keeps to go on from, while it trains: weights and two moments of Adam in 32 bits; kohya two of these
together while it saves the second."""

COPIES = {"command": 2}
"""Of each checkpoint: another program's own stays in output/."""

BYTES_PER_PIXEL = 2  # a PNG of a rendered picture; the grid holds each picture once more

# What a LoRA lies beside: linear layers and 1x1 convolutions of the UNet's transformers and of the text encoders.
_TRANSFORMER = re.compile(r"\.(transformer_blocks\.\d+\..*|proj_in|proj_out)\.weight$")
_TEXT_ENCODER = re.compile(
    r"encoder\.layers\..*(_proj|\.fc[12])\.weight$|resblocks\..*(_proj|\.c_fc|in_proj_)(\.|)weight$"
)
_NOT_TRAINED = re.compile(r"norm|embed|text_projection|first_stage_model|^decoder|^encoder\.(?!layers)|quant_conv")


@dataclass(frozen=True)
class Disk:
    """An estimate, in bytes.

    Args:
        checkpoint: of each rank.
        trial: of a mean trial.
        study: of all of them.
        training: what a running training of the largest rank takes on top, for its state.
    """

    checkpoint: dict[int, int]
    trial: float
    study: float
    training: int


def weights_per_rank(base_model: Path) -> int:
    """Return how many weights a LoRA of rank 1 on every layer of a base model has, from the files' headers alone.

    Args:
        base_model: a diffusers folder, or one file.
    Raises:
        CheckpointError: a weight file is damaged.
    """
    if base_model.is_file():
        files = [base_model]
    else:
        folders = ("unet", "text_encoder", "text_encoder_2")
        files = [file for part in folders for file in sorted((base_model / part).glob("*.safetensors"))]
    found: dict[str, int] = {}
    for file in files:
        for name, tensor in read_header(file, file.resolve().parent).tensors.items():
            if len(tensor.shape) < 2 or _NOT_TRAINED.search(name):
                continue
            if _TRANSFORMER.search(name) or _TEXT_ENCODER.search(name):
                rows, columns = tensor.shape[:2]
                # SGM's second text encoder holds query, key and value in one
                found[f"{file.parent.name}/{name}"] = (
                    rows + 3 * columns if name.endswith("in_proj_weight") else rows + columns
                )
    return sum(found.values())


def estimate(
    per_rank: int,
    trials: Iterable[Mapping[str, object]],
    every: int,
    count: int,
    pictures: int,
    pixels: int,
    trainer: str = "native",
) -> Disk:
    """Return what a study of `count` trials fills.

    Args:
        per_rank: weights of a LoRA of rank 1.
        trials: parameters of trials as they are drawn; network_dim, max_train_epochs and save_precision count.
        every: epochs between two checkpoints.
        pictures: of each checkpoint.
        pixels: of each picture.
        trainer: who trains. What another program saves besides its weights is not known.
    """
    sizes, trial_bytes = {}, []
    for parameters in trials:
        rank, epochs = parameters.get("network_dim", 4), parameters.get("max_train_epochs", 1)
        assert isinstance(rank, int) and isinstance(epochs, int), "the search space gives whole numbers"
        width = BYTES_PER_WEIGHT[str(parameters.get("save_precision", "fp16"))]
        sizes[rank] = per_rank * rank * width + HEADER_BYTES
        checkpoints = expected_checkpoints(epochs, every)
        trial_bytes.append(
            checkpoints * (COPIES.get(trainer, 1) * sizes[rank] + 2 * pictures * pixels * BYTES_PER_PIXEL)
        )
    mean = statistics.fmean(trial_bytes)
    training = per_rank * max(sizes) * STATE_BYTES_PER_WEIGHT.get(trainer, 0)
    return Disk(dict(sorted(sizes.items())), mean, mean * count, training)

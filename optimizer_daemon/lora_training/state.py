"""The resume state: one file that holds everything a training needs to go on as if it had never stopped.

It is replaced whole at every save, and removed when the final checkpoint stands.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.errors import DiskError, ResourceError, StudyMismatchError, UnreadableFileError
from shared.files import sweep_temp_files, write_bytes

_FILE = "training_state.pt"
_VERSION = 1


@dataclass(frozen=True)
class Position:
    """How far the training is: always between two optimizer steps.

    Args:
        epoch: the epoch under way, counted from 1.
        step_in_epoch: its optimizer steps done.
        step: all optimizer steps done.
        validated: so is the validation that may be due after this step.
    """

    epoch: int = 1
    step_in_epoch: int = 0
    step: int = 0
    validated: bool = True


@dataclass(frozen=True)
class Randomness:
    """torch's global generators; the order of images and captions follows from seed and epoch alone."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> Randomness:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda, device)


@dataclass(frozen=True)
class TrainingState:
    """One moment of a training.

    Args:
        position: when.
        randomness: the generators at that moment.
        network, optimizer, lr_scheduler, scaler: state dicts.
        losses: of the last batches, by their place in an epoch, for the mean on display.
        saves_memory: gradient checkpointing was on.
        identity: the settings and the data that decide the weights.
    """

    position: Position
    randomness: Randomness
    network: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    lr_scheduler: Mapping[str, Any]
    scaler: Mapping[str, Any]
    losses: tuple[float, ...]
    saves_memory: bool = False
    identity: Mapping[str, Any] = field(default_factory=dict)


def save_state(folder: Path, state: TrainingState) -> None:
    """Replace the state in `folder`, durably and all at once.

    Raises:
        DiskError: the previous state still stands.
    """
    content = io.BytesIO()
    torch.save(
        {
            "version": _VERSION,
            "position": asdict(state.position),
            "randomness": {"cpu": state.randomness.cpu, "cuda": state.randomness.cuda},
            "network": dict(state.network),
            "optimizer": dict(state.optimizer),
            "lr_scheduler": dict(state.lr_scheduler),
            "scaler": dict(state.scaler),
            "losses": list(state.losses),
            "saves_memory": state.saves_memory,
            "identity": dict(state.identity),
        },
        content,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(folder, error) from error
    sweep_temp_files(folder)
    write_bytes(folder / _FILE, content.getvalue())


def load_state(folder: Path, identity: Mapping[str, Any]) -> TrainingState | None:
    """Return the state in `folder`; None when there is none.

    Args:
        folder: where `save_state` put it.
        identity: what this training is; the saved one must be the same.
    Raises:
        UnreadableFileError: the file is damaged.
        StudyMismatchError: it belongs to a training with other settings or data.
        ResourceError: it cannot be read.
    """
    path = folder / _FILE
    try:
        saved = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        state = TrainingState(
            position=Position(**saved["position"]),
            randomness=Randomness(**saved["randomness"]),
            network=saved["network"],
            optimizer=saved["optimizer"],
            lr_scheduler=saved["lr_scheduler"],
            scaler=saved["scaler"],
            losses=tuple(saved["losses"]),
            saves_memory=saved["saves_memory"],
            identity=saved["identity"],
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResourceError(f"{path}: could not be read ({error.strerror}); check its permissions") from error
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        # torch's own text would propose to load it without its guard
        kind = "something is missing in it" if isinstance(error, (KeyError, TypeError)) else "cut short or overwritten"
        reason = f"no training state ({kind}); remove it to train from the start"
        raise UnreadableFileError(path, reason) from error
    for name in sorted({*identity, *state.identity}):
        if identity.get(name) != state.identity.get(name):
            raise StudyMismatchError(
                f"{path} belongs to another training: {name} was {state.identity.get(name)!r} and is "
                f"{identity.get(name)!r}; restore it, or remove the file to train from the start"
            )
    return state


def remove_state(folder: Path) -> None:
    """Remove the state and its folder, where nothing else lies in it.

    Raises:
        DiskError: it could not be removed.
    """
    try:
        sweep_temp_files(folder)
        (folder / _FILE).unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(folder / _FILE, error) from error
    with contextlib.suppress(OSError):  # not empty, or never made
        folder.rmdir()

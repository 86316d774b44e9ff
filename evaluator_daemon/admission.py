"""May this weight file be scored as a checkpoint of this trial? From the file, params.json and the trial's records.

A file is judged by itself (`admit`) and then against its training: a LoRA that lost whole modules still loads without
an error. In a folder without params.json nothing is known of the training, and LoRAs of every making are welcome.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from shared.errors import CheckpointError, IncompleteCheckpointError, RefusedCheckpointError
from shared.safetensors_file import Checkpoint, LoraLayout, Stamp, is_stable, lora_modules, read_checkpoint
from shared.schemas import Scalar, TrialParams

SETTLE_S = 0.25
"""Between the two looks that must show the same file; longer than local file systems' clock ticks."""

EVALUATOR_CODES: Mapping[str, str] = MappingProxyType(
    {
        "half_network": "whole modules are missing that the training trains, or that its other checkpoints have",
        "other_network": "rank or alpha is not what params.json or the trial's other checkpoints say",
        "not_applied": "the base model has no such layers, or the loader did not apply all of them as they are",
        "three_strikes": "three attempts to evaluate it ended by themselves, without a result",
        "suspect": "five attempts in a row were interrupted while other checkpoints succeeded",
    }
)
"""Why the evaluator gives a checkpoint up, beside the codes of `shared.safetensors_file`."""

_USUAL_NETWORK = "networks.lora"
# part of the model -> its learning rate, and the flag that leaves it alone
_PARTS = {"unet": ("unet_lr", "network_train_text_encoder_only"), "te": ("text_encoder_lr", "network_train_unet_only")}
_PART_NAMES = {"unet": "UNet", "te": "text encoder"}
_KOHYA_PREFIXES = {"unet": "lora_unet_", "te": "lora_te"}
_ALPHA_TOLERANCE = 0.01  # half precision rounds


def admit(path: Path, trial_folder: Path) -> tuple[Checkpoint, LoraLayout]:
    """Prove that a weight file is whole, still, finite and a LoRA; acceptance and refusal alike need two equal looks.

    Raises:
        IncompleteCheckpointError: not yet, look again later.
        RefusedCheckpointError: never as it is.
    """
    try:
        first = Stamp.of(path.lstat())
        time.sleep(SETTLE_S)
        try:
            checkpoint = read_checkpoint(path, trial_folder)
            layout = lora_modules(checkpoint)
        except RefusedCheckpointError:
            if is_stable(first, Stamp.of(path.lstat())):
                raise
        else:
            if is_stable(first, checkpoint.stamp):
                return checkpoint, layout
    except FileNotFoundError as error:
        raise IncompleteCheckpointError(path, "vanished", "is no longer there") from error
    raise IncompleteCheckpointError(path, "changing", "changed between two looks; it is looked at again later")


def standing(checkpoint: Checkpoint, trial_folder: Path) -> Literal["unchanged", "deleted", "replaced"]:
    """Tell what has become of an admitted file; touched, or written again with the same content, is unchanged."""
    try:
        if Stamp.of(checkpoint.path.lstat()) == checkpoint.stamp:
            return "unchanged"
        now = read_checkpoint(checkpoint.path, trial_folder)
    except FileNotFoundError:
        return "deleted"
    except CheckpointError as error:
        return "deleted" if error.code == "vanished" else "replaced"
    return "unchanged" if now.sha256 == checkpoint.sha256 else "replaced"


def require_own_network(
    checkpoint: Checkpoint, layout: LoraLayout, params: TrialParams, scored: Mapping[str, Mapping[str, int]]
) -> None:
    """Refuse a LoRA that is not the one this trial trains, or not all of it.

    Args:
        params: the trial's params.json.
        scored: checkpoint -> module -> rank, of the trial's recorded checkpoints whose files still stand.
    Raises:
        RefusedCheckpointError: half_network or other_network.
    """
    if not _has_own_shape(checkpoint, params):
        _require_dim_and_alpha(checkpoint, layout, params)
    if is_usual_network(checkpoint, params):
        _require_parts(checkpoint, layout, params)
    ranks = {module.name: module.rank for module in layout.modules}
    for name, others in scored.items():
        if missing := sorted(others.keys() - ranks.keys()):
            raise half_network(checkpoint.path, missing, f"of the {len(others)} modules of {name}, of the same trial")
        if differing := sorted(module for module in others if ranks[module] != others[module]):
            module = differing[0]
            raise _other_network(
                checkpoint.path, f"module {module} has rank {ranks[module]}, but rank {others[module]} in {name}"
            )


def is_usual_network(checkpoint: Checkpoint, params: TrialParams) -> bool:
    """Whether the file says that it adapts every attention and feed-forward layer, as networks.lora of sd-scripts."""
    return checkpoint.metadata.get("ss_network_module") == _USUAL_NETWORK and not _has_own_shape(checkpoint, params)


def half_network(path: Path, missing: list[str], of_what: str) -> RefusedCheckpointError:
    """Return the refusal of a LoRA that lacks whole modules."""
    return RefusedCheckpointError(
        path, "half_network", f"lacks {len(missing)} {of_what}, such as {missing[0]}; save it again, whole"
    )


def _has_own_shape(checkpoint: Checkpoint, params: TrialParams) -> bool:
    """Whether arguments of the network module may set blocks, ranks and alphas apart."""
    return bool(params.parameters.get("network_args")) or "ss_network_args" in checkpoint.metadata


def _require_dim_and_alpha(checkpoint: Checkpoint, layout: LoraLayout, params: TrialParams) -> None:
    dim, alpha = (_number(params.parameters.get(name)) for name in ("network_dim", "network_alpha"))
    for module in layout.modules:
        if module.spatial:
            continue
        if dim is not None and module.rank != dim:
            raise _other_network(
                checkpoint.path,
                f"module {module.name} has rank {module.rank}, but params.json says network_dim {dim:g}",
            )
        wanted = alpha or module.rank  # trainers take an alpha of 0 for the rank
        if alpha is not None and module.alpha is not None and abs(module.alpha - wanted) > _ALPHA_TOLERANCE * wanted:
            raise _other_network(
                checkpoint.path,
                f"module {module.name} has alpha {module.alpha:g}, but params.json says network_alpha {alpha:g}",
            )


def _require_parts(checkpoint: Checkpoint, layout: LoraLayout, params: TrialParams) -> None:
    for part, (rate, left_alone) in _PARTS.items():
        where, said = "params.json", params.parameters.get(rate)
        if said is None:
            where, said = "its metadata", checkpoint.metadata.get(f"ss_{rate}")
        trained = (_number(said) or 0.0) > 0 and not params.parameters.get(left_alone)
        if trained and not any(module.name.startswith(_KOHYA_PREFIXES[part]) for module in layout.modules):
            raise RefusedCheckpointError(
                checkpoint.path,
                "half_network",
                f"has no module of the {_PART_NAMES[part]}, but {where} says {rate} {said}; save it again, whole",
            )


def _number(value: Scalar | None) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _other_network(path: Path, fault: str) -> RefusedCheckpointError:
    return RefusedCheckpointError(
        path, "other_network", f"{fault}; it is not of this training: put the right file there, or remove it"
    )

"""May this weight file be scored as a checkpoint of this trial? From the file, params.json and the trial's records.

A file is judged by itself (`admit`) and then against its training: a LoRA that lost whole modules still loads without
an error. In a folder without params.json nothing is known of the training, and LoRAs of every making are welcome.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from evaluator_daemon.sweep import WeightFile
from shared.errors import CheckpointError, IncompleteCheckpointError, RefusedCheckpointError
from shared.safetensors_file import Checkpoint, LoraLayout, Stamp, is_stable, lora_modules, read_checkpoint, stamp_of
from shared.schemas import Scalar, TrialParams

SETTLE_S = 0.25
"""Between the two looks that must show the same file."""
COARSE_SETTLE_S = 2.5
"""The same where the file system's time stamps are whole seconds: longer than FAT's tick of 2 s."""
TICK_S = 0.02
"""Longer than one tick of a local file system's clock, 10 ms at most."""
LONG_AGO_S = 2.0
"""A file last changed this long ago by its own file system's clock has been still for long enough."""

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


@dataclass(frozen=True, slots=True)
class FirstLook:
    """A weight file as a sweep saw it, and since when it has been seen so.

    Args:
        size, modified_ns, changed_s: of the `WeightFile`.
        seen_s: monotonic time by which that look was over.
    """

    size: int
    modified_ns: int
    changed_s: float
    seen_s: float

    def shows(self, stamp: Stamp) -> bool:
        """Whether the file was then as it is by this later look."""
        changed = abs(self.changed_s - stamp.ctime_ns / 1e9) < 1e-6  # a float of seconds since 1970 keeps 0.2 us
        return changed and (self.size, self.modified_ns) == (stamp.size, stamp.mtime_ns)


class Looks:
    """Since when each weight file of a trial has been seen as it is now: a caller's memory between its sweeps."""

    def __init__(self) -> None:
        self._first: dict[str, FirstLook] = {}

    def note(self, files: Iterable[WeightFile], seen_s: float) -> None:
        """Remember a look that was over at `seen_s`, monotonic; what it does not show is forgotten."""
        known, self._first = self._first, {}
        for file in files:
            look = FirstLook(file.size, file.modified_ns, file.changed_s, seen_s)
            before = known.get(file.name)
            same = before is not None and replace(before, seen_s=seen_s) == look
            self._first[file.name] = before if before is not None and same else look

    def first(self, name: str) -> FirstLook | None:
        """Return the first look that showed the file as the last one did; None when the last did not show it."""
        return self._first.get(name)


def admit(path: Path, trial_folder: Path, *, first_look: FirstLook | None = None) -> tuple[Checkpoint, LoraLayout]:
    """Prove that a weight file is whole, still, finite and a LoRA; acceptance and refusal alike need two equal looks.

    Args:
        first_look: an earlier look; where it shows the file as it is now and is old enough, nothing is waited for.
    Raises:
        IncompleteCheckpointError: not yet, look again later.
        RefusedCheckpointError: never as it is.
        ResourceError: there is no memory for it.
    """
    begin_s = time.monotonic()
    first = stamp_of(path)
    before_s, settled_s = _waits(path, first, first_look, begin_s)
    time.sleep(before_s)
    found: tuple[Checkpoint, LoraLayout] | None = None
    refusal: RefusedCheckpointError | None = None
    try:
        checkpoint = read_checkpoint(path, trial_folder)
        found = checkpoint, lora_modules(checkpoint)
    except RefusedCheckpointError as error:
        refusal = error
    time.sleep(max(0.0, begin_s + settled_s - time.monotonic()))
    # at the name, not at the open file: another may have been put in its place while this one was read
    is_still = is_stable(first, stamp_of(path)) and (found is None or is_stable(first, found[0].stamp))
    if not is_still:
        raise IncompleteCheckpointError(path, "changing", "changed between two looks; it is looked at again later")
    if found is None:
        assert refusal is not None
        raise refusal
    return found


def _waits(path: Path, stamp: Stamp, first_look: FirstLook | None, now_s: float) -> tuple[float, float]:
    """Return how long to wait before a file is read, and how long after now the second look may be, in seconds.

    The first look must be older than one tick of the file system's clock when the reading begins: from then on every
    write shows in the stamp, also one that leaves the size alone. That a slow writer is not merely pausing takes the
    whole settle time; whatever of it is left is waited for while the file is read and proved.
    """
    settle_s = COARSE_SETTLE_S if _is_coarse(stamp) else SETTLE_S
    if first_look is not None and first_look.shows(stamp):
        left_s = settle_s - (now_s - first_look.seen_s)
        if left_s <= 0:
            return 0.0, 0.0
    else:
        left_s = settle_s
    clock_ns = file_system_clock_ns(path)
    if clock_ns is None or _is_coarse(stamp):
        return left_s, left_s
    if clock_ns - max(stamp.mtime_ns, stamp.ctime_ns) >= LONG_AGO_S * 1e9:
        return 0.0, 0.0
    return TICK_S, left_s


def _is_coarse(stamp: Stamp) -> bool:
    """Whether the file system seems to keep whole seconds only, as FAT and old servers do."""
    return stamp.mtime_ns % 10**9 == 0 and stamp.ctime_ns % 10**9 == 0


def file_system_clock_ns(path: Path) -> int | None:
    """Return the time that a file written now beside `path` would carry, in ns since 1970; None where none is told.

    A file without a name tells it. Network mounts and FAT, whose clocks are others' or coarse, have no such files.
    """
    try:
        probe = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        status = os.fstat(probe)
        return status.st_mtime_ns if status.st_dev == path.lstat().st_dev else None
    except OSError:
        return None
    finally:
        os.close(probe)


def standing(checkpoint: Checkpoint, trial_folder: Path) -> Literal["unchanged", "deleted", "replaced"]:
    """Tell what has become of an admitted file; touched, or written again with the same content, is unchanged."""
    try:
        if stamp_of(checkpoint.path) == checkpoint.stamp:
            return "unchanged"
        now = read_checkpoint(checkpoint.path, trial_folder)
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

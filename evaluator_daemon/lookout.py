"""Where to look: every trial about which something may be to do, and no other, at little cost for thousands of them.

A trial is *quiet* when it is over, everything in it is settled, no trainer lives and no evaluator is at it. Then only
its stamps are compared at each sweep: identity and times of its folder and of its evaluations' folder, which change
with every file that is made, renamed or removed there. What such stamps cannot show is found by the full sweep: it
compares the stamps of every file that decides about the trial, whatever the folders' say.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from evaluator_daemon.folder import Model, file_stamp, list_folder, look_at, read_or_none, weights
from evaluator_daemon.sweep import TrialView, is_over, open_files
from shared.errors import ResourceError
from shared.layout import StudyLayout, TrialLayout
from shared.locks import FileLock
from shared.logs import log_change
from shared.schemas import TERMINAL_STATES, CheckpointRecord, EvaluationState, QuarantinedCheckpoint

COMPARED_AT_ONCE = 200
"""Quiet trials that one sweep of a full one compares file by file; what is new must not wait for all of them."""
FULL_SWEEP_S = 300.0
"""How late something is seen that changes no folder's stamps and sends no event."""
LOST_EVENTS_GAP_S = 5.0
"""Full sweeps because of lost events keep this distance, however often events are lost."""
COARSEST_CLOCK_S = 2.0
"""FAT and drvfs count time in steps of two seconds: a younger stamp may stand for two states."""

_RELATIVE = TrialLayout(Path())
_EVALUATIONS = str(_RELATIVE.evaluations.folder)
_DOCUMENTS = tuple(map(str, (_RELATIVE.state, _RELATIVE.params, _RELATIVE.trainer_lock, _RELATIVE.evaluations.state)))

_log = logging.getLogger(__name__)

Stamp = tuple[int, int, int, int, int, int]
"""Of a trial: device, inode, modification and change time of its folder (ns), inode and modification time of its
evaluations' folder: what changes when a name appears there or vanishes."""


@dataclass(frozen=True, slots=True)
class _Quiet:
    """What is remembered of a quiet trial.

    Args:
        stamp: taken before the look that found it quiet; None when it was too young to be trusted.
        fingerprint: of every file that look depended on.
    """

    stamp: Stamp | None
    fingerprint: int
    quarantined: tuple[QuarantinedCheckpoint, ...]


class Lookout:
    """Looks at a study's trials.

    Args:
        idle_timeout_s: after how much quiet a trial without state files is over.
        full_sweep_s: how often every trial is compared file by file.
        clock: monotonic time in seconds.
        wall_clock: seconds since 1970, as file times are.
    """

    def __init__(
        self,
        study: StudyLayout,
        plan_hash: str,
        idle_timeout_s: float,
        *,
        full_sweep_s: float = FULL_SWEEP_S,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._study = study
        self._plan_hash = plan_hash
        self._idle_timeout_s = idle_timeout_s
        self._full_sweep_s = full_sweep_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._last_full_s = -float("inf")
        self._full_due_s = -float("inf")
        self._to_compare: list[str] = []
        self._quiet: dict[str, _Quiet] = {}
        self._stamps: dict[str, Stamp] = {}
        self._documents: dict[str, Documents] = {}
        self._unreadable: dict[Path, str] = {}  # what was passed over -> why, as said
        self.looks = 0
        """How often a trial was looked at in full."""

    @property
    def is_under_way(self) -> bool:
        """Whether a full sweep goes on with the next sweep, which should come at once."""
        return bool(self._to_compare)

    @property
    def names(self) -> Collection[str]:
        """Every trial there was at the last sweep."""
        return self._stamps.keys()

    @property
    def quarantined(self) -> list[QuarantinedCheckpoint]:
        """The quarantined checkpoints of the quiet trials."""
        return [checkpoint for quiet in self._quiet.values() for checkpoint in quiet.quarantined]

    def demand_full_sweep(self) -> None:
        """Make the next sweep a full one, unless there was one a moment ago: then the first after that moment."""
        gap_s = min(LOST_EVENTS_GAP_S, self._full_sweep_s)
        self._full_due_s = min(self._full_due_s, self._last_full_s + gap_s)

    def sweep(
        self, in_use: Collection[str], seen: Callable[[TrialView], None], moved: Callable[[str], None]
    ) -> list[TrialView]:
        """Return the trials that are not quiet, by number.

        A folder that cannot be read (somebody else's, a failing disk) is said, passed over and tried again next time.

        Args:
            in_use: trials that have an evaluator; never quiet.
            seen: called with every view that was taken, the quiet trials' too.
            moved: called with the name of every trial that is gone, or whose folder is another one now.
        """
        begin_s = self._clock()
        if begin_s >= self._full_due_s:
            self._last_full_s, self._full_due_s = begin_s, begin_s + self._full_sweep_s
            self._to_compare = list(self._quiet)
        compared = set(self._to_compare[:COMPARED_AT_ONCE])
        del self._to_compare[:COMPARED_AT_ONCE]
        trusted_before_ns = int((self._wall_clock() - COARSEST_CLOCK_S) * 1e9)
        found = self._list()
        for name in self._gone_or_replaced(found):
            self._forget(name)
            moved(name)
        self._stamps = found
        to_look_at = [
            name
            for name, stamp in found.items()
            if name in in_use or not self._is_still_quiet(name, stamp, by_file=name in compared)
        ]
        optimizer_lives = self._optimizer_lives()
        views = []
        for trial in sorted((TrialLayout(self._study.root / name) for name in to_look_at), key=_by_number):
            documents = _document_stamps(str(trial.folder))
            try:
                view = self._look(trial, optimizer_lives)
            except FileNotFoundError:  # somebody moved the folder away just now
                self._forget(trial.name)
                continue
            except (OSError, ResourceError) as error:
                self._quiet.pop(trial.name, None)
                self._pass_over(trial.folder, error)
                continue
            self._unreadable.pop(trial.folder, None)
            seen(view)
            if trial.name not in in_use and self._is_quiet(view):
                stamp = found[trial.name]
                trusted = max(stamp[2], stamp[3], stamp[5]) < trusted_before_ns
                files = tuple((f"{f.name}.safetensors", f.size, f.modified_ns, f.changed_s) for f in view.files)
                quarantined = tuple(quarantined_in(view))
                self._quiet[trial.name] = _Quiet(stamp if trusted else None, hash((documents, files)), quarantined)
                self._documents.pop(trial.name, None)
            else:
                self._quiet.pop(trial.name, None)
                views.append(view)
        return views

    # ------------------------------------------------------------------------------------------------------- helpers

    def _list(self) -> dict[str, Stamp]:
        found = {}
        try:
            with os.scandir(self._study.root) as entries:
                for entry in entries:
                    if entry.name.startswith("trial_") and (stamp := _stamp(entry.path)) is not None:
                        found[entry.name] = stamp
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._pass_over(self._study.root, error)
            return dict(self._stamps)  # not being shown the trials does not make them gone
        self._unreadable.pop(self._study.root, None)
        return found

    def _optimizer_lives(self) -> bool:
        try:
            lives = FileLock.is_held(self._study.optimizer_lock)
        except ResourceError as error:
            self._pass_over(self._study.optimizer_lock, error)
            return True  # so that no trial is over before its time
        self._unreadable.pop(self._study.optimizer_lock, None)
        return lives

    def _pass_over(self, path: Path, error: Exception) -> None:
        """Say once why something is not looked at, and again when the reason is another."""
        why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        if self._unreadable.get(path) != why:
            self._unreadable[path] = why
            log_change(_log, "passed over", level=logging.WARNING, path=path, why=why)

    def _gone_or_replaced(self, found: dict[str, Stamp]) -> list[str]:
        changed = [name for name, stamp in self._stamps.items() if found.get(name) != stamp]
        return [name for name in changed if name not in found or found[name][:2] != self._stamps[name][:2]]

    def _is_still_quiet(self, name: str, stamp: Stamp, *, by_file: bool) -> bool:
        quiet = self._quiet.get(name)
        if quiet is None or quiet.stamp != stamp:
            return False
        return not by_file or quiet.fingerprint == _fingerprint(str(self._study.root / name))

    def _is_quiet(self, view: TrialView) -> bool:
        # A trial that is neither final nor without a state comes back to life with the optimizer, and changes nothing.
        is_over_for_good = view.state in TERMINAL_STATES or (view.state is None and is_over(view, self._idle_timeout_s))
        return is_over_for_good and not view.trainer_lives and not open_files(view)

    def _look(self, trial: TrialLayout, optimizer_lives: bool) -> TrialView:
        self.looks += 1
        documents = self._documents.setdefault(trial.name, Documents())
        state = documents.read(trial.evaluations.state, EvaluationState)
        records: tuple[CheckpointRecord, ...] = state.checkpoints if state is not None else ()
        return look_at(
            trial,
            records,
            self._plan_hash,
            self._wall_clock(),
            read=documents.read,
            optimizer_lives=optimizer_lives,
        )

    def _forget(self, name: str) -> None:
        self._quiet.pop(name, None)
        self._documents.pop(name, None)
        self._unreadable.pop(self._study.root / name, None)


class Documents:
    """One trial's documents, read again only when their file has changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], object]] = {}

    def read(self, path: Path, model: type[Model], /) -> Model | None:
        """Return a document; None when it is missing or damaged."""
        stamp = file_stamp(path)
        if stamp is None:
            self._known.pop(path, None)
            return None
        if path not in self._known or self._known[path][0] != stamp:
            self._known[path] = (stamp, read_or_none(path, model))
        content = self._known[path][1]
        return content if isinstance(content, model) else None


def quarantined_in(view: TrialView) -> list[QuarantinedCheckpoint]:
    """Return the quarantined checkpoints of a trial, as the manager shows them."""
    return [
        QuarantinedCheckpoint(
            trial_name=view.name,
            checkpoint=record.checkpoint,
            code=record.quarantine.code,
            reason=record.quarantine.reason,
            since=record.quarantine.since,
        )
        for record in view.records
        if record.quarantine is not None
    ]


def _stamp(folder: str) -> Stamp | None:
    """None where there is no folder, at the end of a link either."""
    try:
        own = os.stat(folder)  # noqa: PTH116  paths cost more than the call, thousands of times
    except OSError:
        return None
    if not stat.S_ISDIR(own.st_mode):
        return None
    try:
        evaluations = os.stat(f"{folder}/{_EVALUATIONS}")  # noqa: PTH116
    except OSError:
        return own.st_dev, own.st_ino, own.st_mtime_ns, own.st_ctime_ns, 0, 0
    return own.st_dev, own.st_ino, own.st_mtime_ns, own.st_ctime_ns, evaluations.st_ino, evaluations.st_mtime_ns


def _fingerprint(folder: str) -> int | None:
    """Of all files a look depends on; None when the folder has gone or cannot be read."""
    documents = _document_stamps(folder)
    try:
        entries = list_folder(folder)
    except OSError:
        return None
    files = tuple(
        (name, entries[name].st_size, entries[name].st_mtime_ns, entries[name].st_ctime)
        for name in sorted(weights(entries))
    )
    return hash((documents, files))


def _document_stamps(folder: str) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(file_stamp(f"{folder}/{name}") for name in _DOCUMENTS)


def _by_number(trial: TrialLayout) -> tuple[bool, int, str]:
    return trial.number is None, trial.number or 0, trial.name

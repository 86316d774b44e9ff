"""What one look at a study needs of its trials, without reading thousands of files that say nothing new.

results/all_trials.json holds every trial that is over. What its own two files, both older than that, say of such a
trial is there; only the others are read. Of the file itself only the figures that everything is ranked by are taken
out, and the few trials that are shown are read whole. Paths are plain texts here: thousands of objects take longer than
the files they name.
"""

from __future__ import annotations

import heapq
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from optimizer_daemon.trial_table import trial_result
from shared.errors import UnreadableFileError
from shared.files import check_checksum, read_model
from shared.layout import EVALUATION_STATE, PARAMS, TRIAL_STATE, StudyLayout, TrialLayout
from shared.schemas import TERMINAL_STATES, TrialParams, TrialResult, TrialState, VersionedFile

F = TypeVar("F", bound=VersionedFile)

# A line of all_trials.json as `write_model` writes it; a checksum stands for that.
_LINE = re.compile(
    rb'\n    \{\n      "trial": (\d+),\n      "optuna_number": \d+,\n      "state": "(\w+)",\n      "reason": .*,\n'
    rb'      "value": (.*),\n'
)
_QUARANTINE = b'"quarantine": {'
_END = b"\n    }"
_INFEASIBLE = b'\n      "feasible": false,\n'
_STAGE = re.compile(rb'\n      "stage": (.*),\n')
_OTHER_ORIGINS = (b'\n      "origin": "enqueued",\n', b'\n      "origin": "finalist",\n')


@dataclass(frozen=True)
class Glance:
    """A look at the trials.

    Args:
        finished_by_stage: how many are complete or pruned, by the stage they were drawn in.
        failed: how many have failed.
        shown: the best ones, those under way, and what the winner is named from.
        suspects: the trials that may have unfit checkpoints.
        damaged: what could not be read.
    """

    finished_by_stage: Counter[str | None]
    failed: int
    shown: tuple[TrialResult, ...]
    suspects: tuple[TrialLayout, ...]
    damaged: tuple[str, ...]

    @property
    def finished(self) -> int:
        """How many are complete or pruned."""
        return self.finished_by_stage.total()


class _Line(NamedTuple):
    number: int
    state: str
    value: float | None
    infeasible: bool
    origin_is_sampler: bool
    stage: str | None
    start: int
    end: int


def look_at(study: StudyLayout, top: int | None) -> Glance:
    """Look at a study.

    Args:
        top: how many of the best are shown; None for all trials.
    """
    content, lines, written_ns = _listed(study)
    finished: Counter[str | None] = Counter()
    failed = 0
    damaged: list[str] = []
    results: list[TrialResult] = []
    settled: list[_Line] = []
    suspects: list[TrialLayout] = []
    for folder in _folders(study):
        line = lines.get(folder)
        if line is not None and _is_older(folder, written_ns):
            settled.append(line)
            finished[line.stage] += line.state != "failed"
            failed += line.state == "failed"
            if _has_quarantine(folder):
                suspects.append(TrialLayout(Path(folder)))
            continue
        trial = TrialLayout(Path(folder))
        suspects.append(trial)
        params, state = read(trial.params, TrialParams, damaged), read(trial.state, TrialState, damaged)
        if params is not None and state is not None:
            results.append(trial_result(params, state))
            finished[params.stage] += state.state in ("complete", "pruned")
            failed += state.state == "failed"
    results += [_whole(content, line) for line in (settled if top is None else _needed(settled, top))]
    known = {result.trial for result in results}
    # A finalist is held against the trial it repeats.
    repeated = {result.finalist_of for result in results} - known
    results += [_whole(content, line) for line in settled if line.number in repeated]
    results.sort(key=lambda result: result.trial)
    return Glance(finished, failed, tuple(results), tuple(suspects), tuple(damaged))


def _folders(study: StudyLayout) -> list[str]:
    try:
        with os.scandir(study.root) as entries:
            return sorted(entry.path for entry in entries if entry.name.startswith("trial_") and entry.is_dir())
    except FileNotFoundError:
        return []


def _listed(study: StudyLayout) -> tuple[bytes, dict[str, _Line], int]:
    """Return all_trials.json, the trials in it that are over, by folder, and when it was written."""
    path = study.results.all_trials
    try:
        written_ns = path.stat().st_mtime_ns
        content = path.read_bytes()
        check_checksum(content, path)
    except (OSError, UnreadableFileError):
        return b"", {}, 0
    start = str(study.trial(1).folder).removesuffix("0001")
    found = {f"{start}{line.number:04d}": line for line in _lines(content) if line.state in TERMINAL_STATES}
    return content, found, written_ns


def _lines(content: bytes) -> Iterator[_Line]:
    for match in _LINE.finditer(content):
        begin, end = match.end(), content.index(_END, match.end())
        value = None if match[3] == b"null" else float(match[3])
        infeasible = content.find(_INFEASIBLE, begin - 1, end) >= 0
        asked = any(content.find(origin, begin, end) >= 0 for origin in _OTHER_ORIGINS)
        stage = _STAGE.search(content, begin, end)
        name = None if stage is None else json.loads(stage[1])
        yield _Line(int(match[1]), match[2].decode(), value, infeasible, not asked, name, match.start(), end)


def _is_older(folder: str, written_ns: int) -> bool:
    try:
        return all(os.stat(f"{folder}/{name}").st_mtime_ns < written_ns for name in (PARAMS, TRIAL_STATE))  # noqa: PTH116
    except OSError:
        return False


def _has_quarantine(folder: str) -> bool:
    """Tell whether a trial's evaluation_state.json speaks of an unfit checkpoint, or cannot be read."""
    try:
        file = os.open(f"{folder}/realtime_evaluations/{EVALUATION_STATE}", os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return _QUARANTINE in os.read(file, os.fstat(file).st_size)
    finally:
        os.close(file)


def _needed(lines: list[_Line], top: int) -> list[_Line]:
    """Return the best ones, and those that the winner may be named from."""
    scored = [line for line in lines if line.state == "complete" and line.value is not None]
    best = heapq.nsmallest(top, scored, key=lambda line: (line.infeasible, line.value, line.number))
    asked = [line for line in lines if not line.origin_is_sampler]
    by_number = sorted(lines, key=lambda line: line.number)
    begins = {line.stage: line for line in reversed(by_number)}
    searched = {line.stage: line for line in by_number if line.origin_is_sampler}
    return list({line.number: line for line in (*best, *asked, *begins.values(), *searched.values())}.values())


def _whole(content: bytes, line: _Line) -> TrialResult:
    return TrialResult.model_validate_json(json.dumps(json.loads(content[line.start : line.end + len(_END)])))


def read(path: Path, model: type[F], damaged: list[str]) -> F | None:
    """Return a document; None when it is not there, or damaged: that is noted."""
    try:
        return read_model(path, model)
    except FileNotFoundError:
        return None
    except UnreadableFileError as error:
        damaged.append(str(error))
        return None

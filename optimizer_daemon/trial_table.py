"""The trials of a study folder, read and written out again only where their files have changed.

Whoever goes on with a study of a thousand trials must not read two thousand files for each further one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shared.errors import UnreadableFileError
from shared.files import element_text, read_model
from shared.layout import StudyLayout, TrialLayout
from shared.schemas import TrialParams, TrialResult, TrialState

Stamp = tuple[int, int, int]
"""Inode, time and size of a file: every write of ours renames a new file into place."""


@dataclass(frozen=True)
class Row:
    """One trial.

    Args:
        stamps: of its two files, as they were read.
        params: what it runs with.
        result: its line of all_trials.json.
    """

    stamps: tuple[Stamp, Stamp]
    params: TrialParams
    result: TrialResult

    @cached_property
    def text(self) -> str:
        """The line as it stands in the file."""
        return element_text(self.result)


class TrialTable:
    """Every trial of a study by its own files; one whose files are not there yet, or damaged, is left out.

    Args:
        study: its folder.
    """

    def __init__(self, study: StudyLayout) -> None:
        self._study = study
        self._rows: dict[Path, Row] = {}

    def refresh(self) -> list[Row]:
        """Return the trials as they stand now, by number."""
        self._rows = {trial.folder: row for trial in self._study.list_trials() if (row := self._row(trial)) is not None}
        return list(self._rows.values())

    @property
    def finished_by_stage(self) -> Counter[str | None]:
        """How many of the trials that `refresh` returned last are complete or pruned, by stage."""
        return Counter(row.params.stage for row in self._rows.values() if row.result.state in ("complete", "pruned"))

    def text_of(self, trials: tuple[TrialResult, ...]) -> list[str]:
        """Return the lines of trials that `refresh` returned last, as they stand in the file."""
        rows = {id(row.result): row for row in self._rows.values()}
        return [rows[id(result)].text for result in trials]

    def _row(self, trial: TrialLayout) -> Row | None:
        try:
            stamps = _stamp(trial.params), _stamp(trial.state)
            known = self._rows.get(trial.folder)
            if known is not None and known.stamps == stamps:
                return known
            params, state = read_model(trial.params, TrialParams), read_model(trial.state, TrialState)
        except (FileNotFoundError, UnreadableFileError):
            return None
        return Row(stamps, params, trial_result(params, state))


def trial_result(params: TrialParams, state: TrialState) -> TrialResult:
    """Return the line of all_trials.json that a trial's own two files make."""
    return TrialResult(
        trial=state.trial,
        optuna_number=state.optuna_number,
        state=state.state,
        reason=state.reason,
        value=state.value,
        values=state.objectives,
        feasible=state.feasible,
        parameters=params.parameters,
        derived=params.derived,
        curve=state.curve,
        stage=params.stage,
        origin=params.origin,
        finalist_of=params.finalist_of,
        started=state.started,
        ended=state.ended,
    )


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size

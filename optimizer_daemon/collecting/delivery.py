"""Copies each weight file, once it is whole and at rest, into the trial's folder under its name of the contract.

Copies rather than links: a program that writes a file again in place would change a checkpoint that is being scored.
"""

from __future__ import annotations

from pathlib import Path

from optimizer_daemon.collecting.job import Job
from optimizer_daemon.collecting.patterns import Match, Pattern
from shared.errors import CheckpointError, RefusedCheckpointError
from shared.files import write_bytes
from shared.layout import TrialLayout
from shared.safetensors_file import Stamp, is_stable, read_header, stamp_of


class Delivery:
    """The checkpoints of one training.

    Args:
        job: what is collected, and where it goes.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._trial = TrialLayout(job.trial_dir)
        self._numbered = [Pattern(text) for text in job.checkpoints]
        self._final = None if job.final is None else Pattern(job.final)
        self._seen: dict[Path, Stamp] = {}
        self._brought: dict[Path, Stamp] = {}
        self.refused: dict[Path, str] = {}

    def collect(self) -> list[Path]:
        """Bring every new intermediate checkpoint that has not changed since the last call; return where they are now.

        A file that was written again after it was brought is brought again.

        Raises:
            DiskError: there is no room for one.
        """
        last = self._job.epochs
        numbered = {epoch: match.path for match, epoch in self._intermediates() if last is None or epoch < last}
        targets = {path: self._trial.intermediate_checkpoint(epoch) for epoch, path in sorted(numbered.items())}
        brought = [self._bring(path, target) for path, target in targets.items() if _is_newer(path, target)]
        return [path for path in brought if path is not None]

    def collect_final(self) -> Path | None:
        """Bring the final checkpoint of a program that has ended well; None where it left no whole one.

        Raises:
            DiskError: there is no room for it.
        """
        candidates = [match.path for match in self._final.find(self._job.output_dir)] if self._final else []
        if not candidates:
            candidates = [match.path for match, epoch in self._intermediates() if epoch == self._job.epochs]
        if not candidates:
            return None
        latest = max(candidates, key=lambda path: path.lstat().st_mtime_ns)
        self._at_rest(latest)  # nobody writes any longer: two looks in a row will do
        return self._bring(latest, self._trial.final_checkpoint)

    def _intermediates(self) -> list[tuple[Match, int]]:
        found = [match for pattern in self._numbered for match in pattern.find(self._job.output_dir)]
        return [(match, epoch) for match in found if (epoch := self.epoch_of(match)) >= 1]

    def epoch_of(self, match: Match) -> int:
        """Return after which epoch a file was saved: of a step the one whose end is nearest, and at least 1."""
        if match.unit == "epoch":
            return match.number + 1 - self._job.first_epoch
        assert self._job.steps_per_epoch is not None, "the plan refuses {step} without it"
        return max(1, (2 * match.number + self._job.steps_per_epoch) // (2 * self._job.steps_per_epoch))

    def _bring(self, path: Path, target: Path) -> Path | None:
        if not self._at_rest(path) or self._brought.get(path) == self._seen[path]:
            return None  # the second for a file whose time of change lies in the future
        try:
            before = read_header(path, self._job.output_dir).stamp
            content = path.read_bytes()
            unchanged = is_stable(before, stamp_of(path)) and len(content) == before.size
        except RefusedCheckpointError as error:
            self.refused[path] = error.reason
            return None
        except (CheckpointError, OSError):
            return None  # it still grows, or has just gone
        if not unchanged:
            return None
        self.refused.pop(path, None)
        write_bytes(target, content)
        self._brought[path] = before
        return target

    def _at_rest(self, path: Path) -> bool:
        try:
            now = stamp_of(path)
        except CheckpointError:
            return False
        before, self._seen[path] = self._seen.get(path), now
        return before is not None and is_stable(before, now)


def _is_newer(path: Path, target: Path) -> bool:
    try:
        return path.lstat().st_mtime_ns > target.stat().st_mtime_ns
    except FileNotFoundError:
        return True

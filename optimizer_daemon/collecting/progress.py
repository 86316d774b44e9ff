"""Translates what a program says of its progress into the bar that the daemons read, see shared.progress_bar.

A program tells by the named groups of regular expressions: step, steps (of the whole training), epoch (the running one,
from 1), epochs_done, epoch_step (steps done in the running epoch), loss, seconds_per_step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from optimizer_daemon.collecting.job import Job
from shared.progress_bar import Progress, parse_bar

GROUPS = frozenset({"step", "steps", "epoch", "epochs_done", "epoch_step", "loss", "seconds_per_step"})

_PREPARATION = re.compile(r"preparing: (\d+)/(\d+)")
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|nan|inf)"
# tqdm draws "Steps:   2%|▏   | 3/150 [00:09<07:21,  3.01s/it, lr=0.0001, step_loss=0.31]"; the loss may be last or not.
TQDM = (
    r"\b(?P<step>\d+)/(?P<steps>\d+) \[[\d:]+<(?:[\d:]+|\?),\s*"
    rf"(?:(?P<seconds_per_step>[\d.]+)s/it|[\d.?]+\w+/\w+)(?:[^\]]*?loss\s*[=:]\s*(?P<loss>{_NUMBER}))?"
)


PREPARING = "model and data"


class Translator:
    """What one program has said so far."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._patterns = [re.compile(text, re.IGNORECASE) for text in job.progress or (TQDM,)]
        self._said: dict[str, str] = {}
        self._last: Progress | None = None

    def read(self, lines: Iterable[str]) -> Progress | None:
        """Return how far the training is after these lines; None where they tell nothing new.

        Without expressions of its own, a bar is the training's when it counts as many steps as the training has, or,
        where nobody knows how many, when it shows a loss. Others, over files or pictures, count as preparation until
        the first step.
        """
        news, now = False, self._last
        for line in lines:
            if parse_bar(line) is not None:
                continue  # already in our form: the daemons read it themselves
            for pattern in self._patterns:
                for match in pattern.finditer(line):
                    said = {name: text for name, text in match.groupdict().items() if text is not None}
                    if self._job.progress or self._is_training(said):
                        self._said |= said
                        news = True
                    else:
                        now = Progress(None, int(said["step"]), int(said["steps"]), preparing=PREPARING)
        if self._said:
            now = self._progress() if news else None
        if now is None or now == self._last:  # an unfinished line is read again at every look
            return None
        self._last = now
        return now

    def _is_training(self, said: Mapping[str, str]) -> bool:
        if self._job.steps_per_epoch and self._job.epochs:
            return int(said["steps"]) == self._job.steps_per_epoch * self._job.epochs
        return "loss" in said

    def _progress(self) -> Progress | None:
        said, per_epoch, epochs = self._said, self._job.steps_per_epoch, self._job.epochs
        epoch = int(said["epoch"]) if "epoch" in said else None
        if "epochs_done" in said:
            epoch = int(said["epochs_done"]) + 1
        step = int(said["step"]) if "step" in said else None
        if step is None and "epoch_step" in said and per_epoch and epoch is not None:
            step = (epoch - 1) * per_epoch + int(said["epoch_step"])
        steps = int(said["steps"]) if "steps" in said else per_epoch * epochs if per_epoch and epochs else None
        if step is None or steps is None:  # it only tells its epochs
            if epoch is None or epochs is None:
                return None
            step, steps = max(0, epoch - 1), epochs
        if epoch is None and per_epoch and epochs:
            epoch = min(epochs, step // per_epoch + 1)
        loss, seconds = said.get("loss"), said.get("seconds_per_step")
        return Progress(
            epoch=epoch,
            step=step,
            steps=steps,
            loss=None if loss is None else float(loss),
            seconds_per_step=None if seconds is None else float(seconds),
        )


def bar(progress: Progress, epochs: int | None) -> str:
    """Return the line that `parse_line` reads as `progress`."""
    if progress.preparing is not None:
        return f"preparing: {progress.step}/{progress.steps}"
    share = min(1.0, progress.step / progress.steps) if progress.steps else 0.0
    drawn = "█" * int(10 * share)
    rate = "?s/it" if progress.seconds_per_step is None else f"{progress.seconds_per_step:g}s/it"
    loss = "" if progress.loss is None else f", avr_loss={progress.loss:g}"
    epoch = "" if progress.epoch is None else f", epoch={progress.epoch}/{epochs or '?'}"
    counts = f"{progress.step}/{progress.steps} [00:00<?, {rate}{loss}{epoch}]"
    return f"steps: {share:4.0%}|{drawn:<10}| {counts}"


def parse_line(line: str) -> Progress | None:
    """Read a line that `bar` wrote, or that the program itself wrote in the same form; None when it is neither."""
    found = _PREPARATION.fullmatch(line.strip())
    if found:
        return Progress(None, int(found[1]), int(found[2]), preparing=PREPARING)
    return parse_bar(line)

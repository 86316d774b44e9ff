"""Named places where a test lets a daemon or a trainer die, fail or wait; chosen by an environment variable.

    LORA_TUNER_FAILPOINTS="optimizer.drawn=kill@2,evaluator.rendered=wait:/tmp/go"

Each entry is NAME=ACTION, or NAME=ACTION@N for the Nth time a process comes to the place (default: the first).

    kill        SIGKILL to this process: nothing more of it runs
    crash       SIGSEGV to this process: it ends by its own fault
    full        OSError ENOSPC, as a full disk raises it
    wait:FILE   stands still until FILE exists

Without the variable a place costs one look into the environment.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from pathlib import Path
from types import MappingProxyType
from typing import Final

from shared.errors import SettingsError

VARIABLE: Final = "LORA_TUNER_FAILPOINTS"

PLACES = MappingProxyType(
    {
        "files.written": "a file's new content is on disk under its temporary name",
        "files.replaced": "a file has its new content; its folder is not synchronised yet",
        "requests.found": "a request is read; nothing is done about it",
        "requests.carried_out": "a request is carried out or refused; the answer is not written",
        "requests.answered": "the answer is written; the request is not removed",
        "database.changed": "the database on a local disk has changed; its copy in the study folder has not",
        "optimizer.baseline_copied": "a baseline's copy stands; run.json may lack it, the evaluator has not seen it",
        "optimizer.finalist_in_line": "a finalist waits in line; it is no running trial yet",
        "optimizer.asked": "the study has a new trial; nothing is stored of its draw",
        "optimizer.draw_stored": "the draw is stored in the study; the trial has no folder",
        "optimizer.folder_made": "the trial has its folder; params.json is not written",
        "optimizer.params_written": "params.json stands; trial_state.json does not",
        "optimizer.training_announced": "trial_state.json says training; nothing is started",
        "optimizer.trainer_started": "the supervisor is started; nothing has been looked at",
        "optimizer.remains_moved": "the remains of an attempt are partly set aside",
        "optimizer.reported": "an intermediate score is in the study; trial_state.json lacks it",
        "optimizer.published": "evaluation/ is written; trial_state.json still says trained",
        "optimizer.pruned": "a losing training is ended and trial_state.json says pruned; nothing else is done",
        "optimizer.ended": "trial_state.json says how the trial ended; the study has not been told",
        "optimizer.told": "the study knows the trial's end; results/ is not refreshed",
        "manager.evaluator_started": "an evaluator process is started; the manager has not written its state",
        "evaluator.admitted": "a checkpoint is proved whole; no attempt is written down",
        "evaluator.attempt_written": "the attempt is written down; nothing is rendered",
        "evaluator.rendered": "the pictures are rendered and measured; nothing of them is on disk",
        "evaluator.pictures_written": "the pictures are on disk; metrics.json is not",
        "evaluator.metrics_written": "metrics.json is written; the record still says evaluating",
        "evaluator.recorded": "the record says recorded; the next checkpoint has not been looked at",
        "trainer.step": "an optimizer step is done",
        "trainer.checkpoint_saved": "a checkpoint is saved; the training state is older than it",
        "trainer.state_saved": "the training state is saved",
        "trainer.finished": "the final checkpoint stands; the training state is not removed",
    }
)

_reached: Counter[str] = Counter()


def reach(place: str) -> None:
    """Do what the environment asks for at this place; usually nothing.

    Raises:
        OSError: ENOSPC, when "full" is asked for.
        SettingsError: the variable names an unknown place or action.
    """
    asked = os.environ.get(VARIABLE)
    if not asked:
        return
    _reached[place] += 1
    for name, action, time_reached in _entries(asked):
        if name == place and time_reached == _reached[place]:
            _carry_out(action)


def _entries(asked: str) -> list[tuple[str, str, int]]:
    entries = []
    for entry in asked.split(","):
        name, _, rest = entry.strip().partition("=")
        action, _, times = rest.partition("@")
        known = action in ("kill", "crash", "full") or action.startswith("wait:")
        if name not in PLACES or not known or not (times or "1").isdecimal():
            raise SettingsError(
                VARIABLE, entry, f"write NAME=kill|crash|full|wait:FILE[@N]; names: {', '.join(PLACES)}"
            )
        entries.append((name, action, int(times or 1)))
    return entries


def _carry_out(action: str) -> None:
    if action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if action.startswith("wait:"):
        while not Path(action.removeprefix("wait:")).exists():
            time.sleep(0.02)
        return
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSEGV)
    while True:  # the signal comes in a moment; nothing else may happen before
        time.sleep(1.0)

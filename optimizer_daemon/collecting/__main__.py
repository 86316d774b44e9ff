"""python -m optimizer_daemon.collecting --job trial_0005/command/collect.json

The program runs as our child, in our process group, on our standard streams and with every descriptor that we inherited
(the trainer's lock, the leases of GPUs). While it runs, and once after its end, its finished weight files are copied to
the trial's folder.

Exit status: the program's own, 128 + n when signal n ended it; after a stop 128 + the signal, whatever the program's;
127 and 126 when it could not be started, 2 when it ended well without a final checkpoint, 4 when the disk is full.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from optimizer_daemon.collecting.delivery import Delivery
from optimizer_daemon.collecting.job import Job
from optimizer_daemon.collecting.progress import Translator, bar
from optimizer_daemon.training_log import TrainingLog
from shared.commands import run_command
from shared.errors import DiskError, UserError
from shared.layout import TrialLayout

LOOK_EVERY_S = 0.5
_FINAL_LOOKS_S = 0.05  # between two looks at the files of a program that has ended
_NOT_FOUND, _CANNOT_START = 127, 126  # as shells have it
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Collector:
    """One program and what it leaves.

    Args:
        job: what runs, and what is collected.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._delivery = Delivery(job)
        self._translator = Translator(job)
        self._log = TrainingLog(TrialLayout(job.trial_dir).training_log)
        self._log.skip_to_end()
        self._parent = os.getppid()
        self._stopped_by: int | None = None
        self._disk_error: DiskError | None = None

    def run(self) -> int:
        """Run the program to its end; return our exit status.

        Raises:
            UserError: it ended well, but left no final checkpoint.
            DiskError: there is no room for one.
        """
        self._job.output_dir.mkdir(parents=True, exist_ok=True)
        waited_for = {signal.SIGCHLD, *_STOPS}
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
        try:
            program = self._start()
        except OSError as error:
            print(f"error: {self._not_started(error)}", file=sys.stderr)
            return _NOT_FOUND if isinstance(error, FileNotFoundError) else _CANNOT_START
        code = self._wait(program, waited_for)
        self._look()
        time.sleep(_FINAL_LOOKS_S)
        self._look()
        return self._conclude(code)

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._job.command,
            cwd=self._job.cwd,
            close_fds=False,  # the lock and the leases live as long as anything of the tree
            preexec_fn=self._prepare_signals,
        )

    def _not_started(self, error: OSError) -> str:
        folder = str(self._job.cwd)
        if str(error.filename) == folder:
            return f"{folder!r} cannot be entered ({error.strerror}); make it, or correct [trainer.command] cwd"
        program = self._job.command[0]
        return f"{program!r} cannot be started ({error.strerror}); install it, or correct [trainer.command] command"

    def _prepare_signals(self) -> None:
        """In the program's process, before it begins: undo our blocks."""
        if self._job.stop_signal == "SIGINT":
            # Whoever stops the trial sends SIGTERM to each of its processes; this program is to hear of SIGINT alone.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _wait(self, program: subprocess.Popen[bytes], waited_for: set[signal.Signals]) -> int:
        """Return how the program ended, -n for signal n; signals are passed on and files collected meanwhile."""
        while program.poll() is None:
            received = signal.sigtimedwait(waited_for, LOOK_EVERY_S)
            if received is None or received.si_signo == signal.SIGCHLD:
                self._look()
                continue
            # Our supervisor, and once it is gone the daemon, signal the whole tree; anybody else may mean us alone.
            told_all = received.si_pid == self._parent or os.getppid() != self._parent
            deaf = self._job.stop_signal == "SIGINT" and received.si_signo == signal.SIGTERM
            if self._stopped_by is None and (deaf or not told_all):
                program.send_signal(signal.Signals[self._job.stop_signal])
            self._stopped_by = self._stopped_by or received.si_signo
        return program.returncode

    def _look(self) -> None:
        progress = self._translator.read([*self._log.new_lines(), self._log.unfinished])
        if progress is not None:
            print(f"\n{bar(progress, self._job.epochs)}", flush=True)
        try:
            for path in self._delivery.collect():
                print(f"\nsaving checkpoint: {path}", flush=True)
        except DiskError as error:  # the program goes on, and so do we: room may be made before its end
            if str(error) != str(self._disk_error):
                print(f"\ncollecting: {error}", flush=True)
            self._disk_error = error

    def _conclude(self, code: int) -> int:
        if self._stopped_by is not None:
            return 128 + self._stopped_by
        if code != 0:
            return code if code > 0 else 128 - code
        final = self._delivery.collect_final()
        if final is None:
            raise UserError(self._no_final())
        print(f"\nsaving checkpoint: {final}", flush=True)
        return 0

    def _no_final(self) -> str:
        """Say it shortly: of a long line in the log only the ends are quoted."""
        job = self._job
        wanted = f"final = {job.final!r}" if job.final is not None else f"checkpoints after epoch {job.epochs}"
        left = sorted(path.relative_to(job.output_dir).as_posix() for path in job.output_dir.rglob("*.safetensors"))
        others = f" and {len(left) - 1} more" if len(left) > 1 else ""
        what = f"it left {left[0]}{others}" if left else "it left no .safetensors file"
        refused = next((f" ({path.name}: {reason})" for path, reason in self._delivery.refused.items()), "")
        return (
            f"the program ended with exit status 0 but without a whole file for {wanted}; correct that in "
            f"[trainer.command], or make it save there: {what}{refused}"
        )


def main(arguments: Sequence[str]) -> int:
    """Run what the job says; return our exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m optimizer_daemon.collecting", description="Run a training program and collect its checkpoints."
    )
    parser.add_argument("--job", type=Path, required=True, help="collect.json")
    path: Path = parser.parse_args(arguments).job
    try:
        job = Job.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path}: no job of ours ({error}); start the trial again, which writes it anew") from error
    return Collector(job).run()


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

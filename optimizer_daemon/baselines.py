"""LoRAs of the user's own that a study is held against: copied into its folder, scored before the first trial.

    entries = without_lost(settings.baseline, study, run)   the flags, but for files whose copy the study has
    given = read_baselines(entries, base_model)             what they name, refused where it cannot be scored
    run = with_baselines(run, given)                        what run.json says from now on
    keep_copies(study, run, settings.baseline)
    baselines = Baselines(...)                              has those scored that are not, in one command

What is known of a score lies in `evaluations/baseline/`, written by the evaluator; nothing is remembered here.
"""

from __future__ import annotations

import logging
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import IO, Any

from optimizer_daemon.scores import read_or_none, unlike, usual_parts
from optimizer_daemon.scoring_command import MOST_FAILURES, pause_s, spawn_evaluator, stop_evaluator, tail
from shared.errors import CheckpointError, DiskError, SettingsError, StudyMismatchError
from shared.failpoints import reach
from shared.files import write_bytes
from shared.layout import BASELINE, LABEL_PATTERN, StudyLayout
from shared.locks import FileLock
from shared.logs import log_change
from shared.model_folders import cross_attention_dim
from shared.safetensors_file import Checkpoint, LoraLayout, lora_modules, read_checkpoint
from shared.schemas import Baseline, BaselineResult, EvaluationState, Metrics, Run

NOT_YET = "not scored yet"
LONG_WAIT_S = 600.0
RESERVED = "base"
"""The name of the base model's own evaluation, wherever checkpoints have names."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GivenBaseline:
    """A LoRA that was named and may be scored.

    Args:
        file: where it lies, absolute.
        checkpoint: its content.
    """

    file: Path
    checkpoint: Checkpoint


# ------------------------------------------------------------------------------------------------ before anything else


def read_baselines(entries: Iterable[str], base_model: Path) -> dict[str, GivenBaseline]:
    """Return the baselines by name.

    Args:
        entries: NAME=FILE each.
        base_model: what they must fit.
    Raises:
        SettingsError: a name will not do or comes twice, or a file is not there or no LoRA of that base model.
    """
    found: dict[str, GivenBaseline] = {}
    for entry in entries:
        name, file = _split(entry)
        if not re.fullmatch(LABEL_PATTERN, name) or name == RESERVED:
            raise SettingsError(
                "--baseline",
                entry,
                "give it a name of small letters, digits, dots, dashes and underscores, at most 64, that begins with a "
                f"letter or digit; {RESERVED} is the base model",
            )
        if name in found:
            raise SettingsError("--baseline", entry, f"{name} is already {found[name].file}; name each once")
        if file.suffix != ".safetensors" or not file.is_file():
            raise SettingsError("--baseline", entry, "name a *.safetensors file that is there")
        real = file.resolve()
        try:
            checkpoint = read_checkpoint(real, real.parent)
            _require_fit(checkpoint, lora_modules(checkpoint), base_model, entry)
        except CheckpointError as error:
            raise SettingsError("--baseline", entry, f"{error.reason}; name a LoRA that is whole") from error
        found[name] = GivenBaseline(file, checkpoint)
    return found


def without_lost(entries: Iterable[str], study: StudyLayout, run: Run) -> list[str]:
    """Return the entries but for those whose file is gone while the study's own copy of it stands."""
    kept = []
    for entry in entries:
        name, file = _split(entry)
        if name in run.baselines and not file.exists() and _copy_stands(study, run, name):
            log_change(_log, "baseline's file is gone, its copy stands", baseline=name, file=str(file))
        else:
            kept.append(entry)
    return kept


def _copy_stands(study: StudyLayout, run: Run, name: str) -> bool:
    copy = study.baseline_file(name)
    try:
        return copy.is_file() and read_checkpoint(copy, copy.parent).sha256 == run.baselines[name].sha256
    except CheckpointError:
        return False


def _split(entry: str) -> tuple[str, Path]:
    name, equals, path = entry.partition("=")
    if not (name and equals and path):
        raise SettingsError("--baseline", entry, "write NAME=FILE, such as v6=lora_v6.safetensors")
    return name, Path(path).absolute()


def _require_fit(checkpoint: Checkpoint, layout: LoraLayout, base_model: Path, entry: str) -> None:
    """Refuse a LoRA of another family, told by the width of what its cross-attention reads: the text's."""
    width = cross_attention_dim(base_model)
    for module in layout.modules:
        if not re.search(r"attn2[._]to_[kv]$", module.name):
            continue
        theirs = checkpoint.tensors[module.down].shape[1]
        if width is not None and theirs != width:
            raise SettingsError(
                "--baseline",
                entry,
                f"it was trained on another family of base model (text {theirs} wide, {width} in {base_model}); name a "
                "LoRA of this one",
            )


def with_baselines(run: Run, given: Mapping[str, GivenBaseline]) -> Run:
    """Return what run.json says with these baselines; those it has stay.

    Raises:
        StudyMismatchError: one has another content than it had.
    """
    for name, baseline in given.items():
        known = run.baselines.get(name)
        if known is not None and known.sha256 != baseline.checkpoint.sha256:
            raise StudyMismatchError(
                f"--baseline {name}={baseline.file}: its content is {baseline.checkpoint.sha256}, but the study was "
                f"held against {known.sha256}, from {known.file}; give the new one a name of its own"
            )
    new = {
        name: Baseline(file=str(baseline.file), sha256=baseline.checkpoint.sha256)
        for name, baseline in given.items()
        if name not in run.baselines
    }
    return run.model_copy(update={"baselines": {**run.baselines, **new}})


def keep_copies(study: StudyLayout, run: Run, entries: Iterable[str]) -> None:
    """Copy the files of the entries to baseline/, where they are not there yet.

    Raises:
        StudyMismatchError: a file has changed since it was looked at.
        DiskError: there is no room.
    """
    for name, file in map(_split, entries):
        copy = study.baseline_file(name)
        if copy.exists():
            continue
        try:
            copy.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise DiskError(copy.parent, error) from error
        checkpoint = read_checkpoint(file.resolve(), file.resolve().parent)
        with_baselines(run, {name: GivenBaseline(file, checkpoint)})
        write_bytes(copy, checkpoint.raw)
        reach("optimizer.baseline_copied")


# ------------------------------------------------------------------------------------------------------- their scores


def baseline_results(study: StudyLayout, run: Run) -> tuple[BaselineResult, ...]:
    """Return what is known of each baseline's scores, by name."""
    if not run.baselines or run.plan is None or run.plan_hash is None:
        return ()
    objective = run.plan.scoring.objective
    state = read_or_none(study.evaluations(BASELINE).state, EvaluationState)
    records = {
        (record.checkpoint, record.checkpoint_sha256): record
        for record in (state.checkpoints if state is not None else ())
        if record.plan_hash == run.plan_hash
    }
    usual = usual_parts(study, run.plan_hash, objective)
    found = []
    for name, baseline in sorted(run.baselines.items()):
        record = records.get((name, baseline.sha256))
        metrics = baseline_metrics(study, run, name)
        if metrics is None:
            refused = None if record is None or record.quarantine is None else record.quarantine.reason
            found.append(BaselineResult(name=name, reason=refused or NOT_YET))
            continue
        score = metrics.scores.get(objective)
        if score is None or score.value is None:
            reason = f"{objective} could not be computed"
        else:
            reason = unlike(objective, score, usual)
        failed = [check.reason for check in metrics.gate.checks.values() if check.passed is False and check.reason]
        found.append(
            BaselineResult(
                name=name,
                value=None if score is None or reason else score.value,
                feasible=metrics.gate.feasible,
                reason=reason or "; ".join(failed) or None,
                scores={known: found_score.value for known, found_score in metrics.scores.items()},
            )
        )
    return tuple(found)


def baseline_metrics(study: StudyLayout, run: Run, name: str) -> Metrics | None:
    """Return everything measured of a baseline; None where it is not scored, or with another plan or content."""
    metrics = read_or_none(study.evaluations(BASELINE).checkpoint(name).metrics, Metrics)
    wanted = (run.baselines[name].sha256, run.plan_hash)
    return metrics if metrics is not None and (metrics.checkpoint_sha256, metrics.plan_hash) == wanted else None


def rivals(study: StudyLayout, run: Run) -> dict[str, Metrics]:
    """Return what a trial is held against, by name: each baseline that is scored, and the base model."""
    found = {f"baseline {name}": baseline_metrics(study, run, name) for name in sorted(run.baselines)}
    if run.plan_hash is not None:
        found["base model"] = read_or_none(study.base_render(run.plan_hash).metrics, Metrics)
    return {name: metrics for name, metrics in found.items() if metrics is not None}


def baseline_lines(
    results: Sequence[BaselineResult], objective: str, best: float | None, *, knee: bool = False
) -> list[str]:
    """Return a line for each baseline.

    Args:
        objective: the score of the study's scoring.
        best: the winner's value of it; None while there is no winner.
        knee: whether the winner is the knee of several objectives; this score is none of them then, or one of them.
    """
    lines = []
    for result in results:
        if result.value is None:
            lines.append(f"baseline {result.name}: no score ({result.reason})")
            continue
        gate = "" if result.feasible else f", failed its gate: {result.reason}"
        held = "" if best is None else f", the {'knee' if knee else 'winner'} is {_difference(best - result.value)}"
        if held and knee:
            held += f" in {objective}"
        lines.append(f"baseline {result.name}: {objective} {result.value:.4f}{held}{gate}")
    return lines


def against(results: Sequence[BaselineResult], value: float) -> dict[str, float]:
    """Return a trial's objective minus that of each baseline that has one; below 0 it is better."""
    return {result.name: value - result.value for result in results if result.value is not None}


def _difference(difference: float) -> str:
    shown = f"{abs(difference):.4f}"
    return "as good" if float(shown) == 0 else f"{shown} {'better' if difference < 0 else 'worse'}"


class Baselines:
    """Has the study's baselines scored that have no verdict yet; what cannot be scored is said once.

    By the evaluator's own command: where a manager lives it leaves the work to that one, which has everything loaded.

    Args:
        command: the evaluator's program, before its verb.
        device: where it renders.
        threads: CPU threads it may use.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        study: StudyLayout,
        run: Run,
        command: Sequence[str],
        device: str,
        threads: int,
        clock: Callable[[], float],
    ) -> None:
        self._study = study
        self._run = run
        self._command = tuple(command)
        self._device = device
        self._threads = threads
        self._clock = clock
        self._waiting = []
        for name in self._open():
            if study.baseline_file(name).exists():
                self._waiting.append(name)
            else:
                lost = f"{study.baseline_file(name)} is gone; pass --baseline {name}={run.baselines[name].file} again"
                log_change(_log, "baseline without a score", level=logging.WARNING, baseline=name, reason=lost)
        self._process: Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._failures = 0
        self._not_before = 0.0
        self._long_after = clock() + LONG_WAIT_S

    @property
    def pending(self) -> bool:
        """Whether one is still to be scored: no trial begins before."""
        return bool(self._waiting)

    def results(self) -> tuple[BaselineResult, ...]:
        """Return what is known of each."""
        return baseline_results(self._study, self._run)

    def poll(self) -> bool:
        """Take the next step; return whether a verdict has come."""
        if not self._waiting:
            return False
        if self._clock() >= self._long_after:
            self._long_after = math.inf
            names, why = (
                ", ".join(self._waiting),
                f"no trial begins before; see {self._study.evaluations(BASELINE).log}",
            )
            log_change(_log, "baselines are long in scoring", level=logging.WARNING, names=names, reason=why)
        if self._process is None:
            return self._start_or_wait()
        if (code := self._process.poll()) is None:
            return False
        assert self._output is not None, "a process has its output"
        with self._output:
            said = tail(self._output)
        self._process = self._output = None
        if code not in (0, CheckpointError.exit_code):  # the latter tells of a file, which has its verdict then
            self._failures += 1
            self._not_before = self._clock() + pause_s(self._failures)
            log_change(_log, "scoring of the baselines failed", level=logging.WARNING, exit=code, said=said[-300:])
            if self._failures < MOST_FAILURES:
                return False
        self._settle()
        return True

    def stop(self) -> None:
        """End the scoring in hand; it goes on at the next start."""
        if self._process is not None:
            stop_evaluator(self._process)
            if self._output is not None:
                self._output.close()
            self._process = self._output = None

    def _open(self) -> list[str]:
        return [result.name for result in self.results() if _is_open(result)]

    def _start_or_wait(self) -> bool:
        """Start the scoring, unless somebody else is at it, such as the command of a daemon that was killed."""
        if self._clock() < self._not_before or FileLock.is_held(self._study.evaluations(BASELINE).lock):
            return False
        if not set(self._waiting) & set(self._open()):
            self._settle()
            return True
        self._start()
        return False

    def _start(self) -> None:
        files = [str(self._study.baseline_file(name)) for name in self._waiting]
        where = ["--label", BASELINE, "--optimization-dir", str(self._study.root), "--device", self._device]
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  closed by `poll` or `stop`
        argv = [*self._command, "evaluate", *files, *where]
        self._process = spawn_evaluator(argv, self._threads, self._output)
        log_change(_log, "scoring of the baselines started", names=", ".join(self._waiting))

    def _settle(self) -> None:
        """Say what came of each."""
        for result in self.results():
            if result.name not in self._waiting:
                continue
            if result.value is not None:
                scores: dict[str, Any] = {self._objective: result.value}
                log_change(_log, "baseline scored", baseline=result.name, **scores)
            else:
                why = f"{result.reason}; see {self._study.evaluations(BASELINE).log}"
                log_change(_log, "baseline without a score", level=logging.WARNING, baseline=result.name, reason=why)
        self._waiting.clear()

    @property
    def _objective(self) -> str:
        assert self._run.plan is not None, "the evaluator scores this workload"
        return self._run.plan.scoring.objective


def _is_open(result: BaselineResult) -> bool:
    return result.feasible is None and result.reason == NOT_YET

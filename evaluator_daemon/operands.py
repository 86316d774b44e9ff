"""What people name to be compared: trials, epochs, labels, the base model, files; and what is recorded of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluator_daemon.folder import read_or_none
from shared.errors import SettingsError, UserError
from shared.layout import LABEL_PATTERN, EvaluationsLayout, StudyLayout, TrialLayout
from shared.schemas import EvaluationPlan, EvaluationState, LabelledPlan, Metrics
from shared.schemas.plan import SEEDS_END
from shared.scores.comparing import best_of

BASE = "base"
FINALISTS = "finalists"


@dataclass(frozen=True)
class Operand:
    """One side of a comparison.

    Args:
        name: as the user wrote it.
        checkpoint: the checkpoint's name.
        file: its weight file; None for the base model alone.
        metrics: what is recorded; None where it must be evaluated.
        plan: the plan it was recorded with.
    """

    name: str
    checkpoint: str
    file: Path | None
    metrics: Metrics | None = None
    plan: EvaluationPlan | None = None


def label_of(file: Path) -> str:
    """Return the label that a file's results go to unless one is named.

    Raises:
        SettingsError: its name holds nothing a label can be made of, or would be that of the base model.
    """
    label = re.sub(r"[^a-z0-9._-]+", "-", file.stem.lower()).lstrip("._-")[:64]
    if not label or label == BASE:
        raise SettingsError("FILE", str(file), "no label can be made of its name; name one by --label")
    return label


def require_label(label: str) -> str:
    """Return a label that may name a folder.

    Raises:
        SettingsError: it may not.
    """
    if not re.fullmatch(LABEL_PATTERN, label):
        raise SettingsError("--label", label, "use small letters, digits, dots, dashes and underscores, at most 64")
    return label


def require_file(file: Path) -> Path:
    """Return the absolute path of a weight file that is there.

    Raises:
        SettingsError: it is not, or is no *.safetensors file.
    """
    if file.suffix != ".safetensors" or not file.is_file():
        raise SettingsError("FILE", str(file), "name a *.safetensors file that is there")
    return file.resolve()


def named_files(files: Sequence[Path]) -> dict[str, Path | None]:
    """Return files by the name of their checkpoint.

    Raises:
        SettingsError: two have the same name.
    """
    found: dict[str, Path | None] = {}
    for file in files:
        if found.get(file.stem, file) != file:
            raise SettingsError(
                "FILE",
                str(file),
                f"{found[file.stem]} has the same name; evaluate them apart, each with its own --label",
            )
        found[file.stem] = file
    return found


def resolve(text: str, study: StudyLayout, plan: EvaluationPlan | None) -> Operand:
    """Find what an operand means.

    Args:
        plan: the study's; None in a folder without one.
    Raises:
        UserError: there is no such trial, epoch, label or file.
    """
    name, _, which = text.partition("@")
    path = Path(text)
    if path.suffix == ".safetensors" or "/" in text:
        return _of_file(text, require_file(path), study, plan)
    trial = _trial(name, study)
    if trial is not None:
        return _of_trial(text, trial, which, plan)
    if re.fullmatch(LABEL_PATTERN, name) and study.evaluations(name).plan.exists():
        return _of_label(text, study, name, which)
    if text == BASE:
        metrics = None if plan is None else read_or_none(study.base_render(plan.digest()).metrics, Metrics)
        return Operand(text, BASE, None, metrics, plan)
    trials = ", ".join(known.name for known in study.list_trials()) or "none"
    labels = (
        ", ".join(sorted(path.parent.name for path in study.root.glob("evaluations/*/evaluation_plan.json"))) or "none"
    )
    raise UserError(
        f"{text!r} names no trial, label or file of {study.root}; its trials: {trials}; its labels: {labels}; "
        "else name a *.safetensors file, or base"
    )


def recorded(evaluations: EvaluationsLayout, plan_hash: str) -> dict[str, Metrics]:
    """Return what a folder of evaluations holds of one plan, by checkpoint; verdicts taken back are left out."""
    state = read_or_none(evaluations.state, EvaluationState)
    found = {}
    for record in state.checkpoints if state else ():
        metrics = read_or_none(evaluations.checkpoint(record.checkpoint).metrics, Metrics)
        if record.status != "recorded" or record.plan_hash != plan_hash or metrics is None:
            continue
        if (metrics.checkpoint_sha256, metrics.plan_hash) == (record.checkpoint_sha256, plan_hash):
            found[record.checkpoint] = metrics
    return found


def _trial(name: str, study: StudyLayout) -> TrialLayout | None:
    wanted = study.trial(int(name)).name if name.isdecimal() and int(name) > 0 else name
    return next((trial for trial in study.list_trials() if trial.name == wanted), None)


def _of_trial(text: str, trial: TrialLayout, which: str, plan: EvaluationPlan | None) -> Operand:
    known = {} if plan is None else recorded(trial.evaluations, plan.digest())
    if which == "best":
        best = None if plan is None else best_of(known, plan)
        if best is None:
            raise UserError(f"{text}: {trial.name} has no recorded checkpoint that may win; evaluate it first")
        checkpoint = best.checkpoint
    elif not which:
        checkpoint = trial.final_checkpoint.stem
    elif which.isdecimal():
        at_epoch = {name for name, metrics in known.items() if metrics.epoch == int(which)}
        usual = trial.intermediate_checkpoint(int(which)).stem
        checkpoint = usual if usual in at_epoch or not at_epoch else sorted(at_epoch)[0]
    else:
        raise UserError(f"{text}: write {trial.name}@8 for an epoch, or {trial.name}@best")
    file = trial.folder / f"{checkpoint}.safetensors"
    if checkpoint not in known and not file.is_file():
        stems = sorted({*known, *(path.stem for path in trial.list_checkpoints())})
        raise UserError(
            f"{text}: {trial.name} has no checkpoint {checkpoint}; it has: {', '.join(stems) or 'none yet'}"
        )
    return Operand(text, checkpoint, file.resolve(), known.get(checkpoint), plan)


def _of_label(text: str, study: StudyLayout, label: str, which: str) -> Operand:
    layout = study.evaluations(label)
    planned = read_or_none(layout.plan, LabelledPlan)
    known = {} if planned is None else recorded(layout, planned.plan.digest())
    chosen = [which] if which else list(known)
    if planned is None or len(chosen) != 1 or chosen[0] not in known:
        names = ", ".join(f"{label}@{name}" for name in sorted(known)) or "nothing recorded"
        raise UserError(f"{text}: name one of what {layout.folder} holds: {names}")
    path = planned.files.get(chosen[0])
    return Operand(text, chosen[0], None if path is None else Path(path), known[chosen[0]], planned.plan)


def _of_file(text: str, file: Path, study: StudyLayout, plan: EvaluationPlan | None) -> Operand:
    trial = next((trial for trial in study.list_trials() if trial.folder.resolve() == file.parent), None)
    known = {} if trial is None or plan is None else recorded(trial.evaluations, plan.digest())
    return Operand(text, file.stem, file, known.get(file.stem), plan)


def fresh_plan(plan: EvaluationPlan, pictures: int) -> EvaluationPlan:
    """Return the plan with other pictures: as many as asked for, on seeds that the plan never used."""
    options = plan.overrides
    # A prompt may have a seed of its own in place of base_seed.
    starts = sorted({plan.base_seed, *(own.seed for own in options if own.seed is not None)})
    turns, fresh_turns = (-(-count // len(plan.prompts)) for count in (plan.num_samples, pictures))
    shift = _shift(starts, turns, fresh_turns)
    updates: dict[str, object] = {"num_samples": pictures, "base_seed": (plan.base_seed + shift) % SEEDS_END}
    if options:
        updates["overrides"] = tuple(
            own if own.seed is None else own.model_copy(update={"seed": (own.seed + shift) % SEEDS_END})
            for own in options
        )
    return EvaluationPlan.model_validate({**dict(plan), **updates})


def _shift(starts: Sequence[int], turns: int, fresh_turns: int) -> int:
    """How far to move all seeds, on the ring of SEEDS_END, so that none of the new ones is among the old ones.

    Args:
        starts: where a run of seeds begins.
        turns, fresh_turns: seeds in each old and each new run.
    """
    just_beyond = sorted({old - new + turns for old in starts for new in starts}, reverse=True)  # usually the first
    return next(
        shift
        for shift in just_beyond
        if all(turns <= (new + shift - old) % SEEDS_END <= SEEDS_END - fresh_turns for old in starts for new in starts)
    )


def require_one_plan(operands: Sequence[Operand]) -> None:
    """Refuse sides that were evaluated with different plans.

    Raises:
        StudyMismatchError: names the fields that differ, with both values.
    """
    from shared.errors import StudyMismatchError
    from shared.scores.comparing import differences_text, fields_that_differ

    plans = [(operand.name, operand.plan) for operand in operands if operand.plan is not None]
    for name, plan in plans[1:]:
        first, reference = plans[0]
        if plan.digest() != reference.digest():
            fields = differences_text(fields_that_differ(reference, plan))
            raise StudyMismatchError(
                f"{first} and {name} were evaluated with different plans ({fields}, {first} being there); compare with "
                "--fresh, which renders both anew, or evaluate the file with the study's plan"
            )


def labels_of(operands: Sequence[Operand]) -> Mapping[str, Path | None]:
    """Return what a common label must hold, by checkpoint.

    Raises:
        SettingsError: two different files have the same name.
    """
    found: dict[str, Path | None] = {}
    for operand in operands:
        if operand.checkpoint in found and found[operand.checkpoint] != operand.file:
            raise SettingsError(
                operand.name, str(operand.file), f"{found[operand.checkpoint]} has the same name; rename a copy of one"
            )
        found[operand.checkpoint] = operand.file
    return found

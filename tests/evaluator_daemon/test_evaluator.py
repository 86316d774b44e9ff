"""One trial's evaluator on real files: what is scored, what is refused, what is remembered."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from PIL import Image

from evaluator_daemon.evaluator import Evaluator, evaluate_trial
from evaluator_daemon.job import Job
from evaluator_daemon.places import TrialPlace
from evaluator_daemon.process import crash_text
from evaluator_daemon.recording import Memory, changed, now
from evaluator_daemon.resident import ResidentModel
from evaluator_daemon.sweep import open_files
from shared.errors import DiskError, ResourceError, SettingsError, Stopped, StudyMismatchError
from shared.files import read_model, write_model
from shared.layout import StudyLayout, TrialLayout
from shared.logs import LineFormatter
from shared.planning import make_plan
from shared.schemas import Attempt, EvaluationState, EvaluationSummary, Metrics, TrialState
from shared.scores.formulas import combined_score
from shared.service import Service
from tests.evaluator_daemon.tiny_models import PROMPTS, TEXT_MODULES, UNET_MODULES, lora_bytes


@pytest.fixture(scope="module")
def job(base_model, clip_model, tmp_path_factory) -> Job:
    plan = make_plan(
        base_model=base_model, prompts=PROMPTS, device="cpu", num_samples=3, steps=2, clip_model=clip_model
    )
    return Job(tmp_path_factory.mktemp("study"), plan, base_model, clip_model, "cpu", 1, 1.0, 900.0)


@pytest.fixture
def trial(job, request) -> TrialLayout:
    number = sum(path.name.startswith("trial_") for path in job.root.iterdir()) + 1
    trial = StudyLayout(job.root).trial(number)
    trial.folder.mkdir()
    return trial


def evaluate(job: Job, trial: TrialLayout, **options) -> dict:
    """Run the evaluator once; return the records by checkpoint name."""
    evaluate_trial(job, trial.folder, watch=False, **options)
    state = read_model(trial.evaluations.state, EvaluationState)
    return {record.checkpoint: record for record in state.checkpoints}


def metrics_of(trial: TrialLayout, name: str) -> Metrics:
    return read_model(trial.evaluations.checkpoint(name).metrics, Metrics)


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def written(trial: TrialLayout) -> dict[Path, int]:
    """Every file of the evaluator but its log and lock, with its modification time."""
    files = [path for path in trial.evaluations.folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.stat().st_mtime_ns for path in files}


def test_every_checkpoint_is_scored_once(job, trial):
    early, final = trial.intermediate_checkpoint(2), trial.final_checkpoint
    early.write_bytes(lora_bytes(1))
    final.write_bytes(lora_bytes(2, epoch=4))
    (trial.folder / "copy.safetensors").write_bytes(lora_bytes(2))
    records = evaluate(job, trial)

    assert {record.status for record in records.values()} == {"recorded"}
    assert records[early.stem].epoch == 2
    assert records[final.stem].epoch == 4
    twins = {records[final.stem].same_as, records["copy"].same_as}
    assert twins in ({None, "copy"}, {None, final.stem}), "equal content is rendered once"
    assert metrics_of(trial, "copy").metrics == metrics_of(trial, final.stem).metrics

    metrics = metrics_of(trial, early.stem)
    folder = trial.evaluations.checkpoint(early.stem)
    pictures = [picture(folder.folder / sample.file) for sample in metrics.samples]
    assert [(s.prompt, s.seed) for s in metrics.samples] == [(PROMPTS[0], 42), (PROMPTS[1], 42), (PROMPTS[0], 43)]
    assert metrics.metrics["brightness"].value == pytest.approx(fmean(p.mean() / 255 for p in pictures))
    assert metrics.metrics["clip_consistency"].status == "ok"
    assert metrics.metrics["base_difference"].value > 0
    expected = combined_score(metrics.metrics["brightness"].per_image, metrics.metrics["contrast"].per_image)
    assert metrics.scores["combined_score"].value == pytest.approx(expected.combined_score)
    assert metrics.gate.checks["clip_consistency"].limit == -0.02
    assert metrics.plan_hash == job.plan.digest()
    assert picture(folder.grid).shape == (16, 48, 3)

    summary = read_model(trial.evaluations.summary, EvaluationSummary)
    assert list(summary.checkpoints) == [early.stem, final.stem, "copy"], "in epoch order, unknown last"
    assert summary.total_checkpoints_evaluated == 3
    assert summary.checkpoints[early.stem].mean_brightness == metrics.metrics["brightness"].value

    before = written(trial)
    evaluate(job, trial)
    assert written(trial) == before, "nothing is evaluated twice"


@pytest.mark.parametrize("lost", ["metrics.json", "sample_1.png"])
def test_results_that_are_lost_are_made_again_while_the_optimizer_waits_for_them(job, trial, lost):
    path = trial.final_checkpoint
    path.write_bytes(lora_bytes(20))
    write_model(
        trial.state,
        TrialState(trial=trial.number, optuna_number=trial.number - 1, state="trained", attempt=1, drawn=now()),
    )
    evaluate(job, trial)
    before = metrics_of(trial, path.stem).metrics
    (trial.evaluations.checkpoint(path.stem).folder / lost).unlink()
    (record,) = evaluate(job, trial).values()
    assert (record.status, [attempt.outcome for attempt in record.attempts]) == ("recorded", ["recorded"])
    assert metrics_of(trial, path.stem).metrics == before
    assert (trial.evaluations.checkpoint(path.stem).folder / lost).exists()


def test_touched_files_are_not_rendered_again_but_new_content_under_an_old_name_is(job, trial, caplog):
    path = trial.final_checkpoint
    path.write_bytes(lora_bytes(3))
    first = evaluate(job, trial)[path.stem]
    evaluated = metrics_of(trial, path.stem).evaluation_time
    os.utime(path, (1_700_000_000, 1_700_000_000))
    touched = evaluate(job, trial)[path.stem]
    assert touched.modified_ns == 1_700_000_000 * 10**9
    assert touched.attempts == first.attempts
    assert metrics_of(trial, path.stem).evaluation_time == evaluated

    path.write_bytes(lora_bytes(4))
    with caplog.at_level(logging.INFO):
        again = evaluate(job, trial)[path.stem]
    lines = [LineFormatter().format(entry) for entry in caplog.records]
    assert sum(f"superseded checkpoint={path.stem} was=recorded score=" in line for line in lines) == 1
    assert again.checkpoint_sha256 != first.checkpoint_sha256
    assert metrics_of(trial, path.stem).checkpoint_sha256 == again.checkpoint_sha256


def nan_lora() -> bytes:
    from safetensors.torch import load, save

    tensors = load(lora_bytes())
    tensors[next(iter(tensors))].fill_(float("nan"))
    return save(tensors)


def bad_files() -> dict[str, tuple[bytes, str, str | None]]:
    """Name -> content, the status it must end in, the code of its quarantine."""
    wrong_prefix = {f"unet_{name}": shape for name, shape in UNET_MODULES.items()}
    return {
        "truncated": (lora_bytes()[:-10], "truncated", "incomplete"),
        "nan": (nan_lora(), "quarantined", "not_finite"),
        "zero": (lora_bytes(strength=0.0), "quarantined", "all_zero"),
        "prefix": (lora_bytes(modules=wrong_prefix), "quarantined", "not_a_lora"),
        "unknown": (lora_bytes(modules={**TEXT_MODULES, "lora_unet_x": (16, 16)}), "quarantined", "not_applied"),
        "garbage": (b"not a weight file at all, but long enough", "quarantined", "header_size"),
    }


def test_each_bad_file_ends_in_its_own_state_and_the_good_one_is_scored(job, trial):
    bad, long_ago = bad_files(), time.time() - 3600
    for name, (content, _, _) in bad.items():
        path = trial.folder / f"{name}.safetensors"
        path.write_bytes(content)
        os.utime(path, (long_ago, long_ago))
    trial.final_checkpoint.write_bytes(lora_bytes(5))
    records = evaluate(job, trial)
    assert {
        name: (records[name].status, records[name].quarantine and records[name].quarantine.code) for name in bad
    } == {name: (status, code) for name, (_, status, code) in bad.items()}
    assert records[trial.final_checkpoint.stem].status == "recorded"
    assert not any(trial.evaluations.checkpoint(name).metrics.exists() for name in bad)
    assert list(read_model(trial.evaluations.summary, EvaluationSummary).checkpoints) == [trial.final_checkpoint.stem]

    (trial.folder / "truncated.safetensors").write_bytes(lora_bytes(6))
    assert evaluate(job, trial)["truncated"].status == "recorded", "a change opens the question again"


def test_equal_content_whose_pictures_are_gone_is_rendered_again(job, trial):
    trial.final_checkpoint.write_bytes(lora_bytes(15))
    evaluate(job, trial)
    trial.evaluations.checkpoint(trial.final_checkpoint.stem).sample(1).unlink()
    (trial.folder / "twin.safetensors").write_bytes(lora_bytes(15))
    twin = evaluate(job, trial)["twin"]
    assert (twin.status, twin.same_as) == ("recorded", None)
    assert trial.evaluations.checkpoint("twin").sample(1).exists()


def test_a_full_disk_is_neither_a_strike_nor_an_interruption(job, trial, monkeypatch):
    path = trial.final_checkpoint
    path.write_bytes(lora_bytes(16))
    monkeypatch.setenv("LORA_TUNER_FAILPOINTS", "files.written=full@3")  # the attempt, a picture, the next one
    monkeypatch.setattr("shared.failpoints._reached", Counter())
    with pytest.raises(DiskError):
        evaluate_trial(job, trial.folder, watch=False)
    record = read_model(trial.evaluations.state, EvaluationState).checkpoints[0]
    assert (record.status, record.attempts) == ("waiting", ())
    monkeypatch.delenv("LORA_TUNER_FAILPOINTS")
    assert [attempt.outcome for attempt in evaluate(job, trial)[path.stem].attempts] == ["recorded"]


def test_a_removed_trial_does_not_come_back(job, trial, monkeypatch):
    trial.final_checkpoint.write_bytes(lora_bytes(17))

    def removed(place: str) -> None:
        if place == "evaluator.rendered":
            shutil.rmtree(trial.folder)

    monkeypatch.setattr("evaluator_daemon.evaluator.reach", removed)
    evaluate_trial(job, trial.folder, watch=False)
    assert not trial.folder.exists()


def test_a_file_that_may_still_grow_waits_without_an_attempt(job, trial):
    trial.final_checkpoint.write_bytes(lora_bytes()[:-1])
    assert evaluate_trial(job, trial.folder, watch=False) is None
    assert not trial.evaluations.state.exists()


def test_three_failures_of_its_own_end_a_checkpoints_attempts_while_others_go_on(job, trial):
    trial.intermediate_checkpoint(2).write_bytes(lora_bytes(7))
    trial.final_checkpoint.write_bytes(lora_bytes(8))
    trial.evaluations.folder.mkdir()
    blocked = trial.evaluations.checkpoint(trial.intermediate_checkpoint(2).stem).folder
    blocked.write_text("a file stands where the folder should be")
    records = evaluate(job, trial)
    assert [attempt.outcome for attempt in records[blocked.name].attempts] == ["strike"] * 3
    assert records[blocked.name].quarantine.code == "three_strikes"
    assert "FileExistsError" in records[blocked.name].quarantine.reason
    assert records[trial.final_checkpoint.stem].status == "recorded"


@pytest.mark.parametrize(
    ("previous_exit", "outcome"),
    [
        pytest.param(None, "interruption", id="nobody knows"),
        pytest.param(-signal.SIGKILL, "interruption", id="kill -9"),
        pytest.param(143, "interruption", id="stopped in order"),
        pytest.param(-signal.SIGSEGV, "strike", id="segmentation fault"),
        pytest.param(1, "strike", id="failed by itself"),
    ],
)
def test_an_attempt_left_running_is_closed_by_how_its_process_ended(job, trial, previous_exit, outcome):
    trial.final_checkpoint.write_bytes(lora_bytes(9))
    record = evaluate(job, trial)[trial.final_checkpoint.stem]
    running = changed(record, status="evaluating", attempts=(Attempt(started=now(), outcome="running"),))
    Memory(trial.name, trial.evaluations, job.plan.digest()).put(running)
    trial.evaluations.checkpoint(record.checkpoint).metrics.unlink()
    redone = evaluate(job, trial, previous_crash=crash_text(previous_exit))[record.checkpoint]
    assert [attempt.outcome for attempt in redone.attempts] == [outcome, "recorded"]
    assert metrics_of(trial, record.checkpoint).checkpoint_sha256 == record.checkpoint_sha256


def test_damaged_memory_is_set_aside_and_rebuilt_without_rendering(job, trial):
    trial.final_checkpoint.write_bytes(lora_bytes(10))
    evaluate(job, trial)
    evaluated = metrics_of(trial, trial.final_checkpoint.stem).evaluation_time
    trial.evaluations.state.write_text("{")
    assert evaluate(job, trial)[trial.final_checkpoint.stem].status == "recorded"
    assert metrics_of(trial, trial.final_checkpoint.stem).evaluation_time == evaluated
    assert list(trial.evaluations.folder.glob("evaluation_state.json.corrupt-*"))


def test_without_a_clip_the_gate_says_that_it_could_not_look(job, trial, base_model):
    plan = make_plan(base_model=base_model, prompts=PROMPTS, device="cpu", num_samples=2, steps=1)
    trial.final_checkpoint.write_bytes(lora_bytes(11))
    evaluate(Job(job.root, plan, base_model, None, "cpu", 1, 1.0, 900.0), trial)
    metrics = metrics_of(trial, trial.final_checkpoint.stem)
    assert metrics.metrics["clip_consistency"].status == "unavailable"
    assert "--clip-model" in metrics.metrics["clip_consistency"].reason
    check = metrics.gate.checks["clip_consistency"]
    assert (check.passed, check.value) == (None, None)
    assert "--clip-model" in check.reason
    assert metrics.gate.feasible == (metrics.gate.checks["sentinels"].passed is True)


def test_a_reference_of_other_libraries_must_show_the_same_picture(job, trial):
    trial.final_checkpoint.write_bytes(lora_bytes(12))
    root = job.root / "elsewhere"
    root.mkdir()
    shutil.copytree(trial.folder, root / "trial_0001")
    moved, there = Job(**{**vars(job), "root": root}), StudyLayout(root).trial(1)
    evaluate(moved, there)
    layout = StudyLayout(root).base_render(job.plan.digest())
    known = read_model(layout.metrics, Metrics)
    write_model(layout.metrics, known.model_copy(update={"library_versions": {"torch": "0.1"}}))
    (there.folder / "a.safetensors").write_bytes(lora_bytes(13))
    assert evaluate(moved, there)["a"].status == "recorded", "other versions, the same pixels"

    Image.fromarray(255 - picture(layout.sample(0))).save(layout.sample(0))
    (there.folder / "b.safetensors").write_bytes(lora_bytes(14))
    with pytest.raises(StudyMismatchError, match="first sample differs"):
        evaluate_trial(moved, there.folder, watch=False)
    state = read_model(there.evaluations.state, EvaluationState)
    assert "b" not in {r.checkpoint for r in state.checkpoints}, "not even an attempt"


# ------------------------------------------------------------------------------- faults of the machine, of nobody's


def moved_job(job: Job, tmp_path: Path, **changes: object) -> tuple[Job, TrialLayout]:
    """The job in a study folder of its own, with copies of its models that can be taken away."""
    models = {name: tmp_path / name for name in ("base_model", "clip_model")}
    for name, folder in models.items():
        shutil.copytree(getattr(job, name), folder)
    trial = StudyLayout(tmp_path / "study").trial(1)
    trial.folder.mkdir(parents=True)
    trial.intermediate_checkpoint(2).write_bytes(lora_bytes(30))
    return replace(job, root=tmp_path / "study", **{**models, **changes}), trial


@pytest.mark.parametrize("model", ["base_model", "clip_model"])
def test_a_model_that_is_lost_in_mid_study_leaves_no_trace_at_any_checkpoint(job, tmp_path, model):
    job, trial = moved_job(job, tmp_path)
    first = evaluate(job, trial)
    trial.final_checkpoint.write_bytes(lora_bytes(31))
    folder = getattr(job, model)
    folder.rename(tmp_path / "unmounted")
    for _ in range(3):
        with pytest.raises(ResourceError, match=re.escape(str(folder))) as raised:
            evaluate_trial(job, trial.folder, watch=False)
        assert "put" in str(raised.value)
    state = read_model(trial.evaluations.state, EvaluationState)
    assert {record.checkpoint: record for record in state.checkpoints} == first
    (tmp_path / "unmounted").rename(folder)
    record = evaluate(job, trial)[trial.final_checkpoint.stem]
    assert [attempt.outcome for attempt in record.attempts] == ["recorded"]
    gate = metrics_of(trial, record.checkpoint).gate
    assert gate.checks["clip_consistency"].limit is not None
    assert metrics_of(trial, record.checkpoint).metrics["clip_consistency"].status == "ok"


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        pytest.param(MemoryError(), ResourceError, id="memory"),
        pytest.param(RuntimeError("DefaultCPUAllocator: can't allocate memory"), ResourceError, id="torch's memory"),
        pytest.param(OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), DiskError, id="disk"),
        pytest.param(FileNotFoundError(errno.ENOENT, "No such file", "/tmp/x"), ResourceError, id="a file is gone"),
    ],
)
def test_faults_while_it_is_made_ready_are_no_checkpoints(job, trial, monkeypatch, fault, error):
    def fails(*arguments: object) -> None:
        raise fault

    trial.final_checkpoint.write_bytes(lora_bytes(32))
    monkeypatch.setattr("evaluator_daemon.resident.load_metrics", fails)
    with pytest.raises(error):
        evaluate_trial(job, trial.folder, watch=False)
    assert not trial.evaluations.state.exists()


def test_a_reference_folder_that_cannot_be_made_is_the_disks_fault(job, tmp_path):
    job, trial = moved_job(job, tmp_path)
    StudyLayout(job.root).reference.write_text("a file stands where the folder should be")
    with pytest.raises(DiskError, match="reference: could not be written"):
        evaluate_trial(job, trial.folder, watch=False)
    assert not trial.evaluations.state.exists()


@pytest.mark.parametrize(
    ("fault", "raised", "outcomes"),
    [
        pytest.param(StudyMismatchError("other pictures"), StudyMismatchError, [], id="the study"),
        pytest.param(SettingsError("--base-model", "x", "repair it"), SettingsError, [], id="the settings"),
        pytest.param(ResourceError("no card"), ResourceError, [], id="the device"),
        pytest.param(MemoryError(), ResourceError, [], id="the machine's memory"),
        pytest.param(Stopped(signal.SIGTERM), None, ["interruption"], id="a stop"),
    ],
)
def test_only_a_stop_is_an_interruption(job, trial, monkeypatch, fault, raised, outcomes):
    trial.intermediate_checkpoint(2).write_bytes(lora_bytes(33))
    evaluate(job, trial)
    trial.final_checkpoint.write_bytes(lora_bytes(34))

    def fails(model, *arguments, **options):
        raise fault

    for turn in range(1, 6 if raised is None else 3):
        service = Service()
        evaluator = Evaluator(job, TrialPlace(trial), service, lambda: None)
        monkeypatch.setattr(ResidentModel, "_judge", fails)
        if raised is None:
            view = evaluator.place.look(evaluator.memory.records, evaluator.plan_hash)
            with pytest.raises(Stopped):
                evaluator.evaluate(open_files(view)[0], view)
        else:
            with pytest.raises(raised):
                evaluator.tick(watch=False)
        record = evaluator.memory.records[-1]
        assert [attempt.outcome for attempt in record.attempts] == outcomes * turn
        assert (record.status, record.quarantine and record.quarantine.code) == (
            ("quarantined", "suspect") if turn == 5 else ("waiting", None)
        )


@pytest.mark.parametrize(
    ("code", "text"),
    [
        *((code, None) for code in (0, 2, 3, 4, 130, 143, -15, -9)),
        *((-7, "SIGBUS"), (-6, "SIGABRT"), (-11, "SIGSEGV"), (1, "status 1")),
    ],
)
def test_what_counts_as_a_crash(code, text):
    assert (crash_text(code) is None) is (text is None)
    assert text is None or text in crash_text(code)

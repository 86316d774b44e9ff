"""Which of the evaluator's records count, for files as they stand now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import scripted_evaluator
import scripted_trainer

from optimizer_daemon.results import summary_text
from optimizer_daemon.scores import ScoreReader
from shared.files import read_model, write_model
from shared.layout import StudyLayout, TrialLayout
from shared.planning import make_plan
from shared.safetensors_file import read_checkpoint
from shared.schemas import EvaluationState, Metrics, Quarantine, Run, Score, Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    base = tmp_path_factory.mktemp("base")
    for component, config in {"unet": {"sample_size": 8}, "vae": {"block_out_channels": [4]}}.items():
        (base / component).mkdir()
        (base / component / "config.json").write_text(json.dumps(config))
        (base / component / "w.safetensors").write_bytes(b"w")
    (base / "model_index.json").write_text(json.dumps({"unet": ["a", "b"], "vae": ["a", "b"]}))
    plan = make_plan(base_model=base, prompts=["a red ball"], device="cpu", num_samples=1)
    time = scripted_evaluator.datetime.now().astimezone()
    return Run(
        folder_id="a", study_name="s", storage="sqlite:///s.db", workload="sd-lora", score_source="evaluator",
        status="running", created=time, updated=time, plan=plan, plan_hash=plan.digest(),
        trainer=Trainer(name="scripted"), settings={}, threads_per_process=1, versions={},
    )  # fmt: skip


@pytest.fixture
def trial(tmp_path: Path) -> TrialLayout:
    trial = StudyLayout(tmp_path).trial(5)
    trial.folder.mkdir()
    trial.evaluations.folder.mkdir()
    return trial


def save(trial: TrialLayout, epoch: int | None, score: float = 0.5) -> Path:
    path = trial.final_checkpoint if epoch is None else trial.intermediate_checkpoint(epoch)
    path.write_bytes(scripted_trainer.lora(6 if epoch is None else epoch, score))
    return path


def record(trial: TrialLayout, run: Run, *paths: Path, **changes: object) -> None:
    records = []
    for path in paths:
        record = scripted_evaluator.record(trial, path, read_checkpoint(path, trial.folder), run)
        records.append(record.model_copy(update=changes))
    time = scripted_evaluator.datetime.now().astimezone()
    state = EvaluationState(trial_name=trial.name, updated=time, checkpoints=tuple(records))
    write_model(trial.evaluations.state, state)


def read(trial: TrialLayout, run: Run):
    return ScoreReader(run.plan_hash, "combined_score").read(trial, 6)


def test_a_trial_is_scored_when_its_final_and_every_other_complete_checkpoint_has_a_record(trial, run):
    first, second = save(trial, 2, 0.4), save(trial, 4, 0.3)
    record(trial, run, first)
    assert read(trial, run).scoring == "pending"
    final = save(trial, None, 0.2)
    record(trial, run, first, final)
    seen = read(trial, run)
    assert (seen.scoring, seen.seen, seen.recorded) == ("pending", 3, 2)
    assert [(point.epoch, point.value) for point in seen.curve] == [(2, 0.4)], "without a gap"
    record(trial, run, first, second, final)
    scores = read(trial, run)
    assert scores.scoring == "scored"
    assert (scores.final.value, scores.final.infeasible_because) == (0.2, None)
    assert [(point.epoch, point.value) for point in scores.curve] == [(2, 0.4), (4, 0.3), (6, 0.2)]


def test_half_a_file_is_no_checkpoint_yet(trial, run):
    final = save(trial, None)
    record(trial, run, final)
    half = trial.intermediate_checkpoint(2)
    half.write_bytes(final.read_bytes()[:-1])
    assert (read(trial, run).seen, read(trial, run).scoring) == (1, "scored")


@pytest.mark.parametrize("same_content", [True, False], ids=["the same content", "other content"])
def test_a_record_counts_for_the_same_content_only_whatever_the_file_s_time(trial, run, same_content):
    final = save(trial, None, 0.2)
    record(trial, run, final)
    content = final.read_bytes()
    final.unlink()
    final.write_bytes(content if same_content else scripted_trainer.lora(6, 0.9))
    assert read(trial, run).scoring == ("scored" if same_content else "pending")


def test_what_was_measured_under_another_plan_does_not_count(trial, run):
    record(trial, run, save(trial, None), plan_hash="0" * 64)
    assert read(trial, run).scoring == "pending"


def test_the_measurement_of_equal_content_stands_for_it(trial, run):
    first, final = save(trial, 2, 0.2), trial.final_checkpoint
    final.write_bytes(first.read_bytes())
    record(trial, run, first, final)
    records = list(read_model(trial.evaluations.state, EvaluationState).checkpoints)
    records[1] = records[1].model_copy(update={"same_as": first.stem})
    time = scripted_evaluator.datetime.now().astimezone()
    state = EvaluationState(trial_name=trial.name, updated=time, checkpoints=tuple(records))
    write_model(trial.evaluations.state, state)
    shutil.rmtree(trial.evaluations.checkpoint(final.stem).folder)
    assert read(trial, run).final.value == 0.2


def test_a_quarantined_final_cannot_be_scored_and_says_why(trial, run):
    final = save(trial, None)
    time = scripted_evaluator.datetime.now().astimezone()
    quarantine = Quarantine(code="not_finite", reason="tensor 'x' holds NaN", since=time)
    record(trial, run, final, status="quarantined", quarantine=quarantine)
    scores = read(trial, run)
    assert (scores.scoring, scores.reason) == ("unscorable", "tensor 'x' holds NaN")


def test_a_missing_objective_is_no_score_and_names_what_it_lacks(trial, run):
    final = save(trial, None)
    record(trial, run, final)
    render = trial.evaluations.checkpoint(final.stem)
    lacking = Score(value=None, direction="minimise", left_out=("clip_consistency",))
    metrics = read_model(render.metrics, Metrics).model_copy(update={"scores": {"combined_score": lacking}})
    write_model(render.metrics, metrics)
    scores = read(trial, run)
    assert scores.scoring == "unscorable"
    assert scores.reason == "combined_score could not be computed without clip_consistency"


@pytest.mark.parametrize(
    ("usual", "of_trial", "scoring", "reason"),
    [
        pytest.param((), ("clip_consistency",), "unscorable", "made without clip_consistency, which the study's other"),
        pytest.param(("lpips_diversity",), (), "unscorable", "made with lpips_diversity, which the base model's score"),
        pytest.param(("lpips_diversity",), ("lpips_diversity",), "scored", "", id="a study without it"),
        pytest.param(("base_difference",), (), "scored", "", id="the base has no difference from itself"),
    ],
)
def test_only_scores_made_of_what_the_base_model_s_is_made_of_count(trial, run, usual, of_trial, scoring, reason):
    first, final = save(trial, 2), save(trial, None)
    record(trial, run, first, final)
    metrics = read_model(trial.evaluations.checkpoint(final.stem).metrics, Metrics)

    def of_parts(left_out: tuple[str, ...], value: float) -> Metrics:
        score = Score(value=value, direction="minimise", left_out=left_out)
        return metrics.model_copy(update={"scores": {"combined_score": score}})

    base = StudyLayout(trial.folder.parent).base_render(run.plan_hash)
    base.folder.mkdir(parents=True)
    write_model(base.metrics, of_parts(usual, 0.5))
    write_model(trial.evaluations.checkpoint(final.stem).metrics, of_parts(of_trial, 0.05))
    scores = read(trial, run)
    assert scores.scoring == scoring
    assert reason in scores.reason
    assert (6 in [point.epoch for point in scores.curve]) is (scoring == "scored")


def test_a_damaged_state_is_the_evaluator_s_to_mend(trial, run):
    record(trial, run, save(trial, None))
    trial.evaluations.state.write_text("{")
    assert read(trial, run).scoring == "pending"


def test_a_failed_gate_keeps_the_value_and_is_told_in_words(trial, run, monkeypatch):
    monkeypatch.setenv("SCRIPTED_GATE", "5")
    record(trial, run, save(trial, None, 0.2))
    final = read(trial, run).final
    assert (final.value, final.infeasible_because) == (0.2, "image 0 is black")
    text = summary_text(final.metrics, run.plan.scoring)
    assert "Gate: FAILED" in text
    assert "sentinels            failed: image 0 is black" in text
    assert "combined_score       0.2000  (lower is better)" in text
    assert "brightness_std   0.0300    (goal 0.00-0.05: reached)" in text
    assert "contrast_std     0.0300    (goal 0.00-0.02: missed by 0.0100)" in text

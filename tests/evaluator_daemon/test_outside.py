"""evaluate FILE and compare: what is scored outside trials, what is refused, what is not rendered twice."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from evaluator_daemon.evaluator import evaluate_trial
from evaluator_daemon.verbs import compare, evaluate
from shared.errors import LabError, SettingsError, StudyMismatchError, UserError
from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.schemas import EvaluationPlan, EvaluationState, EvaluationSummary, LabelledPlan, Metrics, Run, Trainer
from tests.evaluator_daemon.tiny_models import PROMPTS, lora_bytes


class Lab:
    """A study folder without run.json, whose plan the flags make, and files beside it."""

    def __init__(self, folder: Path, base_model: Path) -> None:
        self.study = StudyLayout(folder / "study")
        self.study.root.mkdir()
        self.prompts = folder / "prompts.txt"
        self.prompts.write_text("\n".join(PROMPTS))
        self.base_model = base_model
        self.folder = folder

    def file(self, name: str, seed: int, **options: object) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(lora_bytes(seed, **options))
        return path

    def run(self, verb, *words: object, samples: int = 4) -> int:
        parser = argparse.ArgumentParser()
        run = verb.declare(parser)
        flags = ("--optimization-dir", self.study.root, "--base-model", self.base_model, "--prompts", self.prompts)
        device = ("--device", "cpu", "--num-samples", samples)
        return run(parser.parse_args([str(word) for word in (*words, *flags, *device)]))

    def metrics(self, label: str, checkpoint: str) -> Metrics:
        return read_model(self.study.evaluations(label).checkpoint(checkpoint).metrics, Metrics)


def run_of(plan: EvaluationPlan, base_model: Path) -> Run:
    time = datetime(2025, 11, 15, tzinfo=UTC)
    return Run(
        folder_id="f", study_name="s", storage="sqlite://", workload="sd-lora", score_source="evaluator",
        status="finished", created=time, updated=time, base_model=str(base_model), plan=plan, plan_hash=plan.digest(),
        trainer=Trainer(name="native"), settings={}, threads_per_process=1, versions={},
    )  # fmt: skip


@pytest.fixture
def lab(tmp_path, base_model) -> Lab:
    return Lab(tmp_path, base_model)


def written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("sample_*.png")}


def test_a_file_is_scored_under_its_own_label_read_in_place_and_only_once(lab, capsys):
    file = lab.file("My LoRA v2.safetensors", 1, epoch=7)
    before = file.stat()
    assert lab.run(evaluate, file, "--json") == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert (row["label"], row["checkpoint"], row["status"]) == ("my-lora-v2", "My LoRA v2", "recorded")
    assert row["epoch"] == 7
    found = lab.metrics("my-lora-v2", "My LoRA v2")
    assert row["scores"]["combined_score"] == found.scores["combined_score"].value
    assert found.trial_name == "my-lora-v2"
    planned = read_model(lab.study.evaluations("my-lora-v2").plan, LabelledPlan)
    assert planned.files == {"My LoRA v2": str(file)}
    assert planned.plan.digest() == found.plan_hash
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (before.st_mtime_ns, before.st_size)
    assert list(file.parent.glob("*.safetensors")) == [file]
    assert not list(lab.study.root.rglob("*.safetensors"))

    pictures = written(lab.study.evaluations("my-lora-v2").folder)
    assert len(pictures) == 4
    assert lab.run(evaluate, file) == 0
    assert "passed" in capsys.readouterr().out
    assert written(lab.study.evaluations("my-lora-v2").folder) == pictures


def test_the_base_model_alone_scores_as_its_reference(lab, capsys):
    assert lab.run(evaluate, "--base") == 0
    found = lab.metrics("base", "base")
    reference = read_model(lab.study.base_render(found.plan_hash).metrics, Metrics)
    assert found.scores == reference.scores
    assert found.checkpoint_sha256 is None
    records = read_model(lab.study.evaluations("base").state, EvaluationState).checkpoints
    assert [(record.checkpoint, record.status) for record in records] == [("base", "recorded")]


def test_several_files_under_one_label_have_a_best_and_a_bad_one_is_told(lab, capsys):
    files = [lab.file("a.safetensors", 1), lab.file("b.safetensors", 2), lab.file("bad.safetensors", 3)]
    files[2].write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert lab.run(evaluate, *files, "--label", "mine", "--json") == 3
    rows = {row["checkpoint"]: row for row in json.loads(capsys.readouterr().out)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "a": "recorded", "b": "recorded", "bad": "quarantined",
    }  # fmt: skip
    assert rows["bad"]["reason"]
    best = read_model(lab.study.evaluations("mine").summary, EvaluationSummary).best
    lower = min(("a", "b"), key=lambda name: rows[name]["scores"]["combined_score"])
    assert (best.checkpoint, best.score) == (lower, rows[lower]["scores"]["combined_score"])
    assert best.tie_set[0] == lower
    assert 0 < best.certainty <= 1


def test_files_that_would_share_a_place_and_other_plans_are_refused(lab):
    first, second = lab.file("one/x.safetensors", 1), lab.file("two/x.safetensors", 2)
    with pytest.raises(SettingsError, match="same label"):
        lab.run(evaluate, first, second)
    with pytest.raises(SettingsError, match="same name"):
        lab.run(evaluate, first, second, "--label", "both")
    assert not (lab.study.root / "evaluations").exists(), "refused before anything is written"
    lab.run(evaluate, first, samples=2)
    with pytest.raises(UserError, match=r"already holds x of .*one/x.safetensors"):
        lab.run(evaluate, second, samples=2)
    with pytest.raises(StudyMismatchError, match="num_samples is 2 there and 4 here"):
        lab.run(evaluate, first)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["missing.safetensors"], "that is there"),
        ([], "name .*safetensors files, --base, or a trial"),
        (["--base", "--label", "No/Label"], "small letters"),
        (["--base", "--watch"], "only a trial is waited for"),
        (["--base", "--trial", "x"], "leave --base out"),
    ],
)
def test_bad_words_are_refused(lab, words, says):
    with pytest.raises(LabError, match=says) as caught:
        lab.run(evaluate, *words)
    assert caught.value.exit_code == 2


@pytest.fixture(scope="module")
def trials(tmp_path_factory, base_model) -> Lab:
    """A trial with two recorded epochs and a second trial with a final that is not recorded."""
    from evaluator_daemon.job import find_job
    from evaluator_daemon.settings import EvaluatorSettings
    from shared.settings import add_settings_flags, load_settings

    lab = Lab(tmp_path_factory.mktemp("lab"), base_model)
    parser = argparse.ArgumentParser()
    add_settings_flags(parser, EvaluatorSettings)
    words = ["--base-model", lab.base_model, "--prompts", lab.prompts, "--device", "cpu", "--num-samples", "4"]
    job = find_job(load_settings(EvaluatorSettings, parser.parse_args([str(w) for w in words])), lab.study)
    first, second = lab.study.trial(1), lab.study.trial(2)
    for trial in (first, second):
        trial.folder.mkdir()
    first.intermediate_checkpoint(2).write_bytes(lora_bytes(1))
    first.final_checkpoint.write_bytes(lora_bytes(2, epoch=4))
    second.final_checkpoint.write_bytes(lora_bytes(3))
    evaluate_trial(job, first.folder, watch=False)
    lab.plan = job.plan
    return lab


def test_recorded_checkpoints_are_compared_without_rendering(trials, capsys):
    before = written(trials.study.root)
    assert trials.run(compare, "1@2", "trial_0001", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert written(trials.study.root) == before
    rows = {row["name"]: row for row in found["rows"]}
    folder = trials.study.trial(1).evaluations
    first, final = (
        read_model(folder.checkpoint(name).metrics, Metrics) for name in ("lora_trial_1-000002", "lora_trial_1")
    )
    score = rows["combined_score"]["differences"][0]
    expected = first.scores["combined_score"].value - final.scores["combined_score"].value
    assert score["interval"]["mean"] == pytest.approx(expected)
    assert score["interval"]["low"] < expected < score["interval"]["high"]
    bright = rows["brightness"]["differences"][0]["interval"]["mean"]
    assert bright == pytest.approx(first.metrics["brightness"].value - final.metrics["brightness"].value)
    assert found["pictures"] == 4
    assert rows["brightness"]["differences"][0]["verdict"] in ("differs", "cannot be told")


def test_what_is_not_recorded_is_evaluated_outside_the_trial_and_three_have_a_tie_set(trials, capsys):
    assert trials.run(compare, "1@best", "2", "base") == 0
    text = capsys.readouterr().out
    assert "gate of base: passed" in text
    assert "best combined_score:" in text
    assert trials.metrics("lora_trial_2", "lora_trial_2").trial_name == "lora_trial_2"
    assert not trials.study.trial(2).evaluations.folder.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["1", "1"], "at least two"),
        (["1", "9"], "names no trial, label or file .* its trials: trial_0001, trial_0002"),
        (["1", "1@3"], "has no checkpoint lora_trial_1-000003"),
        (["1", "1@latest"], "trial_0001@8 for an epoch"),
        (["1", "2@best"], "no recorded checkpoint that may win"),
        (["1", "2", "--label", "x"], "only --fresh"),
        (["1", "2", "--fresh", "1"], "from 2 up"),
    ],
)
def test_operands_that_mean_nothing_are_refused(trials, words, says):
    with pytest.raises(UserError, match=says):
        trials.run(compare, *words)


def test_different_plans_are_refused_with_the_fields(trials):
    other = trials.file("other.safetensors", 5)
    trials.run(evaluate, other, samples=2)
    with pytest.raises(StudyMismatchError, match="num_samples is 4 there and 2 here"):
        trials.run(compare, "1", "other")


def test_another_plan_needs_leave_and_then_stays_under_its_label(lab, capsys):
    lab.run(evaluate, lab.file("first.safetensors", 1), samples=2)
    frozen = read_model(lab.study.evaluations("first").plan, LabelledPlan).plan
    write_model(lab.study.run, run_of(frozen, lab.base_model))
    file = lab.file("second.safetensors", 2)
    with pytest.raises(StudyMismatchError, match=r"--num-samples is 4, but .* has 2; .*--override-plan"):
        lab.run(evaluate, file)
    assert not lab.study.evaluations("second").folder.exists()
    assert lab.run(evaluate, file, "--override-plan") == 0
    overridden = read_model(lab.study.evaluations("second").plan, LabelledPlan).plan
    assert (overridden.num_samples, frozen.num_samples) == (4, 2)
    assert overridden.model_copy(update={"num_samples": 2}) == frozen, "nothing else changes, the batch size neither"
    assert lab.metrics("second", "second").plan_hash == overridden.digest() != frozen.digest()


def test_finalists_are_rendered_anew_on_seeds_the_study_never_used_and_a_killed_comparison_goes_on(trials, capsys):
    assert trials.run(compare, "1@2", "1", "base", "--fresh", "6") == 0
    capsys.readouterr()
    finalists = trials.study.evaluations("finalists")
    plan = read_model(finalists.plan, LabelledPlan).plan
    used = {trials.plan.sample(i).seed for i in range(trials.plan.num_samples)}
    fresh = {plan.sample(i).seed for i in range(plan.num_samples)}
    assert plan.num_samples == 6
    assert not used & fresh
    assert {sample.seed for sample in trials.metrics("finalists", "lora_trial_1").samples} == fresh

    # as a kill leaves it: one of the three has no result yet
    state = read_model(finalists.state, EvaluationState)
    rest = tuple(record for record in state.checkpoints if record.checkpoint != "lora_trial_1")
    write_model(finalists.state, state.model_copy(update={"checkpoints": rest}))
    finalists.checkpoint("lora_trial_1").metrics.unlink()
    kept = written(finalists.checkpoint("lora_trial_1-000002").folder)
    assert trials.run(compare, "1@2", "1", "base", "--fresh", "6", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == 6
    assert written(finalists.checkpoint("lora_trial_1-000002").folder) == kept
    assert found["best"]["checkpoint"] in ("1@2", "1", "base")

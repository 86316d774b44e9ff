"""What a study found, read from its folder: whole, live, with one or no complete trial, and with damaged files."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from optimizer_daemon.analysis.facts import StudyFacts
from optimizer_daemon.analysis.gather import gather
from optimizer_daemon.results import winner
from shared.errors import UserError
from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.schemas import Answer, BestParameters, EvaluationState, TrialState
from tests.scenarios.measured_study import BEGIN, Written, brightness_of, write_study

THREE = Written()


def found(folder, written: Written = THREE) -> tuple[StudyLayout, StudyFacts]:
    study = write_study(folder / "study", written, storage=False)
    return study, gather(study, BEGIN)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[StudyLayout, StudyFacts]:
    return found(tmp_path_factory.mktemp("facts"), Written(trials=4, states={4: "failed"}, baselines={"v6": 0.1}))


def test_each_checkpoint_has_its_epoch_its_scores_and_the_seeds_figures_with_their_spread(plain):
    study, facts = plain
    trial = facts.trial(2)
    assert [(c.name, c.epoch) for c in trial.checkpoints] == [
        ("lora_trial_2-000002", 2), ("lora_trial_2-000004", 4), ("lora_trial_2", 6)
    ]  # fmt: skip
    assert trial.final is trial.checkpoints[-1]
    for checkpoint, point in zip(trial.checkpoints, trial.curve, strict=True):
        assert checkpoint.mean("brightness") == pytest.approx(brightness_of(2, checkpoint.epoch, THREE), abs=0.004)
        assert checkpoint.std("brightness") == pytest.approx(0.018, abs=0.002)
        assert checkpoint.score == point.value
        assert checkpoint.pictures[0][1] == study.trial(2).evaluations.checkpoint(checkpoint.name).sample(0)
    assert trial.value == trial.final.score == read_model(study.trial(2).state, TrialState).value
    assert trial.took_s == 2400 and trial.training_s == 1800


def test_the_ranking_and_the_winner_are_those_of_the_results(plain):
    study, facts = plain
    assert [trial.number for trial in facts.ranking] == [1, 2, 3]
    assert facts.winner.number == winner(facts.results).trial
    assert facts.winner.number == read_model(study.results.best_parameters, BestParameters).trial
    assert [(trial.number, trial.state.reason) for trial in facts.failures] == [(4, "the failed trial's reason")]
    assert facts.problems == ()


def test_a_clear_winner_stands_alone_and_the_pictures_say_how_sure_that_is(plain):
    _, facts = plain
    assert facts.standing.tied == (1,)
    assert facts.standing.certainty > 0.99
    assert (facts.standing.compared, facts.standing.pictures) == (3, 8)


def test_trials_that_differ_by_less_than_the_noise_are_tied_and_nobody_is_sure(tmp_path):
    _, facts = found(tmp_path, replace(THREE, step=0.0005, noise=0.01))
    assert set(facts.standing.tied) == {1, 2, 3}
    assert facts.standing.certainty < 0.9


def test_base_and_baselines_are_held_against_the_winner_with_an_interval(plain):
    _, facts = plain
    assert set(facts.against) == {"base model", "v6"}
    row = next(row for row in facts.against["base model"].rows if row.name == "combined_score")
    # compare holds the first side against the second, the reference
    (difference,) = row.differences
    assert difference.side == "trial 1" and difference.verdict == "better"
    gap = facts.winner.final.score - facts.base.score
    assert difference.interval.mean == pytest.approx(gap)
    assert difference.interval.low < gap < difference.interval.high < 0


def test_an_earlier_checkpoint_that_beats_the_final_one_is_named_with_its_file(tmp_path):
    _, facts = found(tmp_path, replace(THREE, shift={(1, 4): -0.0085}))
    (one,) = facts.overtaken
    assert (one.trial, one.better.name, one.final.name) == (1, "lora_trial_1-000004", "lora_trial_1")
    assert one.better.weights.name == "lora_trial_1-000004.safetensors" and one.tied == ("lora_trial_1-000004",)
    trial, checkpoint = facts.best_checkpoint
    assert (trial.number, checkpoint.name) == (1, "lora_trial_1-000004")


def test_the_seeds_four_rates_count_what_they_say(tmp_path):
    written = Written(
        trials=8, step=0.03, states={6: "failed", 7: "pruned", 8: "training"}, black=(2,), base_shift=0.045,
        noise=0.0001,
    )  # fmt: skip
    study, _ = found(tmp_path, written)
    folder = study.requests("optimizer")
    folder.mkdir(parents=True)
    refused = Answer(request="r.json", kind="enqueue", ok=False, error="it breaks a rule", answered=BEGIN)
    write_model(folder / "a.done.json", refused)
    facts = gather(study, BEGIN)
    counted = {rate.name: (rate.count, rate.of) for rate in facts.rates}
    assert counted == {
        "rejected": (1, 9),
        "stable": (4, 6),  # trial 2 is black, trial 6 failed
        "quality failure": (4, 6),  # trial 2 is black; 3, 4 and 5 are brighter than the base model
        "optimal": (1, 6),  # trial 2 would be the other one within 0.05 of 0.5
    }


def test_goals_are_held_against_every_checkpoint(plain):
    _, facts = plain
    goals = {goal.figure: goal for goal in facts.winner.final.goals}
    assert set(goals) == {"brightness", "contrast", "brightness_std", "contrast_std"}
    assert goals["brightness"].reached and goals["brightness"].verdict == "reached"
    far = {goal.figure: goal for goal in facts.base.goals}["brightness"]
    assert far.missed_by == pytest.approx(facts.base.mean("brightness") - 0.55)
    assert far.verdict.startswith("missed by 0.2")


@pytest.mark.parametrize(
    ("written", "winner", "says"),
    [
        pytest.param(Written(trials=0), None, None, id="no trial"),
        pytest.param(Written(trials=1), 1, (1,), id="one complete trial"),
        pytest.param(Written(trials=2, states={1: "training", 2: "drawn"}), None, None, id="only trials under way"),
        pytest.param(Written(trials=1, black=(1,)), None, None, id="one trial that failed its gate"),
        pytest.param(Written(trials=2, pictures=1), 1, (1, 2), id="one picture each"),
        pytest.param(Written(trials=2, base_shift=None), 1, (1,), id="no base model yet"),
    ],
)
def test_a_study_with_little_in_it_is_told_as_it_is(tmp_path, written, winner, says):
    _, facts = found(tmp_path, written)
    assert (facts.winner.number if facts.winner else None) == winner
    assert (facts.standing.tied if facts.standing else None) == says
    assert facts.problems == ()


def test_with_one_picture_nothing_is_sure_and_the_reason_is_given(tmp_path):
    _, facts = found(tmp_path, Written(trials=2, pictures=1))
    assert facts.standing.certainty is None and facts.standing.why_not == "too few pictures to tell"


@pytest.mark.parametrize(
    ("file", "trials"),
    [
        ("run.json", [1, 2, 3]),
        ("trial_0002/params.json", [1, 3]),
        ("trial_0002/trial_state.json", [1, 3]),
        ("trial_0002/realtime_evaluations/evaluation_state.json", [1, 2, 3]),
        ("trial_0002/realtime_evaluations/lora_trial_2/metrics.json", [1, 2, 3]),
        ("trial_0002/trainer_exit.json", [1, 2, 3]),
    ],
)
@pytest.mark.parametrize("damage", ["half", "gone"])
def test_a_damaged_file_is_named_and_a_lost_one_where_it_is_missed(tmp_path, file, trials, damage):
    study, _ = found(tmp_path)
    path = study.root / file
    path.write_bytes(path.read_bytes()[:100])
    if damage == "gone":
        path.unlink()
    facts = gather(study, BEGIN)
    assert [trial.number for trial in facts.trials] == trials
    optional = damage == "gone" and path.name in ("evaluation_state.json", "trainer_exit.json")
    assert [str(path) in problem for problem in facts.problems] == [] if optional else [True]
    assert facts.trial(3).final.score == facts.trial(3).value
    if file.endswith(("evaluation_state.json", "lora_trial_2/metrics.json")):
        assert facts.trial(2).final.score == facts.trial(2).value  # from the results themselves


def test_checkpoints_of_an_attempt_that_was_set_aside_and_of_another_plan_do_not_count(tmp_path):
    study, _ = found(tmp_path, Written(trials=2, states={1: "training"}))
    (study.trial(1).folder / "lora_trial_1-000002.safetensors").unlink()
    state = read_model(study.trial(2).evaluations.state, EvaluationState)
    first, *others = state.checkpoints
    other_plan = first.model_copy(update={"plan_hash": "f" * 64})
    write_model(study.trial(2).evaluations.state, state.model_copy(update={"checkpoints": (other_plan, *others)}))
    facts = gather(study, BEGIN)
    assert [c.epoch for c in facts.trial(1).checkpoints] == [4]
    assert [c.epoch for c in facts.trial(2).checkpoints] == [4, 6]


def test_a_deleted_weight_file_leaves_its_figures(tmp_path):
    study, _ = found(tmp_path)
    (study.trial(2).folder / "lora_trial_2-000002.safetensors").unlink()
    first = gather(study, BEGIN).trial(2).checkpoints[0]
    assert first.epoch == 2 and first.weights is None


def test_an_empty_folder_is_no_study(tmp_path):
    with pytest.raises(UserError, match="holds no study"):
        gather(StudyLayout(tmp_path), BEGIN)


def test_gathering_changes_nothing(tmp_path):
    study, _ = found(tmp_path)
    shutil.copytree(study.root, tmp_path / "before")
    gather(study, BEGIN)
    copy = tmp_path / "before"
    before = {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert {p.relative_to(study.root): p.read_bytes() for p in study.root.rglob("*") if p.is_file()} == before

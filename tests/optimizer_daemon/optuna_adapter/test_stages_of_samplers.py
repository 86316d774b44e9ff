"""Every sampler keeps to its stage, learns from the stages before, and draws the same after a restart."""

from __future__ import annotations

from random import Random

import optuna
import pytest
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from optimizer_daemon.optuna_adapter.draws import DRAW
from optimizer_daemon.optuna_adapter.feasible import distribution_of
from optimizer_daemon.optuna_adapter.models import SAMPLERS
from optimizer_daemon.optuna_adapter.sampler import FeasibleSampler
from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.optuna_adapter.trust_region import region_of
from optimizer_daemon.search.load import load_space
from optimizer_daemon.search.space import SearchSpace, parse_space
from optimizer_daemon.search.stages_file import parse_stages

ONE = (StudyDirection.MINIMIZE,)
STAGES = """
[[stages]]
name = "coarse"
trials = 12
epochs = 8
[[stages]]
name = "fine"
trials = 20
epochs = 12
[stages.parameters.learning_rate]
low = 8e-5
high = 1e-4
[stages.parameters.network_dim]
choices = [128]
[stages.parameters.lr_warmup_steps]
low = 100
[[stages]]
name = "near"
trials = 5
epochs = 16
around_best = 2
"""


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space("v2.1")


@pytest.fixture(scope="module")
def stages(space):
    return parse_stages(STAGES, "s.toml", space)


def trial(space: SearchSpace, values: dict, stage: str, value: float, gate: float = -1.0) -> FrozenTrial:
    known = {name: given for name, given in values.items() if name != "max_train_epochs"}
    return create_trial(
        state=TrialState.COMPLETE,
        value=value,
        params=known,
        distributions={name: distribution_of(space.parameters[name]) for name in known},
        user_attrs={DRAW: {"stage": stage, "values": values}},
        constraints={"gate": gate},
    )


@pytest.fixture
def study(space, stages) -> optuna.Study:
    """Twelve trials of the coarse stage, most of them outside the fine one."""
    made = optuna.create_study()
    for seed in range(12):
        values = stages[0].space.draw(Random(seed))
        made.add_trial(trial(space, values, "coarse", seed / 10))
    return made


def asked(study: optuna.Study) -> FrozenTrial:
    study = optuna.create_study()
    made = study.ask()
    return study.trials[made.number]


def draw(sampler: FeasibleSampler, study: optuna.Study, number: int) -> dict:
    frozen = asked(study)
    frozen.number = number
    return sampler.draw(study, frozen)


@pytest.mark.parametrize("name", SAMPLERS.names)
def test_no_draw_of_a_stage_leaves_it_and_a_restart_changes_none(study, stages, name):
    fine = stages[1]
    for number in range(12, 14 if name in ("gp", "auto") else 24):
        values, again = (draw(FeasibleSampler(fine, 3, SAMPLERS.load(name)), study, number) for _ in range(2))
        assert values == again
        assert fine.space.validate(values) == []
        assert 8e-5 <= values["learning_rate"] <= 1e-4
        assert (values["network_dim"], values["max_train_epochs"]) == (128, 12)
        assert values["lr_warmup_steps"] >= 100
        assert (
            fine.declared.with_parameters({"max_train_epochs": fine.space.parameters["max_train_epochs"]}).validate(
                values
            )
            == []
        )


def test_optuna_sees_the_declared_ranges_in_every_stage(tmp_path, space, stages):
    url = f"sqlite:///{tmp_path / 's.db'}"
    opened = TuningStudy.open("s", url, space, seed=1, folder_id="a", stage=stages[0])
    first = opened.ask()
    opened.tell_complete(first.number, 0.5, None)
    opened.stage = stages[1]
    second = opened.ask()
    assert (first.stage, second.stage) == ("coarse", "fine")
    stored = optuna.load_study(study_name="s", storage=url).trials
    assert stored[0].distributions == stored[1].distributions
    assert "max_train_epochs" not in stored[1].params
    assert stored[1].params == {name: value for name, value in second.values.items() if name != "max_train_epochs"}


def test_most_draws_stay_near_the_best_and_a_seventh_goes_anywhere(study, stages, space):
    best = [study.trials[0].user_attrs[DRAW]["values"], study.trials[1].user_attrs[DRAW]["values"]]
    trials = study.trials
    regions = [region_of(stages[2], trials, ONE, Random(seed)) for seed in range(1000)]
    whole = [region for region in regions if region is stages[2].space]
    assert len(whole) == pytest.approx(150, abs=35)
    near = [region for region in regions if region is not stages[2].space]
    centres = set()
    for region in near:
        low, high = region.parameters["learning_rate"].low, region.parameters["learning_rate"].high
        inside = [place for place, values in enumerate(best) if low <= values["learning_rate"] <= high]
        assert inside, "around one of the best two"
        assert high / low <= 2**0.25 * 1.0001, "an eighth of the logarithmic range to either side"
        assert set(region.parameters["network_dim"].choices) <= {values["network_dim"] for values in best}
        centres.update(inside)
        assert region.validate(region.draw(Random(0))) == []
    assert centres == {0, 1}


def test_only_feasible_trials_of_earlier_stages_are_centres(study, stages, space):
    values = {**stages[2].space.draw(Random(99)), "learning_rate": 1.19e-4}
    study.add_trial(trial(space, values, "near", -5.0))
    study.add_trial(trial(space, values, "coarse", -4.0, gate=1.0))
    for seed in range(50):
        region = region_of(stages[2], study.trials, ONE, Random(seed))
        best = [known.user_attrs[DRAW]["values"]["learning_rate"] for known in study.trials[:2]]
        rate = region.parameters["learning_rate"]
        assert any(rate.low <= known <= rate.high for known in best)


def test_without_any_trial_before_or_a_feasible_one_near_the_whole_stage_is_drawn_from(stages):
    near = stages[2]
    assert region_of(near, [], ONE, Random(1)) is near.space
    space = parse_space(
        'name = "x"\n[parameters.x]\ntype = "int"\nlow = 0\nhigh = 10\n[parameters.max_train_epochs]\n'
        'type = "categorical"\nchoices = [1, 2]\n[[constraints]]\nwhen = "x < 5 and max_train_epochs > 1"\n'
        'reason = "too long"\n',
        "x.toml",
    )
    first, second = parse_stages(
        '[[stages]]\nname = "a"\ntrials = 1\nepochs = 1\n[[stages]]\nname = "b"\ntrials = 1\nepochs = 2\n'
        "around_best = 1\n",
        "s.toml",
        space,
    )
    assert (first.space.parameters["x"].low, second.space.parameters["x"].low) == (0, 5)
    centre = trial(space, {"x": 0, "max_train_epochs": 1}, "a", 0.1)
    # its nearest value in the second stage is 5, one step from it 6
    regions = {str(region_of(second, [centre], ONE, Random(seed)).parameters["x"]) for seed in range(50)}
    assert regions == {"5..6 step 1", "5..10 step 1"}

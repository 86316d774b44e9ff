"""A warm-up takes at most half of a training: the rule that a study makes of its data set and keeps."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from optimizer_daemon.enqueue import Queue
from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.search.load import load_space
from optimizer_daemon.search.space import parse_space
from optimizer_daemon.search.stage import Stage
from optimizer_daemon.settings import OptimizerSettings
from optimizer_daemon.warm_up import NotCountedError, rule_of_study, warm_up_rule, with_rule
from shared.errors import StudyMismatchError, UserError
from shared.layout import StudyLayout
from shared.schemas import Enqueue

EARLIER = Path(__file__).parents[1] / "data/formats/v1_earlier/run.json"
SPACE = """
name = "small"
[parameters.gradient_accumulation_steps]
type = "categorical"
choices = [1, 2]
[parameters.max_train_epochs]
type = "categorical"
choices = [2, 4]
[parameters.lr_warmup_steps]
type = "int"
low = 10
high = 40
step = 10
"""
HALF = "A warm-up takes at most half of all optimizer steps"


@pytest.fixture
def space():
    return parse_space(SPACE, "space.toml")


def dataset(folder: Path, text: str, **pictures: int) -> Path:
    for name, count in pictures.items():
        (folder / name).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8)).save(folder / name / f"{number}.png")
    (folder / "dataset.toml").write_text(text)
    return folder / "dataset.toml"


PLAIN = """
[general]
num_repeats = 2
[[datasets]]
batch_size = 4
[[datasets.subsets]]
image_dir = "a"
"""


def test_steps_are_pictures_by_repeats_batch_accumulation_and_epochs(tmp_path, space):
    rule = warm_up_rule(space, dataset(tmp_path, PLAIN, a=23), "native", {})
    assert rule is not None
    # 46 pictures are 12 batches; 2 epochs of them 24 steps, with an accumulation of 2 every other
    assert rule.when == "2 * lr_warmup_steps > -(-(12) // gradient_accumulation_steps) * max_train_epochs"
    held = with_rule(space, rule)
    safe = {"gradient_accumulation_steps": 1, "max_train_epochs": 2, "lr_warmup_steps": 10}
    assert held.validate(safe) == []
    assert held.validate({**safe, "lr_warmup_steps": 20}) == [f"{HALF} (here of 12 batches an epoch)"]
    assert held.validate({**safe, "lr_warmup_steps": 20, "max_train_epochs": 4}) == []
    assert held.validate({**safe, "gradient_accumulation_steps": 2}) != []
    drawn = [Stage.of(held).space.draw(Random(seed)) for seed in range(300)]
    steps = [12 // known["gradient_accumulation_steps"] * known["max_train_epochs"] for known in drawn]
    assert all(2 * known["lr_warmup_steps"] <= count for known, count in zip(drawn, steps, strict=True))


@pytest.mark.parametrize(
    ("text", "options", "when"),
    [
        pytest.param(
            PLAIN.replace("batch_size = 4", ""), {}, "-(-(20) // gradient_accumulation_steps)", id="the batch is one"
        ),
        pytest.param(
            PLAIN.replace("batch_size = 4", ""),
            {"train_batch_size": 3},
            "-(-(-(-20 // 3)) // gradient_accumulation_steps)",
            id="the table says the batch",
        ),
        pytest.param(
            PLAIN.replace("batch_size = 4", "batch_size = 4\nvalidation_split = 0.3"), {}, "-(-(4) //", id="validation"
        ),
        pytest.param(
            PLAIN + '[[datasets.subsets]]\nimage_dir = "b"\nis_reg = true\n', {}, "-(-(10) //", id="regularisation"
        ),
        pytest.param(
            PLAIN + '[[datasets]]\nbatch_size = 1\n[[datasets.subsets]]\nimage_dir = "b"\nnum_repeats = 5\n',
            {},
            "-(-(15) //",
            id="two data sets",
        ),
    ],
)
def test_what_counts_of_a_data_set(tmp_path, space, text, options, when):
    rule = warm_up_rule(space, dataset(tmp_path, text, a=10, b=2), "native", options)
    assert rule is not None
    assert when in rule.when
    with_rule(space, rule)  # it is in the language


def test_a_drawn_batch_size_and_a_fixed_number_of_epochs_are_part_of_the_rule(tmp_path):
    space = parse_space(
        SPACE.replace("gradient_accumulation_steps", "train_batch_size").replace("max_train_epochs", "other"), "s.toml"
    )
    path = dataset(tmp_path, PLAIN.replace("batch_size = 4", ""), a=10)
    options = {"gradient_accumulation_steps": 2, "max_train_epochs": 7}
    rule = warm_up_rule(space, path, "kohya", options)
    assert rule is not None
    assert rule.when == "2 * lr_warmup_steps > -(-(-(-20 // train_batch_size)) // 2) * 7"
    params = {"train_batch_size": 1, "other": 2, "lr_warmup_steps": 40}
    assert with_rule(space, rule).validate(params) != []  # 20 pictures, 10 steps, 7 epochs: 70
    assert with_rule(space, rule).validate({**params, "lr_warmup_steps": 30}) == []


def test_a_space_that_draws_no_warm_up_has_no_such_rule(tmp_path):
    space = parse_space(SPACE.replace("lr_warmup_steps", "steps"), "s.toml")
    assert warm_up_rule(space, tmp_path / "none.toml", "native", {}) is None
    assert with_rule(space, None) is space


@pytest.mark.parametrize(
    ("text", "trainer", "why"),
    [
        pytest.param("", "native", "has no [[datasets]] of kohya's", id="another program's"),
        pytest.param("datasets = 3", "native", "is no data set of kohya's", id="no tables"),
        pytest.param("[[datasets]]\n", "native", "is no data set of kohya's ('subsets')", id="no subsets"),
        pytest.param("a b", "native", "cannot be read", id="no TOML"),
        pytest.param(PLAIN.replace('"a"', '"gone"'), "native", "cannot be read", id="no folder"),
        pytest.param(PLAIN.replace("batch_size = 4", ""), "command", "sets no batch_size", id="an unknown batch size"),
    ],
)
def test_where_steps_cannot_be_counted_it_says_why(tmp_path, space, text, trainer, why):
    with pytest.raises(NotCountedError) as caught:
        warm_up_rule(space, dataset(tmp_path, text, a=2), trainer, {})
    assert why in str(caught.value)


def test_a_study_of_an_earlier_version_goes_on_without_the_rule_and_a_new_one_has_it(tmp_path, space):
    path = dataset(tmp_path, PLAIN, a=23)
    settings = OptimizerSettings(dataset_config=path, trainer="native")
    study = StudyLayout(tmp_path / "study")
    rule, why = rule_of_study(settings, study, space)
    assert (rule, why) == (warm_up_rule(space, path, "native", {}), None)
    study.root.mkdir()
    shutil.copy(EARLIER, study.run)
    assert rule_of_study(settings, study, space) == (None, None)
    path.unlink()
    assert rule_of_study(settings, StudyLayout(tmp_path / "new"), space)[1].startswith(f"{path} cannot be read")


def test_where_every_warm_up_is_too_long_the_smallest_is_kept_and_the_other_rules_hold(tmp_path):
    v2_1 = load_space("v2.1")
    held = with_rule(v2_1, warm_up_rule(v2_1, dataset(tmp_path, PLAIN, a=2), "native", {}))
    stage = Stage.of(held, name="tiny", pinned={"max_train_epochs": 16})
    assert [(known.parameter, known.value) for known in stage.spared] == [("lr_warmup_steps", 50)]
    assert HALF in stage.spared[0].reason
    assert [known.value for known in stage.dropped if known.parameter == "lr_warmup_steps"] == [100, 150, 200]
    drawn = [stage.space.draw(Random(seed)) for seed in range(50)]
    assert {known["lr_warmup_steps"] for known in drawn} == {50}
    assert all(v2_1.is_feasible({**known, "max_train_epochs": 16}) for known in drawn)


def test_with_rules_that_leave_nothing_either_way_the_space_is_refused(tmp_path, space):
    never = SPACE + "[[constraints]]\nwhen = \"lr_warmup_steps < 20\"\nreason = 'too short'\n"
    space = parse_space(never, "s.toml")
    held = with_rule(space, warm_up_rule(space, dataset(tmp_path, PLAIN, a=2), "native", {}))
    with pytest.raises(UserError, match="none of 10,000 draws is feasible"):
        Stage.of(held)


def test_an_enqueued_configuration_is_refused_with_the_reason_and_the_study_keeps_the_rule(tmp_path, space):
    held = with_rule(space, warm_up_rule(space, dataset(tmp_path, PLAIN, a=23), "native", {}))
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = TuningStudy.open("s", url, held, seed=1, folder_id="a")
    with pytest.raises(UserError, match=HALF):
        Queue(study, 1).add(
            Enqueue(kind="enqueue", parameters={"lr_warmup_steps": 40, "gradient_accumulation_steps": 2}), "one"
        )
    assert study.trial_count == 0
    study.close()
    with pytest.raises(StudyMismatchError, match="constraint 1"):
        TuningStudy.open("s", url, space, seed=1, folder_id="a")

"""What may be asked of a study, on real request files and a real database; the daemon itself is elsewhere."""

from __future__ import annotations

import pytest

from optimizer_daemon.commands import RequestDesk, changed_settings
from optimizer_daemon.enqueue import Queue
from optimizer_daemon.finalists import fresh_seed
from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.recovery import params_of
from optimizer_daemon.search.space import parse_space
from optimizer_daemon.search.stage import Stage
from optimizer_daemon.settings import OptimizerSettings
from shared.errors import SettingsError, UserError
from shared.layout import StudyLayout
from shared.requests import RequestFolder
from shared.schemas import Analyze, Enqueue, Pause, Resume, Set, Stop

SPACE = """
name = "small"
[parameters.rate]
type = "float"
low = 1e-5
high = 1e-3
log = true
[parameters.dim]
type = "categorical"
choices = [4, 8, 16]
[parameters.max_train_epochs]
type = "int"
low = 2
high = 8
[start_up]
parameter = "rate"
strata = [
    { low = 1e-5, high = 1e-4, weight = 0.5 },
    { low = 1e-4, high = 1e-3, weight = 0.5 },
]
[derived]
alpha = "int(dim * 0.5)"
[[constraints]]
when = "dim >= 8 and rate > 1e-4"
reason = "too hot"
"""


@pytest.fixture
def queue(tmp_path) -> Queue:
    space = parse_space(SPACE, "test.toml")
    study = TuningStudy.open("small", f"sqlite:///{tmp_path / 'study.db'}", space, seed=1, folder_id="a")
    return Queue(study, 1)


@pytest.fixture
def folder(tmp_path) -> RequestFolder:
    return RequestFolder(StudyLayout(tmp_path), "optimizer")


def enqueue(**parameters: object) -> Enqueue:
    return Enqueue.model_validate({"kind": "enqueue", "parameters": parameters})


def test_what_is_enqueued_comes_before_any_draw_and_in_order(queue):
    assert queue.add(enqueue(rate=2e-5, dim=8, max_train_epochs=4), "one") == 1
    assert queue.add(enqueue(dim=16), "two") == 2
    assert queue.study.queued == 2
    first, second, third = (queue.study.ask() for _ in range(3))
    assert (first.values, first.enqueued) == ({"rate": 2e-5, "dim": 8, "max_train_epochs": 4}, True)
    assert (second.values["dim"], second.enqueued, queue.study.stage.declared.validate(second.values)) == (16, True, [])
    assert (third.number, third.enqueued, queue.study.queued) == (2, False, 0)


def test_a_finalist_repeats_a_complete_trial_whole_and_with_a_seed_of_its_own(queue):
    first, _ = queue.study.ask(), queue.study.ask()
    queue.study.tell_complete(0, 0.5, None)
    asked = {"kind": "enqueue", "finalist_of": 1}
    assert queue.add(Enqueue.model_validate(asked), "again") == 3
    assert queue.add(Enqueue.model_validate({**asked, "parameters": {"dim": first.values["dim"]}}), "checked") == 4
    draw = queue.study.ask()
    assert (draw.values, draw.finalist_of) == (first.values, 0)
    params = params_of(draw, queue.study.stage.declared, 1)
    assert (params.origin, params.finalist_of, params.training_seed) == ("finalist", 1, fresh_seed(1, 2))
    given = queue.add(Enqueue.model_validate({**asked, "training_seed": 5}), "seeded")
    queue.study.ask()
    assert params_of(queue.study.ask(), queue.study.stage.declared, 1).training_seed == given == 5


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        pytest.param({"finalist_of": 2}, "no complete trial 2", id="it has no score"),
        pytest.param({"finalist_of": 9}, "no complete trial 9", id="there is none"),
        pytest.param({"finalist_of": 1, "parameters": {"dim": 5, "rate": 1}}, "other values than dim 5, rate 1",
                     id="with other values"),
    ],
)  # fmt: skip
def test_a_finalist_of_nothing_measured_is_refused(queue, asked, message):
    queue.study.ask(), queue.study.ask()
    queue.study.tell_complete(0, 0.5, None)
    with pytest.raises(UserError, match=message):
        queue.add(Enqueue.model_validate({"kind": "enqueue", **asked}), "bad")
    assert queue.study.queued == 0


def test_a_repeated_request_has_one_trial_whatever_became_of_it(queue):
    number = queue.add(enqueue(dim=4), "same")
    assert queue.add(enqueue(dim=4), "same") == number
    draw = queue.study.ask()
    assert queue.add(enqueue(dim=4), "same") == number == draw.number + 1
    queue.study.tell_complete(draw.number, 0.5, None)
    assert queue.add(enqueue(dim=4), "same") == number
    assert queue.study.trial_count == 1


@pytest.mark.parametrize(
    ("parameters", "pinned", "says"),
    [
        pytest.param({"colour": "red"}, {}, "there is no parameter colour; the parameters are rate, dim", id="unknown"),
        pytest.param({"rate": 0.1}, {}, "rate: ", id="out of its range"),
        pytest.param({"rate": "high"}, {}, "rate: ", id="of another kind"),
        pytest.param({"rate": 5e-4, "dim": 8, "max_train_epochs": 2}, {}, "too hot", id="a whole one breaks a rule"),
        pytest.param({"rate": 5e-4, "dim": 8}, {}, "too hot", id="nothing can be drawn around it"),
        pytest.param(
            {"dim": 4, "alpha": 3}, {}, "alpha: 3 is not int(dim * 0.5), which is 2", id="a wrong derived one"
        ),
        pytest.param(
            {"max_train_epochs": 3}, {"max_train_epochs": 12}, "3 is not one of 12", id="against --max-epochs"
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason_and_stores_nothing(queue, parameters, pinned, says):
    queue.study.stage = Stage.of(queue.study.stage.declared, pinned=pinned)
    with pytest.raises(UserError) as caught:
        queue.add(enqueue(**parameters), "id")
    assert says in str(caught.value)
    assert queue.study.trial_count == 0


def test_a_pinned_value_may_lie_outside_its_range_and_need_not_be_repeated(queue):
    queue.study.stage = Stage.of(queue.study.stage.declared, pinned={"max_train_epochs": 12})
    queue.add(enqueue(dim=4), "id")
    assert queue.study._study.trials[0].user_attrs["draw"]["values"]["max_train_epochs"] == 12


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"seed": 7}, "set seed: 7 will not do; only n-trials and timeout can change", id="frozen"),
        pytest.param({"colour": "red"}, "only n-trials and timeout can change", id="unknown"),
        pytest.param({"n-trials": 0}, "set n-trials: 0 will not do; input should be greater than", id="too small"),
        pytest.param({"n-trials": 2.5}, "set n-trials: 2.5 will not do", id="no whole number"),
        pytest.param({"n-trials": True}, "write a number", id="no number"),
        pytest.param({"timeout": "long"}, "set timeout: 'long' will not do", id="text"),
        pytest.param({"n-trials": 9, "timeout": -1}, "set timeout", id="the second of two"),
    ],
)
def test_a_setting_that_cannot_change_is_refused_with_its_value(changes, says):
    with pytest.raises(SettingsError) as caught:
        changed_settings(OptimizerSettings(), changes)
    assert says in str(caught.value)


def test_settings_change_by_flag_name():
    changed = changed_settings(OptimizerSettings(), {"n-trials": 9, "timeout": 60})
    assert (changed.n_trials, changed.timeout) == (9, 60.0)


class NeverRefreshes:
    """Results that nobody has asked for."""

    def request(self, top_n: int) -> int:
        raise AssertionError(f"an analysis of the best {top_n}")


class Refresh:
    """A refresh whose runs end when the test says so."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.ended: dict[int, int] = {}

    def request(self, top_n: int) -> int:
        self.asked.append(top_n)
        return len(self.asked)

    def outcome(self, asked: int) -> int | None:
        return self.ended.get(asked)


def test_an_analysis_is_answered_when_it_is_written_and_others_do_not_wait_for_it(folder, queue):
    refresh = Refresh()
    desk = RequestDesk(folder, OptimizerSettings(), queue, lambda settings: None, refresh)
    first = folder.submit(Analyze(kind="analyze", top_n=5))
    pause = folder.submit(Pause(kind="pause"))
    second = folder.submit(Analyze(kind="analyze"))
    desk.serve()
    desk.serve()
    assert refresh.asked == [5, 10] and folder.wait_for_answer(pause, 0).ok
    assert [folder.wait_for_answer(request, 0) for request in (first, second)] == [None, None]
    refresh.ended = {1: 0, 2: 3}
    desk.serve()
    assert folder.wait_for_answer(first, 0).result["message"] == f"written: {folder.study.results.folder}"
    assert "exit status 3" in folder.wait_for_answer(second, 0).error
    assert folder.pending() == []


def test_requests_are_carried_out_in_order_until_a_stop(folder, queue):
    stored = []
    desk = RequestDesk(folder, OptimizerSettings(), queue, stored.append, NeverRefreshes())
    commands = [
        Pause(kind="pause"), Set(kind="set", settings={"n-trials": 9}), Set(kind="set", settings={"seed": 9}),
        enqueue(dim=4), Stop(kind="stop"), Resume(kind="resume"),
    ]  # fmt: skip
    ids = [folder.submit(command) for command in commands]
    desk.serve()
    desk.serve()
    assert (desk.paused, desk.settings.n_trials, [settings.n_trials for settings in stored]) == (True, 9, [9])
    answers = [folder.wait_for_answer(request, 0) for request in ids]
    assert [answer and answer.ok for answer in answers] == [True, True, False, True, None, None]
    assert answers[3].result["trial"] == 1
    assert desk.stop_asked is not None
    desk.answer_stop("stopped")
    assert folder.wait_for_answer(ids[4], 0).ok
    assert [request.id for request in folder.pending()] == ids[5:]


def test_a_request_by_hand_may_be_repeated_under_its_name(folder, queue):
    desk = RequestDesk(folder, OptimizerSettings(), queue, lambda settings: None, NeverRefreshes())
    for _ in range(2):
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / "mine.json").write_text('{"kind": "enqueue", "parameters": {"dim": 4}}')
        desk.serve()
    assert queue.study.queued == 2

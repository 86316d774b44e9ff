"""Files of trials that are over are the daemon's to mend: the study's database knows what they said."""

from __future__ import annotations

from datetime import datetime

import pytest

from optimizer_daemon.optuna_adapter.study import TuningStudy
from optimizer_daemon.recovery import live_trial, recover
from optimizer_daemon.runner import LiveTrial, Runner
from optimizer_daemon.search.space import parse_space
from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.schemas import CurvePoint, TrialParams, TrialState

SPACE = parse_space(
    'name = "small"\n[parameters.rate]\ntype = "float"\nlow = 1e-5\nhigh = 1e-3\nlog = true\n'
    '[parameters.max_train_epochs]\ntype = "categorical"\nchoices = [2]\n',
    "test.toml",
)
NOW = datetime.now().astimezone()


class NobodyTrains(Runner):
    def __init__(self) -> None:
        pass

    def adopt(self, live: LiveTrial, now: float) -> bool:
        return False


@pytest.fixture
def layout(tmp_path) -> StudyLayout:
    return StudyLayout(tmp_path)


@pytest.fixture
def study(layout) -> TuningStudy:
    """Trial 1 won, trial 2 failed its gate, trial 3 failed."""
    study = TuningStudy.open("s", f"sqlite:///{layout.database}", SPACE, seed=1, folder_id="f")
    for number, (value, reason) in enumerate([(0.25, None), (0.125, "image 0 is black"), (None, "diverged")], 1):
        trial = live_trial(layout, study.ask(), SPACE, seed=1, time=NOW)
        curve = ()
        if value is None:
            study.tell_failed(number - 1, reason)
            ending = {"state": "failed"}
        else:
            study.report(number - 1, 1, 0.5)
            study.report(number - 1, 2, value)
            study.tell_complete(number - 1, value, reason)
            final = trial.layout.output_name
            curve = (CurvePoint(epoch=1, value=0.5, checkpoint=f"{final}-000001"),
                     CurvePoint(epoch=2, value=value, checkpoint=final))  # fmt: skip
            ending = {"state": "complete", "value": value, "feasible": reason is None}
        trial.write_state(**ending, reason=reason, curve=curve, ended=NOW)
    return study


@pytest.mark.parametrize("number", [1, 2, 3], ids=["a winner", "one that failed its gate", "one that failed"])
@pytest.mark.parametrize("damage", ["half", "gone"])
def test_damaged_files_are_set_aside_and_say_the_same_again(layout, study, number, damage):
    trial = layout.trial(number)
    before = read_model(trial.params, TrialParams), read_model(trial.state, TrialState)
    for path in (trial.params, trial.state):
        path.unlink()
        if damage == "half":
            path.write_bytes(b'{"trial": 1')
    assert recover(study, layout, SPACE, NobodyTrains(), seed=1, now=0.0, time=NOW) == []
    params, state = read_model(trial.params, TrialParams), read_model(trial.state, TrialState)
    assert params == before[0]
    changed = {"ended", "started", "drawn"}
    assert state.model_dump(exclude=changed) == before[1].model_dump(exclude=changed)
    assert len(list(trial.folder.glob("*.corrupt-*"))) == (2 if damage == "half" else 0)


def test_whole_files_and_folders_that_were_removed_stay_as_they_are(layout, study):
    write_model(layout.trial(1).state, read_model(layout.trial(1).state, TrialState).model_copy(update={"attempt": 3}))
    for path in layout.trial(2).folder.iterdir():
        path.unlink()
    layout.trial(2).folder.rmdir()
    recover(study, layout, SPACE, NobodyTrains(), seed=1, now=0.0, time=NOW)
    assert read_model(layout.trial(1).state, TrialState).attempt == 3
    assert not layout.trial(2).folder.exists()

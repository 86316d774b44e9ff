"""Stages of a study, run by the real daemon: as many trials as each wants, once, whatever is killed."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from shared.files import read_model
from shared.schemas import AllTrials, Run, TrialParams
from tests.scenarios.lab import ROOT, wait_until
from tests.scenarios.quick_lab import PATIENCE_S, QuickLab

EXAMPLE = ROOT / "examples" / "stages_v1.toml"
V1 = ("--search-space", "v1", "--save-every-n-epochs", 8)
QUICK = {"SCRIPTED_TRAINER": json.dumps({"epoch_s": 0.001})}
THREE = """
[[stages]]
name = "coarse"
trials = 2
epochs = 2
[[stages]]
name = "fine"
trials = 2
epochs = 3
[stages.parameters.learning_rate]
low = 1e-3
high = 2e-3
[[stages]]
name = "near"
trials = 1
epochs = 4
around_best = 1
"""


@pytest.fixture
def lab(tmp_path):
    with QuickLab(tmp_path) as lab:
        data = lab.folder / "dataset.toml"  # as many steps as a real data set has, or no warm-up would be short enough
        data.write_text(data.read_text().replace("num_repeats = 1", "num_repeats = 100"))
        yield lab


def params(lab: QuickLab) -> list[TrialParams]:
    return [read_model(trial.params, TrialParams) for trial in lab.study.list_trials()]


def counts(lab: QuickLab) -> dict[tuple[str | None, object], int]:
    """Finished trials by stage and epochs."""
    finished = {
        trial.trial
        for trial in read_model(lab.study.results.all_trials, AllTrials).trials
        if trial.state in ("complete", "pruned")
    }
    known = Counter((p.stage, p.parameters["max_train_epochs"]) for p in params(lab) if p.trial in finished)
    return dict(known)


def run(lab: QuickLab, *flags: object) -> str:
    daemon = lab.optimizer(*flags, env=QUICK)
    assert daemon.wait(PATIENCE_S) == 0, daemon.said
    return daemon.said


def test_stages_run_in_order_once_and_are_told_of(lab):
    (lab.folder / "stages.toml").write_text(THREE)
    first = lab.optimizer("--stages", lab.folder / "stages.toml", hold=str(lab.folder / "go"))
    lab.wait_for_training(1, first)
    status = json.loads(lab.ask("status", "--json").stdout)
    assert status["stage"] == {
        "name": "coarse", "number": 1, "of": 3, "trials": 2, "epochs": 2, "study_trials": 5, "finished": 0,
    }  # fmt: skip
    assert "stage 'coarse' (1 of 3): 0 of 2" in lab.ask("status").stdout
    refused = lab.ask("set", "n-trials=9")
    assert refused.returncode == 2
    assert "the stages of" in refused.stderr
    # asked for within what is declared, though the stage would not draw it; it trains the stage's epochs
    assert lab.ask("enqueue", "learning_rate=2e-4").returncode == 0
    (lab.folder / "go").touch()
    wait_until(lambda: "stage begins" in lab.log(), PATIENCE_S, first.said)
    lab.wait_for_training(4, first)
    first.kill()
    lab.kill_training(4)
    said = run(lab, "--stages", lab.folder / "stages.toml")
    assert counts(lab) == {("coarse", 2): 2, ("fine", 3): 2, ("near", 4): 1}
    for stage, trials in (("coarse", 2), ("fine", 2), ("near", 1)):
        assert f"{trials} of {trials} trials of stage '{stage}' are finished." in said
    assert "raise the trials of a stage in" in said
    rates = [float(known.parameters["learning_rate"]) for known in params(lab)]
    assert all(1e-3 <= rate <= 2e-3 for rate in rates[2:4])
    assert read_model(lab.study.run, Run).stage.name == "near"
    begins = [line for line in lab.log().splitlines() if "stage begins" in line]
    assert ["fine" in begins[0], "near" in begins[1], len(begins)] == [True, True, 2]
    said = run(lab, "--stages", lab.folder / "stages.toml")
    assert len(params(lab)) == 5
    assert "1 of 1 trials of stage 'near' are finished." in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--n-trials", 9), "--n-trials: 9 will not do; the stages of"),
        (("--max-epochs", 9), "--max-epochs: 9 will not do; the stages of"),
    ],
)
def test_stages_beside_what_they_say_themselves_are_refused(lab, flags, says):
    refused = lab.ask("run", "--stages", EXAMPLE, *flags)
    assert refused.returncode == 2
    assert says in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not lab.study.root.exists()


def test_values_that_the_epochs_rule_out_are_dropped_with_one_line_each_and_an_empty_stage_is_refused(lab):
    flags = ("--search-space", "v2.1", "--n-trials", 1, "--save-every-n-epochs", 8)
    run(lab, *flags, "--max-epochs", 8)
    dropped = [line for line in lab.log().splitlines() if "value dropped" in line]
    assert [line.partition("parameter=")[2].partition(" reason")[0] for line in dropped] == [
        "network_dim value=256",
        *(f"network_alpha_ratio value={ratio}" for ratio in (0.75, 0.8, 0.85, 0.9)),
    ]
    rule = read_model(lab.study.run, Run).warm_up_rule
    assert rule is not None
    assert rule.when == "2 * lr_warmup_steps > -(-(600) // gradient_accumulation_steps) * max_train_epochs"
    (lab.folder / "stages.toml").write_text(
        '[[stages]]\nname = "big"\ntrials = 1\nepochs = 8\n[stages.parameters.network_dim]\nchoices = [256]\n'
    )
    before = lab.study.run.read_bytes()
    daemon = lab.optimizer("--search-space", "v2.1", "--stages", lab.folder / "stages.toml")
    assert daemon.wait(PATIENCE_S) == 2
    assert "stage 'big': search space 'v2.1': none of 10,000 draws is feasible" in daemon.said
    assert "High dim (≥256) needs ≥16 epochs for convergence" in daemon.said
    assert lab.study.run.read_bytes() == before


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_search_guides_three_commands_give_10_20_and_5_trials(lab):
    three = ((10, 8), (20, 12), (5, 15))
    for trials, epochs in three:
        said = run(lab, *V1, "--max-epochs", epochs, "--n-trials", trials)
        assert f"{trials} of {trials} trials of stage '{epochs} epochs' are finished." in said
    assert counts(lab) == {(f"{epochs} epochs", epochs): trials for trials, epochs in three}
    said = run(lab, *V1, "--max-epochs", 12, "--n-trials", 20)
    assert (
        "20 of 20 trials of stage '12 epochs' are finished.\nFor more, pass a larger number, such as --n-trials 30."
        in said
    )
    assert "35 of 35 trials finished" in lab.ask("status").stdout
    assert len(params(lab)) == 35


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_example_gives_10_20_and_5_trials_killed_in_the_middle(lab):
    flags = (*V1, "--stages", EXAMPLE)
    daemon = lab.optimizer(*flags, env=QUICK)
    wait_until(lambda: lab.log().count("trial ended") == 17 or daemon.exit_status is not None, 600, daemon.said)
    daemon.kill()
    run(lab, *flags)
    assert counts(lab) == {("coarse", 8): 10, ("fine", 12): 20, ("validation", 15): 5}
    assert len(params(lab)) == 35
    fine = [known.parameters for known in params(lab) if known.stage == "fine"]
    assert all(8e-5 <= float(known["learning_rate"]) <= 1.5e-4 for known in fine)
    assert {known["network_dim"] for known in fine} <= {128, 192, 256}

"""What the live comparison of studies with and without pruner counts, and how it judges their best trials."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks.search.live import Arm, at_once, best, main, results_in, trained_epochs, write_results
from shared.errors import UserError
from shared.layout import TrialLayout
from tests.shared.test_comparing import PLAN, of

LOG = (
    "latents: 8/8\nepoch 1/16\n\nsteps:   0%|          | 0/32 [00:00<?, ?it/s, epoch=1/16]"
    "\rsteps:   9%|9         | 3/32 [00:05<00:48,  1.68s/it, avr_loss=0.07, epoch=2/16]"
    "\nsaving checkpoint: lora_trial_1-000002.safetensors\n"
    "steps:  16%|#6        | 5/32 [00:08<00:43,  1.60s/it, avr_loss=0.07, epoch=3/16]\n"
)


def trial(level: float, epochs: int = 12) -> dict:
    """One that scores the same at every second epoch."""
    curve = dict.fromkeys(range(2, epochs + 1, 2), level)
    return {"epochs": epochs, "curve": curve, "feasible": True, "value": level}


def test_what_was_trained_is_what_the_log_says_last_and_not_what_was_planned(tmp_path):
    layout = TrialLayout(tmp_path)
    layout.training_log.write_text(LOG)
    assert trained_epochs(layout, 16) == 2.5
    layout.training_log.write_text("latents: 8/8\n")
    assert trained_epochs(layout, 16) == 0.0


def test_with_scores_at_once_a_losing_trial_costs_its_warm_up_only():
    good = [trial(0.1 + number / 100) for number in range(5)]
    assert at_once(good) == 0.0
    assert at_once([*good, trial(0.5, epochs=20)]) == pytest.approx(16 / 80)
    collapsed = {**good[0], "feasible": False}
    assert at_once([collapsed, *good[1:], trial(0.5)]) == 0.0, "four peers are too few"


def test_the_pruned_best_must_not_be_told_from_the_best_there_is():
    plain = {"1": of("1", 0.6), "2": of("2", 0.606, noise=3), "3": of("3", 0.9, noise=5)}
    assert best(plain, plain, PLAN)["in_tie_set"]
    tied = best(plain, {name: plain[name] for name in ("2", "3")}, PLAN)
    assert tied["in_tie_set"]
    assert [number for number, _ in tied["best"]] == [1, 2]
    lost = best(plain, {"3": plain["3"]}, PLAN)
    assert not lost["in_tie_set"]
    assert lost["difference"][1] > 0


def options(**changed: object) -> argparse.Namespace:
    values = {"trials": 24, "pictures": 8, "samples": 6, "render_steps": 6, "sampler": "random"}
    return argparse.Namespace(**{**values, **changed})


OTHERS = [("trials", 20), ("pictures", 4), ("samples", 4), ("render_steps", 4), ("sampler", "tpe")]


def test_a_seed_is_added_to_the_others_of_the_file_or_takes_its_own_place(tmp_path):
    out = tmp_path / "live.json"
    assert write_results(out, options(), {"10": {"saved": 0.1}}) == {"10": {"saved": 0.1}}
    write_results(out, options(), {"2": {"saved": 0.2}})
    write_results(out, options(), {"10": {"saved": 0.3}})
    assert results_in(out, options()) == {"2": {"saved": 0.2}, "10": {"saved": 0.3}}
    assert list(json.loads(out.read_text())["seeds"]) == ["2", "10"]


@pytest.mark.parametrize(("name", "value"), OTHERS)
def test_a_file_of_other_options_is_refused_and_left_as_it_is(tmp_path, name, value):
    out = tmp_path / "live.json"
    write_results(out, options(), {"1": {"saved": 0.1}})
    before = out.read_bytes()
    with pytest.raises(UserError, match=f"{name} is .* there and {value} here"):
        write_results(out, options(**{name: value}), {"2": {"saved": 0.2}})
    assert out.read_bytes() == before


@pytest.mark.parametrize(("name", "value"), OTHERS)
def test_a_study_kept_from_other_options_is_refused(tmp_path, name, value):
    Arm(tmp_path / "arm", 1, "median", options())
    Arm(tmp_path / "arm", 1, "median", options())
    with pytest.raises(UserError, match=f" is .* there and {value} here; pass what it was made with"):
        Arm(tmp_path / "arm", 1, "median", options(**{name: value}))


def test_the_refusal_is_one_line(tmp_path, monkeypatch, capsys):
    out = tmp_path / "live.json"
    out.write_text("[]")
    monkeypatch.setattr("sys.argv", ["live", "--out", str(out)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.splitlines()[-1].endswith("holds no results of this command; pass another --out")

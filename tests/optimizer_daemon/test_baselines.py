"""LoRAs a study is held against: which are taken, what is said of them, and what a trial's summary says beside them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.tiny_world.paths import BASE_MODEL
from optimizer_daemon.baselines import (
    Baselines,
    against,
    baseline_lines,
    baseline_results,
    keep_copies,
    read_baselines,
    rivals,
    with_baselines,
    without_lost,
)
from optimizer_daemon.results import summary_text
from optimizer_daemon.scoring_command import EVALUATOR
from shared.errors import SettingsError, StudyMismatchError
from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.locks import FileLock
from shared.logs import set_up_logs, tear_down_logs
from shared.schemas import BaselineResult, Metrics, Run, Score
from tests.scenarios.lora_files import lora, unet
from tests.scenarios.written_study import plan_study

SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_evaluator.py")))
PATIENCE_S = 500.0
GOLDEN = Path(__file__).parents[1] / "data" / "formats" / "v1"


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "v6.safetensors").write_bytes(lora(6))
    (folder / "v7.safetensors").write_bytes(lora(7))
    (folder / "cut.safetensors").write_bytes(lora(6)[:-10])
    (folder / "foreign.safetensors").write_bytes(lora(8, {name: (64, 768) for name in unet() if "attn2_to_k" in name}))
    return folder


@pytest.fixture
def study(tmp_path) -> StudyLayout:
    study = StudyLayout(tmp_path / "study")
    plan_study(study)
    return study


@pytest.fixture
def log(tmp_path) -> Iterator[Path]:
    set_up_logs(tmp_path / "optimization.log")
    yield tmp_path / "optimization.log"
    tear_down_logs()


def with_given(study: StudyLayout, files: Path, *names: str) -> Run:
    """The study with these files as baselines of their names, copied."""
    entries = [f"{name}={files / name}.safetensors" for name in names]
    run = with_baselines(read_model(study.run, Run), read_baselines(entries, BASE_MODEL))
    write_model(study.run, run)
    keep_copies(study, run, entries)
    return run


def score(baselines: Baselines, patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while baselines.pending:
        baselines.poll()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        pytest.param(["{}/v6.safetensors"], "write NAME=FILE", id="no name"),
        pytest.param(["v6="], "write NAME=FILE", id="no file"),
        pytest.param(["V6={}/v6.safetensors"], "small letters", id="a name that is no folder's"),
        pytest.param(["../x={}/v6.safetensors"], "small letters", id="a name that leaves the folder"),
        pytest.param(["base={}/v6.safetensors"], "base is the base model", id="the base model's name"),
        pytest.param(["v={}/v6.safetensors", "v={}/v7.safetensors"], "v is already", id="a name twice"),
        pytest.param(["v={}/gone.safetensors"], "that is there", id="no such file"),
        pytest.param(["v={}"], "that is there", id="a folder"),
        pytest.param(["v={}/cut.safetensors"], "name a LoRA that is whole", id="cut short"),
        pytest.param([f"v={BASE_MODEL}/vae/diffusion_pytorch_model.safetensors"], "not a LoRA", id="no LoRA"),
        pytest.param(["v={}/foreign.safetensors"], "another family of base model (text 768 wide", id="SD 1.5's"),
    ],
)
def test_what_cannot_be_scored_is_refused(files, entries, message):
    with pytest.raises(SettingsError) as caught:
        read_baselines([entry.replace("{}", str(files)) for entry in entries], BASE_MODEL)
    assert message in str(caught.value)
    assert "--baseline" in str(caught.value)


def test_a_study_keeps_its_copies_whatever_becomes_of_the_files(study, files):
    run = with_given(study, files, "v6")
    copy = study.baseline_file("v6").read_bytes()
    assert copy == (files / "v6.safetensors").read_bytes()
    assert set(with_given(study, files, "v7").baselines) == {"v6", "v7"}, "a new one may come at any start"
    assert with_given(study, files, "v6").baselines["v6"] == run.baselines["v6"]

    (files / "v6.safetensors").write_bytes(lora(1))
    with pytest.raises(StudyMismatchError) as caught:
        with_given(study, files, "v6")
    changed = read_baselines([f"v={files / 'v6'}.safetensors"], BASE_MODEL)["v"].checkpoint.sha256
    assert run.baselines["v6"].sha256 in str(caught.value)
    assert changed in str(caught.value)
    assert study.baseline_file("v6").read_bytes() == copy


def test_a_file_that_is_gone_is_done_without_where_its_copy_stands(study, files, log):
    run = with_given(study, files, "v6")
    (v6, v7), v8 = (f"{name}={files / name}.safetensors" for name in ("v6", "v7")), f"v8={files / 'v8'}.safetensors"
    assert without_lost([v6, v7, v8], study, run) == [v6, v7, v8], "v8 was never there: read_baselines refuses it"
    (files / "v6.safetensors").unlink()
    assert without_lost([v6, v7], study, run) == [v7]
    assert log.read_text().count("baseline's file is gone, its copy stands baseline=v6") == 1
    study.baseline_file("v6").write_bytes(lora(1))
    assert without_lost([v6, v7], study, run) == [v6, v7], "the copy is another one's"
    study.baseline_file("v6").unlink()
    assert without_lost([v6, v7], study, run) == [v6, v7]


def test_a_long_wait_is_said_once(study, files, log):
    now = [0.0]
    run = with_given(study, files, "v6")
    layout = study.evaluations("baseline")
    layout.folder.mkdir(parents=True)
    baselines = Baselines(study, run, ("/nonexistent",), "cpu", 1, lambda: now[0])
    with FileLock(layout.lock):  # somebody else is at it, for ever
        for now[0] in (1.0, 599.0):
            baselines.poll()
        assert "long in scoring" not in log.read_text()
        for now[0] in (601.0, 1300.0):
            baselines.poll()
    assert log.read_text().count('baselines are long in scoring names=v6 reason="no trial begins before; see ') == 1


@pytest.mark.timeout(600)
def test_the_evaluator_scores_each_on_the_studys_grid_and_says_why_one_cannot_be(study, files, log):
    (files / "alien.safetensors").write_bytes(lora(2, {"lora_unet_nowhere_to_q": (8, 8)}))
    run = with_given(study, files, "v6", "alien")
    assert [result.reason for result in baseline_results(study, run)] == ["not scored yet"] * 2
    baselines = Baselines(study, run, EVALUATOR, "cpu", 1, time.monotonic)
    score(baselines)
    alien, v6 = baselines.results()
    metrics = read_model(study.evaluations("baseline").checkpoint("v6").metrics, Metrics)
    assert v6.value == metrics.scores["combined_score"].value
    assert metrics.plan_hash == run.plan_hash
    assert v6.feasible == metrics.gate.feasible
    assert (alien.value, alien.feasible) == (None, None)
    assert "baseline scored baseline=v6" in log.read_text()
    assert f'baseline without a score baseline=alien reason="{alien.reason}' in log.read_text()
    assert not Baselines(study, run, EVALUATOR, "cpu", 1, time.monotonic).pending, "both have their verdict"
    assert list(rivals(study, run)) == ["baseline v6", "base model"]


def test_a_command_that_fails_is_tried_again_and_then_done_without(study, files, log):
    now = [0.0]
    failing = (sys.executable, "-S", "-c", "import sys; print('no memory'); sys.exit(4)")
    baselines = Baselines(study, with_given(study, files, "v6"), failing, "cpu", 1, lambda: now[0])
    while baselines.pending:
        baselines.poll()
        now[0] += 1.0
        time.sleep(0.01)
    assert log.read_text().count('scoring of the baselines failed exit=4 said="no memory"') == 3
    assert "baseline without a score baseline=v6" in log.read_text()
    assert Baselines(study, baselines._run, failing, "cpu", 1, lambda: 0.0).pending, "the next start tries again"
    study.baseline_file("v6").unlink()
    assert not Baselines(study, baselines._run, failing, "cpu", 1, lambda: 0.0).pending
    assert "v6.safetensors is gone; pass --baseline v6=" in log.read_text()


def test_what_another_process_scores_is_waited_for(study, files):
    run = with_given(study, files, "v6")
    layout = study.evaluations("baseline")
    layout.folder.mkdir(parents=True)
    baselines = Baselines(study, run, ("/nonexistent",), "cpu", 1, time.monotonic)
    with FileLock(layout.lock):
        assert not baselines.poll()
        assert baselines.pending
        command = [
            *SCRIPTED,
            "evaluate",
            study.baseline_file("v6"),
            "--label",
            "baseline",
            "--optimization-dir",
            study.root,
        ]
    subprocess.run(command, check=True)
    assert baselines.poll()
    assert not baselines.pending


SCORED = BaselineResult(name="v6", value=0.4, feasible=True)
OPEN = BaselineResult(name="v7", reason="not scored yet")
FAILED = BaselineResult(name="v8", value=0.2, feasible=False, reason="image 0 is black")


def test_a_line_for_each_says_how_the_winner_does():
    assert baseline_lines([SCORED, OPEN, FAILED], "combined_score", 0.3) == [
        "baseline v6: combined_score 0.4000, the winner is 0.1000 better",
        "baseline v7: no score (not scored yet)",
        "baseline v8: combined_score 0.2000, the winner is 0.1000 worse, failed its gate: image 0 is black",
    ]
    assert baseline_lines([SCORED], "combined_score", None) == ["baseline v6: combined_score 0.4000"]
    assert baseline_lines([SCORED], "combined_score", 0.3, knee=True) == [
        "baseline v6: combined_score 0.4000, the knee is 0.1000 better in combined_score"
    ]
    assert against([SCORED, OPEN], 0.5) == {"v6": pytest.approx(0.1)}


def test_a_trials_summary_holds_each_score_against_the_baselines(tmp_path):
    ours, theirs = (measured(value, ()) for value in (0.3, 0.4))
    text = summary_text(ours, read_model(GOLDEN / "run.json", Run).plan.scoring, {"baseline v6": theirs})
    assert "Against baseline v6\n  combined_score       0.3000 against 0.4000, better by 0.1000\n" in text
    assert "worse by 0.1000" in summary_text(theirs, read_model(GOLDEN / "run.json", Run).plan.scoring, {"x": ours})
    other = measured(0.4, ("lpips_diversity",))
    text = summary_text(ours, read_model(GOLDEN / "run.json", Run).plan.scoring, {"x": other})
    assert "0.3000 against 0.4000, made of different parts" in text


def measured(value: float, left_out: tuple[str, ...]) -> Metrics:
    metrics = read_model(GOLDEN / "metrics.json", Metrics)
    score = Score(value=value, direction="minimise", left_out=left_out)
    return metrics.model_copy(update={"scores": {"combined_score": score}})

"""The daemon as people meet it: a real process, real trainings, kill -9, Ctrl-C, and the same command again."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.locks import FileLock
from shared.schemas import AllTrials, BestParameters, Metrics, Run, TrialState
from tests.shared.process_trees import is_running, wait_until

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

SPACE = """
name = "quick"
[parameters.learning_rate]
type = "float"
low = 1e-5
high = 1e-3
log = true
[parameters.network_dim]
type = "categorical"
choices = [64, 128]
[parameters.network_alpha_ratio]
type = "float"
low = 0.25
high = 0.75
step = 0.25
[parameters.max_train_epochs]
type = "categorical"
choices = [3, 4]
[derived]
network_alpha = "int(network_dim * network_alpha_ratio)"
"""


class Lab:
    """A study folder and the command that runs it."""

    def __init__(self, folder: Path) -> None:
        self.study = StudyLayout(folder / "study")
        base = folder / "base"
        for component, config in {"unet": {"sample_size": 8}, "vae": {"block_out_channels": [4, 4]}}.items():
            (base / component).mkdir(parents=True)
            (base / component / "config.json").write_text(json.dumps(config))
            (base / component / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
        (base / "model_index.json").write_text(json.dumps({"unet": ["a", "b"], "vae": ["a", "b"]}))
        (folder / "dataset.toml").write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "pictures"\n')
        (folder / "pictures").mkdir()
        (folder / "pictures" / "a.caption").write_text("a red ball\nsecond line\n")
        (folder / "space.toml").write_text(SPACE)
        (folder / "study.toml").write_text(
            '[optimizer]\nbase_model = "base"\ndataset_config = "dataset.toml"\nsearch_space = "space.toml"\n'
            'output_dir = "study"\ntrainer = "scripted_trainer:TRAINER"\ndevice = "cpu"\n'
        )
        self.flags = ["--config", str(folder / "study.toml")]

    def start(self, *flags: str, gate: str = "", **behaviour: object) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
            "SCRIPTED_TRAINER": json.dumps(behaviour),
            "SCRIPTED_GATE": gate,
        }
        return subprocess.Popen(
            [sys.executable, str(HERE / "launch.py"), *self.flags, *flags],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *flags: str, **behaviour: object) -> tuple[int, str, str]:
        process = self.start(*flags, **behaviour)
        out, err = process.communicate()
        return process.returncode, out, err

    def state(self, number: int) -> TrialState | None:
        path = self.study.trial(number).state
        return read_model(path, TrialState) if path.exists() else None

    def log(self) -> str:
        return self.study.optimizer_log.read_text()

    def optuna_trials(self) -> list[optuna.trial.FrozenTrial]:
        return optuna.load_study(study_name="lora_study", storage=f"sqlite:///{self.study.database}").trials

    def evaluated(self, number: int) -> list[str]:
        return (self.study.trial(number).folder / "realtime_evaluation.log").read_text().split()


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def trains(lab: Lab, number: int) -> Callable[[], bool]:
    """The trial's trainer has its first epoch behind it."""
    log = lab.study.trial(number).training_log
    return lambda: log.exists() and "scripted: 1" in log.read_text()


def servers_of(daemon: subprocess.Popen[str]) -> list[int]:
    """The preloaded trainer processes of a daemon."""
    children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    return [int(pid) for pid in children if "shared.preload" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_study_from_the_first_start_to_the_winner(lab):
    code, out, err = lab.run("--n-trials", "3", gate="2")
    assert code == 0, err
    trials = read_model(lab.study.results.all_trials, AllTrials)
    assert [trial.state for trial in trials.trials] == ["complete"] * 3
    assert [trial.feasible for trial in trials.trials] == [True, False, True]
    assert trials.trials[1].reason == "image 0 is black"
    feasible = [trial for trial in trials.trials if trial.feasible]
    best = read_model(lab.study.results.best_parameters, BestParameters)
    assert best.value == min(trial.value for trial in feasible)
    assert best.parameters["network_alpha"] == int(
        best.parameters["network_dim"] * best.parameters["network_alpha_ratio"]
    )
    assert f"Winner: trial {best.trial}, combined_score {best.value:.4f}" in out

    told = lab.optuna_trials()
    assert [trial.value for trial in told] == [trial.value for trial in trials.trials]
    assert [bool(trial.constraints) for trial in told] == [False, True, False]
    for trial, frozen in zip(trials.trials, told, strict=True):
        assert frozen.intermediate_values == {point.epoch: point.value for point in trial.curve}
        assert [point.epoch for point in trial.curve] == [2, trial.parameters["max_train_epochs"]]
        folder = lab.study.trial(trial.trial)
        assert read_model(folder.final_evaluation.metrics, Metrics).checkpoint == folder.output_name
        assert folder.final_evaluation.sample(0).read_bytes().startswith(b"\x89PNG")
        text = folder.final_evaluation.text_summary.read_text()
        assert "goal 0.18-0.22: missed by 0.0800" in text
        assert "goal 0.45-0.55: reached" in text
    for picture in (lab.study.results.optimization_history, lab.study.results.param_importances):
        assert picture.stat().st_size > 5000

    run = read_model(lab.study.run, Run)
    assert run.status == "finished"
    assert run.plan is not None
    assert run.plan.prompts == ("a red ball",)
    log = lab.log()
    assert 'INFO trial started trial="1 of 3" attempt=1' in log
    assert f"  network_alpha: {best.parameters['network_alpha']} (ratio: " in log
    assert "INFO epoch trial=1 epoch=" in log
    assert "checkpoint scored trial=3 epoch=2 combined_score=" in log
    assert sys.executable in lab.study.watch_script.read_text()

    # The same command again: nothing is left to do, and status needs nobody alive.
    code, out, _ = lab.run("--n-trials", "3")
    assert (code, "3 of 3 trials are finished." in out, "--n-trials 13" in out) == (0, True, True)
    assert [lab.evaluated(number) for number in (1, 2, 3)] == [
        [f"lora_trial_{number}", f"lora_trial_{number}-000002"] for number in (1, 2, 3)
    ] or all(len(set(lab.evaluated(number))) == len(lab.evaluated(number)) == 2 for number in (1, 2, 3))
    shown = subprocess.run(
        [sys.executable, "-m", "optimizer_daemon.cli", "status", *lab.flags, "--json", "--top", "2"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    status = json.loads(shown.stdout)
    assert (status["finished"], status["best"], status["optimizer_alive"]) == (3, best.trial, False)
    assert [row["trial"] for row in status["top"]] == [
        trial.trial for trial in sorted(feasible, key=lambda trial: trial.value)
    ]
    assert status["top"][0]["checkpoints_seen"] == status["top"][0]["checkpoints_expected"] == 2


@pytest.mark.parametrize("preloaded", [False, True], ids=["a program of its own", "forked from the preloaded server"])
def test_kill_9_leaves_the_training_alive_and_the_next_start_adopts_it(lab, preloaded):
    hold = lab.study.root.parent / "go on"
    first = lab.start("--n-trials", "2", hold=str(hold), preloaded=preloaded)
    wait_for(trains(lab, 1), first)
    servers = servers_of(first)
    assert len(servers) == preloaded
    first.kill()
    first.communicate()
    wait_until(lambda: not any(map(is_running, servers)), "the server's end")
    assert FileLock.is_held(lab.study.trial(1).trainer_lock)
    second = lab.start("--n-trials", "2", preloaded=preloaded)
    wait_for(lambda: "trial found" in lab.log(), second)
    hold.touch()
    _, err = second.communicate()
    assert second.returncode == 0, err
    assert "trial found trial=1 state=training trainer_alive=True" in lab.log()
    assert lab.study.trial(1).training_log.read_text().count("training from epoch") == 1
    assert [trial.number for trial in lab.optuna_trials()] == [0, 1]
    for number in (1, 2):
        state = lab.state(number)
        assert (state.state, state.attempt, state.resumes) == ("complete", 1, 0)
        assert len(set(lab.evaluated(number))) == len(lab.evaluated(number)) == 2


def test_a_killed_server_costs_its_training_nothing_and_the_next_one_has_another(lab):
    hold = lab.study.root.parent / "go on"
    daemon = lab.start("--n-trials", "2", hold=str(hold), preloaded=True)
    wait_for(trains(lab, 1), daemon)
    (server,) = servers_of(daemon)
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: not is_running(server), daemon)
    hold.touch()
    _, err = daemon.communicate()
    assert daemon.returncode == 0, err
    assert [lab.state(number).attempt for number in (1, 2)] == [1, 1]
    assert [line.partition("took=")[0].split(" ", 1)[1] for line in lab.log().splitlines() if "preloaded" in line] == [
        "INFO trainer preloaded ",
        "WARNING the preloaded trainer process has ended; another is started",
        "INFO trainer preloaded ",
    ]


@pytest.mark.parametrize("preloaded", [False, True], ids=["a program of its own", "forked from the preloaded server"])
def test_ctrl_c_saves_the_training_and_the_same_command_goes_on_with_it(lab, preloaded):
    first = lab.start("--n-trials", "1", hold="never", preloaded=preloaded)
    wait_for(trains(lab, 1), first)
    servers = servers_of(first)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate()
    assert not any(map(is_running, servers))
    assert first.returncode == 130, err
    assert "Trial 1 goes on from its training state in" in out
    assert lab.state(1).state == "interrupted"
    assert read_model(lab.study.run, Run).status == "stopped"
    assert not FileLock.is_held(lab.study.trial(1).trainer_lock)

    code, _, err = lab.run("--n-trials", "1")
    assert code == 0, err
    state = lab.state(1)
    assert (state.state, state.attempt, state.resumes) == ("complete", 1, 1)
    assert len(lab.optuna_trials()) == 1
    assert lab.study.trial(1).training_log.read_text().count("training from epoch 1") == 1


def test_a_second_ctrl_c_stops_at_once_and_the_redo_keeps_number_and_parameters(lab):
    first = lab.start("--n-trials", "1", hold="never", deaf=True)
    wait_for(trains(lab, 1), first)
    first.send_signal(signal.SIGINT)
    wait_for(lambda: "stopping" in lab.log(), first)
    begin = time.monotonic()
    first.send_signal(signal.SIGINT)
    out, err = first.communicate()
    assert first.returncode == 130, err
    assert time.monotonic() - begin < 40, "the trainer's minute was not waited for"
    assert "had saved nothing yet and begins again, with the same parameters" in out
    assert not FileLock.is_held(lab.study.trial(1).trainer_lock)
    drawn = lab.study.trial(1).params.read_bytes()

    code, _, err = lab.run("--n-trials", "1")
    assert code == 0, err
    trial = lab.study.trial(1)
    assert trial.params.read_bytes() == drawn
    assert (trial.attempt(1) / "training.log").exists()
    assert lab.state(1).attempt == 1
    assert len(lab.optuna_trials()) == 1


def test_three_failures_of_one_kind_stop_the_daemon_with_the_reason(lab):
    code, out, err = lab.run("--n-trials", "5", exit_at_epoch=2)
    assert code == 4
    assert "3 trials in a row failed in the same way" in err
    assert "CUDA out of memory" in err
    assert "Traceback" not in err
    assert "0 of 5 trials are finished" in out
    assert [trial.state.name for trial in lab.optuna_trials()] == ["FAIL"] * 3
    assert lab.state(3).reason.startswith("out of memory")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        pytest.param(["--num-samples", "4"], "--num-samples: 8 -> 4", id="other pictures"),
        pytest.param(["--study-name", "other"], "--study-name: lora_study -> other", id="other study"),
    ],
)
def test_a_start_with_other_settings_is_refused_with_both_values(lab, flags, says):
    from optimizer_daemon.runner import now_local
    from optimizer_daemon.settings import OptimizerSettings, load_optimizer_settings
    from optimizer_daemon.study_file import find_run
    from shared.errors import StudyMismatchError
    from shared.settings import add_settings_flags

    parser = argparse.ArgumentParser()
    add_settings_flags(parser, OptimizerSettings)

    def settings(*more: str):
        return load_optimizer_settings(parser.parse_args([*lab.flags, *more]))

    lab.study.root.mkdir()
    run = find_run(settings(), lab.study, now_local())
    write_model(lab.study.run, run)
    again = find_run(settings("--n-trials", "99"), lab.study, now_local())
    assert (again.folder_id, again.plan_hash, again.settings["n-trials"]) == (run.folder_id, run.plan_hash, 99)
    with pytest.raises(StudyMismatchError) as caught:
        find_run(settings(*flags), lab.study, now_local())
    assert says in str(caught.value)
    (lab.study.root.parent / "base" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"other")
    with pytest.raises(StudyMismatchError, match="--base-model"):
        find_run(settings(), lab.study, now_local())

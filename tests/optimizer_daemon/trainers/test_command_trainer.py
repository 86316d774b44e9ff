"""The command trainer: templates, its table, the pictures it hands over, and how its process collects and ends."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
import yaml

from optimizer_daemon.collecting.delivery import Delivery
from optimizer_daemon.collecting.job import Job
from optimizer_daemon.collecting.patterns import Match, Pattern
from optimizer_daemon.lifecycle import signal_of
from optimizer_daemon.trainers.command import TRAINER
from optimizer_daemon.trainers.command_options import read_options
from optimizer_daemon.trainers.picture_folder import check_pictures, make_picture_folder
from optimizer_daemon.trainers.templates import fill, written
from shared.errors import SettingsError, UserError
from shared.held_out import file_digest
from shared.layout import TrialLayout
from shared.safetensors_file import read_checkpoint
from shared.schemas.pictures import Picture, StudyPictures
from tests.optimizer_daemon.scripted_trainer import lora
from tests.optimizer_daemon.trainers.bench import Bench
from tests.optimizer_daemon.trainers.test_contract import COMMAND

# ---------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("--lr={rate}", "--lr=1.0e-05"),
        ('{"rate": {rate}, "in": {"dir": {dir:json}}}', '{"rate": 1.0e-05, "in": {"dir": "/a \\"b\\""}}'),
        ("{{rate}} {} {1} {a b} ${{HOME}}", "{rate} {} {1} {a b} ${HOME}"),
        ("{flag} {rank} {dir}", 'true 8 /a "b"'),
        ("{{rate:json}}", "{rate:json}"),
    ],
)
def test_a_template_is_filled_in(template: str, text: str):
    values = {"rate": 1e-05, "dir": '/a "b"', "flag": True, "rank": 8}
    assert fill(template, values, "here") == text


@pytest.mark.parametrize("number", [1e-05, 1e-4, 0.1, 1.0, 2e20, -3.5e-7, 3.0e-5])
def test_every_reader_takes_a_written_number_for_that_number(number: float):
    text = written(number)
    assert json.loads(text) == yaml.safe_load(text) == float(text) == number


def test_an_unknown_placeholder_is_refused_with_the_closest():
    with pytest.raises(
        SettingsError, match=r"^here: '\{learning_rte\}' will not do; there is no such placeholder; did "
    ):
        fill("{learning_rte}", {"learning_rate": 1e-4}, "here")
    with pytest.raises(SettingsError, match=r"choose one of rank, seed, or write \{\{x\}\} for the text"):
        fill("{x}", {"rank": 1, "seed": 2}, "here")
    with pytest.raises(SettingsError, match=r"the only form is \{rank:json\}"):
        fill("{rank:yaml}", {"rank": 1}, "here")


# -------------------------------------------------------------------------------------------------------------- table


def table(**changes: object) -> dict[str, object]:
    return {"command": "train --lr {learning_rate}", "final": "*.safetensors", **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comand": "x"}, r"\[trainer.command\] comand: 'x' will not do; there is no such key; did you mean 'command'"),
        ({"command": "a 'b"}, r"command: \"a 'b\" will not do; No closing quotation; write the words as a list"),
        ({"command": []}, r"\[trainer.command\] command: \[\] will not do; List should have at least 1 item"),
        ({"final": "/abs/*"}, r"final: '/abs/\*' will not do; write a path below \{output_dir\}"),
        ({"checkpoints": "*.safetensors"}, r"checkpoints: .*tells no checkpoint from another; write \{epoch\} or"),
        (
            {"final": "out**.safetensors"},
            r"final: .*write \*\* alone between two /, for any folders; within a name \* is",
        ),
        ({"state": "a**b"}, r"state: 'a\*\*b' will not do; write \*\* alone"),
        ({"checkpoints": "{epoch}-{step}"}, r"checkpoints: .*write \{epoch\} or \{step\}, once"),
        ({"checkpoints": "{step}.safetensors"}, r"steps_per_epoch: None will not do; the command or a pattern counts"),
        ({"command": "t {max_train_steps}"}, r"steps_per_epoch: None will not do"),
        ({"resume": "--go {state}"}, r"state: None will not do; resume needs it"),
        ({"final": None}, r"final: None will not do; write where the program saves its weights"),
        ({"progress": "step (\\d+"}, r"progress: .*is no regular expression"),
        ({"progress": "step \\d+"}, r"progress: .*it has no named group; name them epoch, epoch_step"),
        ({"progress": "(?P<stp>\\d+)"}, r"progress: .*no group named 'stp' is read"),
        ({"files": {"../x": "y"}}, r"files: .*'../x' is no name of a file below \{files_dir\}"),
        (
            {"env": {"CUDA_VISIBLE_DEVICES": "1"}},
            r"env: .*CUDA_VISIBLE_DEVICES is the daemon's to set; choose the card",
        ),
        ({"stop_signal": "SIGHUP"}, r"stop_signal: 'SIGHUP' will not do; Input should be 'SIGTERM' or 'SIGINT'"),
    ],
)
def test_a_table_that_will_not_do_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(SettingsError, match=message):
        read_options(table(**changes))


def test_a_command_may_be_one_line():
    assert read_options(table(command="run 'a b' {seed}")).command == ["run", "a b", "{seed}"]


# ------------------------------------------------------------------------------------------------------- the plan


def test_a_drawn_parameter_that_the_program_never_hears_of_is_refused(tmp_path: Path):
    with Bench(tmp_path, "command", COMMAND.replace('"optimizer_type"', "")) as bench:
        with pytest.raises(UserError, match=r"^trial parameters: optimizer_type: \[trainer.command\] never tells it"):
            TRAINER.plan(bench.params, bench.trial, bench.run)
        drawn = {**bench.params.parameters, "optimizer_type": "AdamW", "network_alpha_ratio": 0.5}
        params = bench.params.model_copy(update={"parameters": drawn, "derived": ("network_alpha",)})
        options = {**bench.run.trainer.options, "unused": ["optimizer_type"]}
        run = bench.run.model_copy(update={"trainer": bench.run.trainer.model_copy(update={"options": options})})
        with pytest.raises(UserError, match=r"network_alpha_ratio: "):
            TRAINER.plan(params, bench.trial, run)


@pytest.mark.parametrize("cwd", ["tools", "{trial}/tools"])
def test_a_folder_that_depends_on_where_the_daemon_is_started_is_refused(tmp_path: Path, cwd: str):
    with (
        Bench(tmp_path, "command", f"{COMMAND}cwd = '{cwd}'\n") as bench,
        pytest.raises(SettingsError, match=r"cwd: '(1|tools)\S* will not do; write its whole path, or one that begins"),
    ):
        bench.plugin.plan(bench.params, bench.trial, bench.run)


def test_pictures_that_are_held_out_must_not_be_within_the_program_s_reach(tmp_path: Path):
    def planned(word: str, **more: object) -> object:
        options = {**bench.run.trainer.options, **more}
        options["command"] = [*options["command"], word]
        trainer = bench.run.trainer.model_copy(update={"options": options})
        held = StudyPictures(held_out=(Picture(path="/a.png", sha256="0" * 64),))
        run = bench.run.model_copy(update={"trainer": trainer, "pictures": held})
        return TRAINER.plan(bench.params, bench.trial, run)

    with Bench(tmp_path, "command", COMMAND) as bench:
        assert planned("{dataset_dir}")
        assert planned("{dataset_config}", holds_out=True)
        for word in ("{dataset_config}", "{dataset_dir} {dataset_config}", "--data=/my/pictures"):
            with pytest.raises(SettingsError, match=r"measures likeness to 1 pictures .*\{dataset_dir\}.*holds_out"):
                planned(word)


def test_the_picture_folder_has_every_picture_but_the_held_out_and_follows_the_data_set(tmp_path: Path):
    from PIL import Image

    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        for name in ("one", "two"):
            Image.new("RGB", (8, 8), (number * 90, len(name + folder) * 9, ord(name[0]))).save(
                tmp_path / folder / f"{name}.png"
            )
            (tmp_path / folder / f"{name}.txt").write_text(f"{folder} {name}\nmore")
    (tmp_path / "b/two.txt").unlink()
    config = tmp_path / "dataset.toml"
    config.write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\n'
        '[[datasets.subsets]]\nimage_dir = "b"\nclass_tokens = "a thing"\n'
        '[[datasets.subsets]]\nimage_dir = "nowhere"\nis_reg = true\n'
    )
    out = tmp_path / "out"
    held_out = file_digest(tmp_path / "a/one.png", "--dataset-config")
    make_picture_folder(config, out, {held_out})
    assert sorted(path.name for path in out.iterdir()) == [
        "01_two.png", "01_two.txt", "02_one.png", "02_one.txt", "02_two.png", "02_two.txt", "metadata.jsonl",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert rows[-1] == {"file_name": "02_two.png", "text": "a thing"}
    assert (out / "01_two.txt").read_text() == "a two\n"
    assert (out / "01_two.png").read_bytes() == (tmp_path / "a/two.png").read_bytes()
    before = (out / "01_two.txt").stat().st_ino
    (tmp_path / "b/one.png").unlink()
    (out / "_latent_cache").mkdir()  # the program's own
    (out / "latest").symlink_to("_latent_cache")
    for name in ("_latent_cache/01_two.safetensors", "02_one.npz", "notes.txt"):
        (out / name).write_text("mine")
    make_picture_folder(config, out, set())
    assert [(out / name).exists() for name in ("_latent_cache/01_two.safetensors", "02_one.npz", "notes.txt")] == [
        True, True, True,
    ]  # fmt: skip
    assert (out / "latest").is_symlink()
    assert not (out / "02_one.txt").exists()
    assert sorted(path.name for path in out.glob("*.png")) == ["01_one.png", "01_two.png", "02_two.png"]
    assert (out / "01_two.txt").stat().st_ino == before


def captions_of(folder: Path, subset: str) -> list[str]:
    """What the program gets to read of a data set of one picture, whose caption is `ball.txt`."""
    config = folder / "dataset.toml"
    config.write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'pictures'\n{subset}\n")
    check_pictures(config)
    make_picture_folder(config, folder / "out", set())
    (row,) = map(json.loads, (folder / "out/metadata.jsonl").read_text().splitlines())
    return [(folder / "out/01_ball.txt").read_text(), row["text"]]


@pytest.fixture
def ball(tmp_path: Path) -> Path:
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/ball.png")
    (tmp_path / "pictures/ball.txt").write_text("a ball\nmore\n")
    return tmp_path


@pytest.mark.parametrize("extension", [".txt", "txt"])
def test_a_caption_reaches_the_program_with_its_prefix_and_suffix(ball: Path, extension: str):
    prefixed = f"caption_extension = '{extension}'\ncaption_prefix = 'zwx,'\ncaption_suffix = ', best'"
    assert captions_of(ball, prefixed) == ["zwx, a ball , best\n", "zwx, a ball , best"]
    (ball / "pictures/ball.txt").unlink()
    assert captions_of(ball, f"{prefixed}\nclass_tokens = 'thing'")[1] == "zwx, thing , best"


@pytest.mark.parametrize("text", ["", "\nbelow\n", " \n"])
def test_an_empty_caption_is_refused(ball: Path, text: str):
    (ball / "pictures/ball.txt").write_text(text)
    with pytest.raises(UserError, match=r"ball\.txt: its first line is empty; write the caption of ball\.png into it"):
        captions_of(ball, "caption_extension = '.txt'\ncaption_prefix = 'zwx'")


# ------------------------------------------------------------------------------------------------------- collecting


def job_in(folder: Path, **changes: object) -> Job:
    (folder / "out").mkdir(exist_ok=True)
    values = {
        "command": ("true",), "cwd": folder, "stop_signal": "SIGTERM", "output_dir": folder / "out",
        "trial_dir": folder, "output_name": "lora_trial_1", "epochs": 4, "steps_per_epoch": 10, "first_epoch": 1,
        "checkpoints": ("s{step}.safetensors",), "final": None, "state": None, "progress": (),
    }  # fmt: skip
    return Job.model_validate({**values, **changes})


@pytest.fixture
def trial(tmp_path: Path) -> TrialLayout:
    folder = tmp_path / "trial_0001"
    folder.mkdir()
    return TrialLayout(folder)


@pytest.mark.parametrize(
    ("step", "epoch"), [(10, 1), (9, 1), (11, 1), (14, 1), (15, 2), (20, 2), (1, 1)], ids=lambda number: str(number)
)
def test_a_step_belongs_to_the_epoch_whose_end_is_nearest(trial: TrialLayout, step: int, epoch: int):
    assert Delivery(job_in(trial.folder)).epoch_of(Match(Path(), "step", step)) == epoch


def test_files_that_count_epochs_from_0_are_told_apart(trial: TrialLayout):
    delivery = Delivery(job_in(trial.folder, first_epoch=0))
    assert delivery.epoch_of(Match(Path(), "epoch", 0)) == 1


def test_a_file_is_brought_only_when_it_is_whole_and_has_rested(trial: TrialLayout):
    delivery, content = Delivery(job_in(trial.folder)), lora(1, 0.5)
    source = trial.folder / "out/s10.safetensors"
    for size in (0, 7, 100, len(content) - 1, len(content)):
        source.write_bytes(content[:size])
        assert delivery.collect() == []  # the first look at these bytes
        brought = delivery.collect()
        assert brought == ([trial.intermediate_checkpoint(1)] if size == len(content) else [])
    assert trial.intermediate_checkpoint(1).read_bytes() == content
    assert delivery.collect() == []
    assert sorted(path.name for path in trial.folder.iterdir()) == ["lora_trial_1-000001.safetensors", "out"]


def test_a_file_that_is_written_again_is_brought_again_and_never_changes_under_a_reader(trial: TrialLayout):
    delivery, source = Delivery(job_in(trial.folder)), trial.folder / "out/s10.safetensors"
    source.write_bytes(lora(1, 0.5))
    delivery.collect(), delivery.collect()
    target = trial.intermediate_checkpoint(1)
    with target.open("rb") as reader:
        time.sleep(0.02)
        source.write_bytes(lora(1, 0.75))  # in place
        delivery.collect(), delivery.collect()
        assert reader.read() == lora(1, 0.5)
    assert target.read_bytes() == lora(1, 0.75)


def test_a_file_from_the_future_is_brought_once(trial: TrialLayout):
    delivery, source = Delivery(job_in(trial.folder)), trial.folder / "out/s10.safetensors"
    source.write_bytes(lora(1, 0.5))
    os.utime(source, (2e9, 2e9))
    assert [len(delivery.collect()) for _ in range(4)] == [0, 1, 0, 0]


def test_links_to_elsewhere_and_what_is_no_weight_file_are_never_brought(trial: TrialLayout, tmp_path: Path):
    delivery = Delivery(job_in(trial.folder, final="*.safetensors"))
    (tmp_path / "elsewhere.safetensors").write_bytes(lora(1, 0.5))
    (trial.folder / "out/s10.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    (trial.folder / "out/s20.safetensors").write_bytes(struct.pack("<Q", 4) + b"oops")
    delivery.collect(), delivery.collect()
    assert trial.list_checkpoints() == []
    assert {path.name: "symbolic link" in reason for path, reason in delivery.refused.items()} == {
        "s10.safetensors": True,
        "s20.safetensors": False,
    }


def test_the_numbered_file_of_the_last_epoch_is_the_final_one_when_there_is_no_other(trial: TrialLayout):
    delivery = Delivery(job_in(trial.folder))
    for step in (30, 40):
        (trial.folder / f"out/s{step}.safetensors").write_bytes(lora(step, 0.5))
    delivery.collect(), delivery.collect()
    assert [path.name for path in trial.list_checkpoints()] == ["lora_trial_1-000003.safetensors"]
    assert delivery.collect_final() == trial.final_checkpoint
    assert trial.final_checkpoint.read_bytes() == lora(40, 0.5)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("**/w{step}.x", {"w1.x": 1, "a/w2.x": 2, "w4.x": 4, "a/b/w10.x": 10}),
        ("*/w{step}.x", {"a/w2.x": 2}),
        ("w{epoch}.x", {"w1.x": 1, "w4.x": 4}),
        ("w[{epoch}]?.x", {"w[3]?.x": 3}),
    ],
)
def test_a_pattern_finds_files_in_the_order_of_their_numbers(tmp_path: Path, pattern: str, found: dict[str, int]):
    for name in ("w1.x", "a/w2.x", "a/b/w10.x", "wx.x", "w1xx", "w[3]?.x", "w4.x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    matches = Pattern(pattern).find(tmp_path)
    assert {match.path.relative_to(tmp_path).as_posix(): match.number for match in matches} == found
    assert [match.number for match in matches] == sorted(found.values())


# --------------------------------------------------------------------------------------------------- the whole process


def faulty(fault: str, **changes: str) -> str:
    text = COMMAND.replace('"--fault", ""', f'"--fault", "{fault}"')
    return text + "".join(f'{key} = "{value}"\n' for key, value in changes.items())


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("exits with 3", 3, "the training ended with exit status 3; mend what the end of its log names"),
        ("is killed", 137, "killed too often"),
        ("saves no final checkpoint", 2, r"exit status 0 but without a whole file for final = "
         r"'pytorch_lora_weights.safetensors'; correct that in \[trainer.command\], or make it save there: it left "
         r"checkpoint-6/pytorch_lora_weights.safetensors"),
        ("saves half", 2, "without a whole file for final"),
    ],
)  # fmt: skip
def test_a_program_that_goes_wrong_is_told_with_its_own_status(tmp_path: Path, fault: str, status: int, reason: str):
    # With checkpoints the one of the last epoch would do.
    table = re.sub(r"(?m)^checkpoints = .*$", "", faulty(fault))
    with Bench(tmp_path, "command", table, max_train_epochs=1) as bench:
        bench.start()
        assert bench.finish().exit_status == status, bench.log
        assert re.search(reason, bench.runner.why_failed(bench.live)), bench.runner.why_failed(bench.live)
        assert not bench.trial.final_checkpoint.exists()


def test_a_program_that_is_not_there_any_longer_is_named(tmp_path: Path):
    with Bench(tmp_path, "command", COMMAND.replace(sys.executable, "/nowhere/python")) as bench:
        bench.start()
        assert bench.finish().exit_status == 127
        assert "'/nowhere/python' cannot be started (No such file or directory); install it" in bench.runner.why_failed(
            bench.live
        )


def test_a_folder_to_run_in_that_is_not_there_any_longer_is_named(tmp_path: Path):
    with Bench(tmp_path, "command", f"{COMMAND}cwd = '{tmp_path}/gone'\n") as bench:
        bench.start()
        assert bench.finish().exit_status == 127
        why = bench.runner.why_failed(bench.live)
    assert f"'{tmp_path}/gone' cannot be entered (No such file or directory); make it, or correct" in why


@pytest.mark.parametrize("fault", ["says done when interrupted", "hears nothing but SIGINT"])
def test_a_program_that_ends_at_sigint_gets_sigint_and_counts_as_stopped(tmp_path: Path, fault: str):
    with Bench(tmp_path, "command", faulty(fault, stop_signal="SIGINT")) as bench:
        bench.start()
        bench.wait_for_step(2)
        report = bench.stop()
        assert report is not None and report.killed == report.survivors == ()
        assert signal_of(bench.record) == signal.SIGTERM, bench.log
        assert bench.strays() == {} and not bench.trial.final_checkpoint.exists()


def test_a_signal_to_the_collecting_process_alone_reaches_the_program(tmp_path: Path):
    with Bench(tmp_path, "command", COMMAND) as bench:
        bench.start()
        bench.wait_for_step(2)
        [collector] = [
            pid
            for pid, line in bench.strays().items()
            if "optimizer_daemon.collecting" in line and "supervise" not in line
        ]
        os.kill(collector, signal.SIGTERM)
        assert signal_of(bench.finish()) == signal.SIGTERM, bench.log
        assert bench.strays() == {}


def test_a_killed_collecting_process_leaves_no_program_behind(tmp_path: Path):
    with Bench(tmp_path, "command", COMMAND) as bench:
        bench.start()
        bench.wait_for_step(2)
        [collector] = [
            pid
            for pid, line in bench.strays().items()
            if "optimizer_daemon.collecting" in line and "supervise" not in line
        ]
        os.kill(collector, signal.SIGKILL)
        bench.stop()
        assert bench.strays() == {}
        for path in bench.trial.list_checkpoints():
            read_checkpoint(path, bench.trial.folder)

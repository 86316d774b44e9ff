"""What a start of the command trainer says to bad input."""

from __future__ import annotations

from collections.abc import Callable

from examples.tiny_world.paths import DATASET_TOML
from tests.scenarios.bad_input import Case, World

COMMAND = 'command = "true {learning_rate} {network_dim} {network_alpha} {optimizer_type} {max_train_epochs}"'


def command(table: str, *words: object) -> Callable[[World], list[str]]:
    """A study that another program is to train, with this [trainer.command] table."""

    def spoil(world: World) -> list[str]:
        with world.study_file.open("a") as file:
            file.write(f"[trainer.command]\n{table}\n")
        return world.optimizer("--trainer", "command", *words)

    return spoil


def tabled(world: World, trainer: str) -> World:
    """Give its study file a table of this trainer."""
    with world.study_file.open("a") as file:
        file.write(f"[trainer.{trainer}]\nnetwork_dim = 8\n")
    return world


def and_final(table: str) -> Callable[[World], list[str]]:
    return command(f'final = "*.safetensors"\n{table}')


BY_PROGRAM = [
    Case(
        "command: no command",
        ("[trainer.command] command: None will not do", "write the command line"),
        command('final = "x"'),
    ),
    Case(
        "command: a misspelt key",
        ("[trainer.command] finals: 'x'", "did you mean 'final'?"),
        command(f'{COMMAND}\nfinals = "x"'),
    ),
    Case(
        "command: no such program",
        ("[trainer.command] command: 'no-such-trainer'", "there is no such program"),
        and_final('command = "no-such-trainer"'),
    ),
    Case(
        "command: a program that depends on where the daemon is started",
        ("[trainer.command] command: 'bin/train'", "without cwd write its whole path", "begins with ./"),
        and_final(COMMAND.replace("true ", "bin/train ")),
    ),
    Case(
        "command: a folder that depends on where the daemon is started",
        ("[trainer.command] cwd: 'tools'", "write its whole path", "begins with ./"),
        and_final(f'{COMMAND}\ncwd = "tools"'),
    ),
    Case(
        "command: two stars within a name",
        ("[trainer.command] final: 'out**.safetensors'", "write ** alone between two /"),
        command(f'{COMMAND}\nfinal = "out**.safetensors"'),
    ),
    Case(
        "command: half a picture",
        ("01_red_cube.png",),
        lambda world: (
            (picture := world.pictures / "01_red_cube.png").write_bytes(picture.read_bytes()[:100]),
            and_final(COMMAND.replace("true ", "true {dataset_dir} "))(world),
        )[1],
    ),
    Case(
        "command: a table of a trainer that does not train",
        ("study.toml", "trainer.kohya: ", "native trains, which does not read it", "--trainer kohya"),
        lambda world: tabled(world, "kohya").optimizer(),
    ),
    Case(
        "command: a table of a misspelt trainer",
        ("study.toml", "trainer.kohyaa: ", "there is no such trainer; did you mean kohya?"),
        lambda world: tabled(world, "kohyaa").optimizer("--trainer", "native"),
    ),
    Case(
        "command: a Python nobody named",
        ("--trainer-python: None", "{python}"),
        and_final('command = "{python} train.py"'),
    ),
    Case(
        "command: no such folder", ("cwd: '/nowhere'", "that is no folder"), and_final(f'{COMMAND}\ncwd = "/nowhere"')
    ),
    Case(
        "command: another card than the leased one",
        ("[trainer.command] env: ", "CUDA_VISIBLE_DEVICES is the daemon's to set", "--device"),
        and_final(f'{COMMAND}\nenv = {{ CUDA_VISIBLE_DEVICES = "1" }}'),
    ),
    Case(
        "command: an unknown placeholder",
        ("[trainer.command] command: '{learning_rte}'", "did you mean 'learning_rate'?"),
        and_final(COMMAND.replace("{learning_rate}", "{learning_rte}")),
    ),
    Case(
        "command: a parameter that the program is never told",
        ("space.toml: trial parameters: network_dim: [trainer.command] never tells it", "{network_dim}"),
        and_final(COMMAND.replace(" {network_dim}", "")),
    ),
    Case(
        "command: a pattern that leaves the folder",
        ("[trainer.command] final: ", "/../x' will not do", "below {output_dir}"),
        command(f'{COMMAND}\nfinal = "../x"'),
    ),
    Case(
        "command: steps that nobody can turn into epochs",
        ("steps_per_epoch: None", "write how many make an epoch"),
        and_final(f'{COMMAND}\ncheckpoints = "c-{{step}}.safetensors"'),
    ),
    Case(
        "command: nothing to collect",
        ("[trainer.command] final: None", "write where the program saves its weights"),
        command(COMMAND),
    ),
    Case(
        "command: a quotation without end",
        ('[trainer.command] command: "true \'x" will not do', "No closing quotation"),
        and_final('command = "true \'x"'),
    ),
    Case(
        "command: an empty caption",
        ("01_red_cube.txt: its first line is empty", "write the caption of 01_red_cube.png into it"),
        lambda world: (
            (world.pictures / "01_red_cube.txt").write_text(""),
            and_final(COMMAND.replace("true ", "true {dataset_dir} "))(world),
        )[1],
    ),
    Case(
        "command: a picture without caption",
        ("01_red_cube.png has no caption", "01_red_cube.txt is missing", "class_tokens"),
        lambda world: (
            (world.pictures / "01_red_cube.txt").unlink(),
            and_final(COMMAND.replace("true ", "true {dataset_dir} "))(world),
        )[1],
    ),
    Case(
        "command: likeness to pictures that it may have trained on",
        ("[trainer.command] command: ", "likeness to 4 pictures", "{dataset_dir}", "holds_out = true"),
        command(f'{COMMAND}\nfinal = "*.safetensors"', "--scoring", "recommended", "--dataset-config", DATASET_TOML),
    ),
]

"""What every trainer must do, whoever wrote it; each test runs for each trainer of the registry."""

from __future__ import annotations

import builtins
import io
import os
import random
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

from examples.tiny_world.paths import BASE_MODEL
from optimizer_daemon.lifecycle import signal_of
from optimizer_daemon.remains import set_aside
from optimizer_daemon.trainers import TRAINERS
from shared.errors import UserError
from shared.layout import StudyLayout, writer_of
from shared.safetensors_file import read_checkpoint
from tests.optimizer_daemon.trainers.bench import STEPS_PER_EPOCH, Bench

PROGRAM = Path(__file__).with_name("other_program.py")
COMMAND = f"""
[trainer.command]
command = ["{sys.executable}", "-S", "{PROGRAM}", "--out", "{{output_dir}}", "--steps", "{{max_train_steps}}",
    "--save_every", "{{save_every_n_steps}}", "--lr", "{{learning_rate}}", "--rank", "{{network_dim}}", "--fault", ""]
unused = ["network_alpha", "optimizer_type"]
steps_per_epoch = {STEPS_PER_EPOCH}
checkpoints = "checkpoint-{{step}}/pytorch_lora_weights.safetensors"
final = "pytorch_lora_weights.safetensors"
state = "checkpoint-{{step}}/state.json"
resume = ["--resume", "{{state_dir}}"]
"""


KOHYA = """
sd_scripts_dir = "{checkout}"
trainer_python = "{python}"
model_family = "sd15"
[trainer.kohya]
max_data_loader_n_workers = 0
mixed_precision = "no"
"""


@dataclass(frozen=True)
class Case:
    """One trainer on the bench.

    Args:
        table: its lines of the study file, those of [optimizer] first.
        broken: the same, so that the training fails by itself.
        removed: a file of the study without which it does.
        why: what that failure is called.
        exact: whether a training that was stopped ends with the weights of one that was not.
        asks: whether only its program knows its parameters; then the start check asks it, not the plan.
    """

    table: str = ""
    broken: str = ""
    removed: str = ""
    why: str = ""
    exact: bool = True
    asks: bool = False


CASES = {
    "native": Case(
        removed="dataset.toml",
        why="dataset.toml: could not be read (No such file or directory); correct the path or its permissions",
    ),
    "command": Case(
        table=COMMAND,
        broken=COMMAND.replace('"--fault", ""', '"--fault", "crashes"'),
        why="the training crashed with ValueError: 3 is no rank (exit status 1); mend what the traceback",
    ),
    "kohya": Case(
        table=KOHYA,
        broken=f"{KOHYA}network_weights = '/nowhere/lora.safetensors'\n",
        why='the training crashed with FileNotFoundError: No such file or directory: "/nowhere/lora.safetensors"',
        exact=False,
        asks=True,
    ),
}


def test_every_registered_trainer_is_on_the_bench():
    assert set(TRAINERS.names) == set(CASES)


@dataclass(frozen=True)
class Place:
    """What a trainer needs besides its table, such as a program: made once.

    Args:
        base: the base model.
        words: for the {placeholders} of KOHYA.
    """

    base: Path
    words: Mapping[str, object]

    def bench(self, root: Path, name: str, *, broken: bool = False, beside: Bench | None = None) -> Bench:
        """Return a bench of the trainer."""
        table = CASES[name].broken if broken else CASES[name].table
        for word, value in self.words.items():
            table = table.replace(f"{{{word}}}", str(value))
        return Bench(root, name, table, base=self.base, beside=beside)


@pytest.fixture(scope="module")
def place(name: str, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Where the trainer can train."""
    if name != "kohya":
        return Place(BASE_MODEL, {})
    if missing := [variable for variable in ("SD_SCRIPTS_DIR", "SD_SCRIPTS_PYTHON") if variable not in os.environ]:
        pytest.skip(f"kohya's own program trains, and is not here: {', '.join(missing)} not set")
    from tests.kohya.narrow_world import make_world

    checkout, python = Path(os.environ["SD_SCRIPTS_DIR"]).absolute(), os.environ["SD_SCRIPTS_PYTHON"]
    world = make_world(tmp_path_factory.mktemp("kohya"), checkout, python)
    return Place(world.base, {"checkout": world.checkout, "python": world.python})


@pytest.fixture(scope="module")
def trained(name: str, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A training of two epochs that nobody disturbed."""
    with place.bench(tmp_path_factory.mktemp(f"{name}_trained"), name) as bench:
        bench.start()
        assert bench.finish().exit_status == 0, bench.log
        bench.follow()
        yield bench


@pytest.fixture
def planning(name: str, tmp_path: Path) -> Iterator[Bench]:
    """A bench on which nothing trains."""
    with Bench(tmp_path, name, CASES[name].table) as bench:
        yield bench


@pytest.fixture
def bench(name: str, place: Place, tmp_path: Path, trained: Bench) -> Iterator[Bench]:
    with place.bench(tmp_path, name, beside=trained) as bench:
        yield bench


@pytest.mark.parametrize("name", CASES, scope="module")
class TestContract:
    """The contract. Equal for all: nothing here asks which trainer it is but its Case."""

    def test_a_plan_looks_at_no_file(self, name: str, planning: Bench, monkeypatch: pytest.MonkeyPatch):
        trial = StudyLayout(Path("/nonexistent/study")).trial(1)
        planning.plugin.plan(planning.params, trial, planning.run)  # what it imports, it may read

        def looked(*arguments: object, **_: object) -> None:
            raise AssertionError(f"it looked at {arguments[0]}")

        for module, names in ((os, "stat lstat open listdir scandir access"), (io, "open"), (builtins, "open")):
            for function in names.split():
                monkeypatch.setattr(module, function, looked)
        try:
            plans = [planning.plugin.plan(planning.params, trial, planning.run, gpu="GPU-7f") for _ in range(2)]
        finally:
            monkeypatch.undo()
        assert plans[0] == plans[1]
        assert plans[0].env["CUDA_VISIBLE_DEVICES"] in ("GPU-7f", "")  # the study says device = "cpu"
        assert all(PurePosixPath(path).parts[0] != ".." and not Path(path).is_absolute() for path in plans[0].files)

    def test_a_parameter_nobody_reads_is_refused(self, name: str, planning: Bench):
        if CASES[name].asks:
            pytest.skip("its program is asked at the start of a study, by check_input")
        wrong = planning.params.model_copy(update={"parameters": {**planning.params.parameters, "network_dimm": 4}})
        with pytest.raises(UserError, match=r"^trial parameters: network_dimm: .*search space"):
            planning.plugin.plan(wrong, planning.trial, planning.run)

    def test_its_files_have_the_names_of_the_contract(self, name: str, trained: Bench):
        trial = trained.trial
        assert trained.checkpoints == [trial.intermediate_checkpoint(1).name, trial.final_checkpoint.name]
        for path in trial.list_checkpoints():
            read_checkpoint(path, trial.folder)
        for path in trial.folder.rglob("*"):
            if path.is_file():
                relative = PurePosixPath(path.relative_to(trained.study.root).as_posix())
                assert writer_of(relative) in ("trainer", "optimizer")
        assert trained.runner.ended_well(trained.live)

    def test_it_tells_how_far_it_is(self, name: str, trained: Bench):
        progress = trained.live.progress
        assert progress is not None, trained.log
        assert (progress.step, progress.steps) == (2 * STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH)
        assert progress.loss is not None and progress.loss > 0
        assert trained.plugin.parse_progress("a line that tells nothing") is None

    def test_stopped_at_random_steps_it_leaves_no_process_and_goes_on(self, name: str, bench: Bench, trained: Bench):
        rng = random.Random(6)
        # A bar moves once a second at most, which may be all of the second epoch: it is stopped when it is announced.
        for step in (rng.randint(1, STEPS_PER_EPOCH), STEPS_PER_EPOCH):
            bench.start()
            bench.wait_for_step(step)
            report = bench.stop()
            assert report is not None and report.killed == report.survivors == ()
            assert bench.strays() == {}
            assert signal_of(bench.record) == signal.SIGTERM, bench.log
            for path in bench.trial.list_checkpoints():
                read_checkpoint(path, bench.trial.folder)
            assert not bench.trial.final_checkpoint.exists()
            if bench.plugin.resume_point(bench.trial) is None:
                set_aside(bench.trial)
        point = bench.plugin.resume_point(bench.trial)
        assert point is not None and point.state.exists()
        bench.start()
        assert bench.finish().exit_status == 0, bench.log
        assert bench.checkpoints == trained.checkpoints
        assert bench.runner.ended_well(bench.live)
        if CASES[name].exact:
            for file in trained.checkpoints:
                found, expected = (read_checkpoint(b.trial.folder / file, b.trial.folder) for b in (bench, trained))
                assert found.sha256 == expected.sha256, file

    def test_a_failure_is_explained_with_its_remedy(self, name: str, place: Place, tmp_path: Path, trained: Bench):
        with place.bench(tmp_path, name, broken=True, beside=trained) as bench:
            if CASES[name].removed:
                (tmp_path / CASES[name].removed).unlink()
            bench.start()
            assert bench.finish().exit_status not in (0, None), bench.log
            bench.follow()
            reason = bench.runner.why_failed(bench.live)
        assert CASES[name].why in reason
        assert "; it ended " in reason and f"last lines of {bench.trial.training_log}: " in reason
        assert not bench.trial.final_checkpoint.exists()

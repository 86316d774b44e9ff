"""What the real commands say to every kind of bad input: one line, an exit code, and nothing on disk harmed.

Each case is a small world of its own. All commands are run once, a few at a time, and the tests look at the outcomes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import pytest

from evaluator_daemon.admission import EVALUATOR_CODES
from evaluator_daemon.metrics import METRICS
from shared.files import read_model, write_model
from shared.layout import StudyLayout
from shared.metric_names import NEEDS
from shared.safetensors_file import CODES
from shared.schemas import Run
from tests.scenarios.bad_cases import CASES
from tests.scenarios.bad_input import ROOT, Case, World
from tests.scenarios.forked_command import ForkedCommands

TEXTS = ROOT / "docs" / "troubleshooting.md"
AT_ONCE = 3  # commands
LOCKS_AND_LOGS = re.compile(r".*\.(lock|log)$")


@dataclass(frozen=True)
class Outcome:
    """What one command left behind."""

    code: int
    said: str  # stderr
    printed: str
    before: dict[str, bytes]
    after: dict[str, bytes]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, but for those that any start may touch."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if not LOCKS_AND_LOGS.match(path.name)}


def execute(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=240
    )


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **more}


def run_case(case: Case, folder: Path, made: Path, servers: SimpleQueue[ForkedCommands]) -> Outcome:
    world = World(folder, made if case.study else None)
    command = case.spoil(world)
    before = content(folder)
    server = servers.get()
    try:
        run = server.run if command[:2] == [sys.executable, "-m"] else execute
        done = run(command, environment(**world.variables))
    finally:
        servers.put(server)
        world.release()
    return Outcome(done.returncode, done.stderr, done.stdout, before, content(folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A world whose study was begun and ended at once, by the real command."""
    folder = tmp_path_factory.mktemp("made")
    world = World(folder, None)
    done = execute(world.optimizer(), environment())
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, made, request) -> Callable[[Case], Outcome]:
    """Run the cases that were selected, a few at a time."""
    called = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    wanted = {case.sentence for case in called if isinstance(case, Case)}  # other tests have cases of their own
    chosen = [case for case in CASES if case.sentence in wanted]
    all_servers = [ForkedCommands() for _ in range(AT_ONCE)]
    servers: SimpleQueue[ForkedCommands] = SimpleQueue()
    for server in all_servers:
        servers.put(server)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = threads.map(lambda case: run_case(case, tmp_path_factory.mktemp("world"), made, servers), chosen)
        done = {case.sentence: outcome for case, outcome in zip(chosen, found, strict=True)}
    for server in all_servers:
        server.close()
    return lambda case: done[case.sentence]


def the_error_line(outcome: Outcome) -> str:
    lines = outcome.said.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, outcome.said
    assert lines[-1] == errors[0], outcome.said
    return errors[0]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.sentence)
def test_bad_input_is_one_line_and_harms_nothing(case, outcomes):
    if case.impossible:
        pytest.skip(case.impossible)
    outcome = outcomes(case)
    line = the_error_line(outcome)
    for said in case.says:
        assert said in line
    assert "Traceback" not in outcome.said
    assert (outcome.code, outcome.printed) == (case.code, "")
    assert outcome.after == outcome.before, "a refused command changed files"
    assert documented(line), f"docs/troubleshooting.md lacks: {line}"


# ------------------------------------------------------------------------------------------------------ the document


def patterns() -> list[re.Pattern[str]]:
    """Each line of the document's ```text blocks as a pattern; <words> stand for anything."""
    blocks = re.findall(r"^```text\n(.*?)^```$", TEXTS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    found = []
    for line in lines:
        parts = re.split(r"<[a-z][a-z ,-]*>", line)
        assert len("".join(parts).replace("error: ", "")) >= 12, f"too little of {line!r} is text"
        found.append(re.compile(".+".join(map(re.escape, parts))))
    return found


def documented(line: str) -> bool:
    return any(pattern.fullmatch(line) for pattern in patterns())


@pytest.mark.parametrize("code", [*CODES, *EVALUATOR_CODES])
def test_every_reason_not_to_score_a_file_is_in_the_document(code):
    assert re.search(rf"^\| `{code}` \| .+ \| .+ \|$", TEXTS.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_evaluator_has_a_metric_for_every_name_that_a_study_may_list():
    assert set(METRICS.names) == set(NEEDS)


def test_a_text_that_nobody_wrote_is_not_taken_for_a_documented_one():
    assert not documented("error: --colour: 'red' is out of fashion; wear green")
    assert len(patterns()) > 50


# ------------------------------------------------------------------------------------------- after the input is mended


def finished_start(world: World) -> Run:
    done = execute(world.optimizer(), environment())
    assert done.returncode == 0, done.stderr
    return read_model(StudyLayout(world.study).run, Run)


def test_a_first_start_that_was_refused_goes_through_once_the_input_is_mended(tmp_path):
    world = World(tmp_path, None)
    caption = world.pictures / "00_red_ball.txt"
    text = caption.read_text()
    caption.unlink()
    refused = execute(world.optimizer("--storage", f"sqlite:///{tmp_path}/nowhere/study.db"), environment())
    assert refused.returncode == 2
    caption.write_text(text)
    refused = execute(world.optimizer("--storage", f"sqlite:///{tmp_path}/nowhere/study.db"), environment())
    assert "--storage" in refused.stderr
    assert finished_start(world).storage == f"sqlite:///{world.study}/optuna_study.db"


@pytest.mark.parametrize(
    ("free_kilobytes", "says"),
    [
        pytest.param(0, "run.json: could not be written (No space left on device); free space", id="run.json"),
        pytest.param(40, "; free space or repair the disk, then the same command goes on", id="the database"),
    ],
)
@pytest.mark.skipif(bool(World.no_mounts), reason=World.no_mounts or "mounts work here")
def test_a_full_disk_at_the_first_start_leaves_no_half_made_study(tmp_path, free_kilobytes, says):
    world = World(tmp_path, None)
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = " ".join(world.optimizer("--output-dir", f"{mounted}/study"))
    script = f"""
        mount -t tmpfs -o size=1m tmpfs {mounted}
        mkdir {mounted}/study
        head -c {1024 * (1024 - free_kilobytes)} /dev/zero > {mounted}/filler
        {command}; echo "code $?"
        ls -A {mounted}/study
        rm {mounted}/filler
        {command}; echo "code $?"
    """
    done = execute([*World.unshare, "sh", "-c", script], environment())
    first, _, second = done.stdout.partition("code 4\n")
    assert first == "", done.stdout
    left, _, after = second.partition("0 of 30 trials")
    assert set(left.split()) <= {"optimizer.lock", "optimization.log"}
    assert after.endswith("code 0\n"), done.stdout
    assert says in done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert documented(line), line
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------- the two younger settings


def test_a_study_that_measures_less_or_draws_at_random_records_it_and_says_so_on_change(tmp_path):
    world = World(tmp_path, None, clip=False)
    done = execute(world.optimizer("--sampler", "random", "--metrics", "pixels"), environment())
    assert done.returncode == 0, done.stderr
    run = read_model(StudyLayout(world.study).run, Run)
    assert run.plan is not None
    assert (run.settings["sampler"], run.plan.scoring.values["metrics"]) == ("random", "pixels")
    changed = execute(world.optimizer("--metrics", "pixels"), environment())
    assert "--sampler: random -> tpe" in changed.stderr
    assert changed.returncode == 2


def test_a_study_from_before_these_settings_goes_on_with_their_defaults(tmp_path, made):
    world = World(tmp_path, made)
    layout = StudyLayout(world.study)
    run = read_model(layout.run, Run)
    older = {name: value for name, value in run.settings.items() if name not in ("sampler", "metrics")}
    write_model(layout.run, run.model_copy(update={"settings": older}))
    again = finished_start(world)
    assert (again.folder_id, again.plan_hash) == (run.folder_id, run.plan_hash)
    assert again.plan == run.plan

"""A training sees the card that is leased for it, by its name, and no other; on a CPU it sees none."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from shared.errors import DiskError
from tests.optimizer_daemon.trainers.bench import Bench
from tests.optimizer_daemon.trainers.test_contract import COMMAND

CARD = "GPU-8f2c6a31-0000-4000-8000-000000000000"
_SAYS = "import os, sys; print('sees', ascii(os.environ['CUDA_VISIBLE_DEVICES']), 'as', sys.argv[1])"
SAYS = COMMAND.replace(
    f'"-S", "{Path(__file__).with_name("other_program.py")}"', f'"-S", "-c", "{_SAYS}", "{{device}}"'
)


@pytest.mark.parametrize(("card", "said"), [(None, "sees '' as cpu"), (CARD, f"sees '{CARD}' as cuda")])
def test_a_program_sees_the_leased_card_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: str | None, said: str
):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")  # the daemon's own, of which card is one
    with Bench(tmp_path, "command", SAYS) as bench:
        bench.gpu = card
        bench.start()
        bench.finish()
        assert said in bench.log


@pytest.mark.parametrize(("card", "device"), [(CARD, "cuda"), (None, "cuda:1")])
def test_the_native_training_counts_from_what_it_sees(tmp_path: Path, card: str | None, device: str):
    with Bench(tmp_path) as bench:
        settings = {**bench.run.settings, "device": "cuda:1"}
        run = bench.run.model_copy(update={"settings": settings})
        plan = bench.plugin.plan(bench.params, bench.trial, run, gpu=card)
    assert tomllib.loads(plan.files["train_config.toml"])["device"] == device
    assert plan.env.get("CUDA_VISIBLE_DEVICES") == card


def test_a_file_of_a_plan_that_finds_no_place_is_told_in_one_line(tmp_path: Path):
    with Bench(tmp_path, "command", COMMAND) as bench:
        bench.trial.command_files.write_text("in the way")
        with pytest.raises(DiskError, match="command: could not be written"):
            bench.start()

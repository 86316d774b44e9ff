"""An evaluator that is killed, crashes or finds the disk full at any place, and what the next one makes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from shared.layout import TrialLayout
from tests.scenarios.lora_files import lora
from tests.scenarios.written_study import (
    PATIENCE_S,
    false_claims,
    lab_in,
    make_trial,
    outcomes,
    records_of,
    verdict,
    verdicts,
)

pytestmark = pytest.mark.timeout(2000)

PLACES = ("admitted", "attempt_written", "rendered", "pictures_written", "metrics_written", "recorded")


def scored_in_spite_of(folder: Path, failpoint: str) -> TrialLayout:
    """Three checkpoints under a daemon whose evaluators die by the failpoint, and where it gives up under another."""
    with lab_in(folder) as lab:
        trial = make_trial(lab.study, 1)
        for epoch in (1, 2, 3):
            trial.intermediate_checkpoint(epoch).write_bytes(lora(90 + epoch))
        if lab.manager("--once", failpoints=failpoint).wait(PATIENCE_S) != 0:
            sound = lab.manager("--once")
            assert sound.wait(PATIENCE_S) == 0, sound.said
        records = records_of(trial)
        assert [record.status for record in records.values()] == ["recorded"] * 3, verdicts(trial)
        assert all(outcomes(record).count("recorded") == 1 for record in records.values())
        assert false_claims(trial) == []
        assert not list(trial.evaluations.folder.rglob(".*tmp*")), "a temporary file is left"
        return trial


@pytest.mark.parametrize(
    "failpoint",
    [
        "evaluator.metrics_written=kill@2",
        pytest.param("files.written=full@12", marks=pytest.mark.slow),
        *(
            pytest.param(f"evaluator.{place}={action}@{time}", marks=pytest.mark.slow)
            for place in PLACES
            for action in ("kill", "crash")
            for time in (1, 2)
        ),
        *(pytest.param(f"files.{p}={a}@{n}", marks=pytest.mark.slow)
          for p in ("written", "replaced") for a in ("kill", "full") for n in (3, 6, 9)),
    ],
)  # fmt: skip
def test_an_evaluator_that_dies_anywhere_leaves_every_checkpoint_recorded_once(tmp_path, failpoint):
    trial = scored_in_spite_of(tmp_path, failpoint)
    ended = {outcome for record in records_of(trial).values() for outcome in outcomes(record)}
    # how an evaluator ended is known to its own manager only
    assert ended <= {"recorded", "interruption", *(["strike"] if "crash" in failpoint else [])}


@pytest.mark.slow
def test_three_crashes_at_one_checkpoint_quarantine_it_and_the_others_are_scored(tmp_path):
    with lab_in(tmp_path) as lab:
        trial = make_trial(lab.study, 1)
        poisoned, later = trial.intermediate_checkpoint(1), trial.intermediate_checkpoint(2)
        poisoned.write_bytes(lora(95))
        crashing = lab.manager("--once", failpoints="evaluator.rendered=crash")
        assert crashing.wait(PATIENCE_S) == 0, crashing.said
        record = records_of(trial)[poisoned.stem]
        assert (verdict(record), outcomes(record)) == ("three_strikes", ["strike"] * 3)
        assert record.quarantine.reason == "3 attempts, the last: the evaluator crashed by SIGSEGV"
        later.write_bytes(lora(96))
        os.utime(poisoned)  # only touched: the same content
        sound = lab.manager("--once")
        assert sound.wait(PATIENCE_S) == 0, sound.said
        assert verdicts(trial) == {poisoned.stem: "three_strikes", later.stem: "recorded"}
        assert false_claims(trial) == []


@pytest.mark.slow
def test_five_interruptions_in_a_row_while_others_succeed_make_a_checkpoint_suspect(tmp_path):
    with lab_in(tmp_path) as lab:
        trial = make_trial(lab.study, 1)
        first, second = trial.intermediate_checkpoint(1), trial.intermediate_checkpoint(2)
        first.write_bytes(lora(97))
        assert lab.manager("--once").wait(PATIENCE_S) == 0
        second.write_bytes(lora(98))
        while verdict(records_of(trial).get(second.stem)) != "suspect":
            killed = lab.manager("--once", failpoints="evaluator.rendered=kill")
            killed.wait(PATIENCE_S)
            assert len(records_of(trial)[second.stem].attempts) <= 5
        record = records_of(trial)[second.stem]
        assert outcomes(record) == ["interruption"] * 5
        assert verdict(records_of(trial)[first.stem]) == "recorded"


@pytest.mark.slow
def test_on_a_full_disk_nothing_is_recorded_falsely_and_with_room_again_it_goes_on(tmp_path):
    with lab_in(tmp_path) as lab:
        trial = make_trial(lab.study, 1)
        for epoch in (1, 2):
            trial.intermediate_checkpoint(epoch).write_bytes(lora(100 + epoch))
        assert lab.manager("--once").wait(PATIENCE_S) == 0
        shutil.rmtree(trial.evaluations.folder)
        trial.evaluations.folder.mkdir()
        disk = str(trial.evaluations.folder)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", disk], check=False).returncode != 0:
            pytest.skip("only root may mount a small disk")
        try:
            assert lab.manager("--once").wait(PATIENCE_S) == 4
            assert "recorded" not in verdicts(trial).values() or false_claims(trial) == []
            subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
            assert lab.manager("--once").wait(PATIENCE_S) == 0
            assert [outcomes(record) for record in records_of(trial).values()] == [["recorded"]] * 2
            assert false_claims(trial) == []
        finally:
            subprocess.run(["umount", disk], check=True)

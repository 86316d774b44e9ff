"""Weight files of every bad kind under a real evaluator daemon: each gets its verdict, and what is good is scored."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimizer_daemon.scores import ScoreReader
from shared.files import read_model
from shared.layout import TrialLayout
from shared.locks import FileLock
from shared.safetensors_file import read_checkpoint
from shared.schemas import EvaluationSummary, Metrics, Run
from tests.scenarios.lab import Daemon, Lab, wait_until
from tests.scenarios.lora_files import (
    STANDARD,
    every_module,
    lora,
    parts,
    peft_lora,
    text_encoder,
    text_shapes,
    unet,
    unet_shapes,
)
from tests.scenarios.written_study import (
    LAST_EPOCH,
    PATIENCE_S,
    false_claims,
    lab_in,
    make_trial,
    outcomes,
    records_of,
    set_state,
    verdict,
    verdicts,
)
from tests.shared.weight_files import file_with

pytestmark = pytest.mark.timeout(2000)

LONG_AGO = time.time() - 3600


def bound_by_modes(lab: Lab) -> Daemon:
    """The evaluator daemon, unable to read what its user may not."""
    script = Path(__file__).with_name("unprivileged.py")
    command = [sys.executable, str(script), "-m", "evaluator_daemon.cli", "run", "--config", str(lab.study_file)]
    return Daemon("manager", command, lab.environment(), lab.folder / "manager.out")


# ------------------------------------------------------------------------------------------ one daemon, many bad files


def changed_first(tensors, ending: str, *, data: bytes):
    """The tensors with the data of the first one of that ending replaced."""
    name = next(name for name in tensors if name.endswith(ending))
    dtype, shape, old = tensors[name]
    return {**tensors, name: (dtype, shape, data + old[len(data) :])}


def half_of(things):
    return dict(list(things.items())[::2])


def disagreeing() -> dict:
    tensors = parts(6)
    name = next(iter(every_module()))
    other = parts(6, {name: every_module()[name]}, rank=2)
    return {**tensors, f"{name}.lora_up.weight": other[f"{name}.lora_up.weight"]}


NAN = b"\x00\x7e"
SDXL = {name.replace("lora_te_", "lora_te1_"): shape for name, shape in every_module().items()}
BAD_FILES = {
    "not a number": (file_with(changed_first(parts(1), "up.weight", data=NAN)), "not_finite"),
    "unknown keys": (file_with({**parts(2), "lora_unet_x.dora_scale": ("F16", [1], b"\x00\x3c")}), "unknown_key"),
    "half the keys": (file_with(half_of(parts(3))), "half_pair"),
    "alphas missing in part": (
        file_with({k: v for i, (k, v) in enumerate(parts(4).items()) if i > 30 or not k.endswith("alpha")}),
        "half_pair",
    ),
    "all alphas missing": (lora(5, alpha=None, metadata=STANDARD), "half_pair"),
    "all zero": (lora(6, strength=0.0), "all_zero"),
    "ranks that disagree": (file_with(disagreeing()), "rank_mismatch"),
    "another rank than the trial's": (lora(7, rank=8), "other_network"),
    "another alpha than the trial's": (lora(8, alpha=4.0), "other_network"),
    "half the modules": (lora(9, half_of(every_module())), "half_network"),
    "a prefix nobody knows": (lora(10, {f"unet_{n}": s for n, s in unet().items()}), "not_a_lora"),
    "another family's prefix": (lora(11, SDXL), "half_network"),
    "all modules and one more": (lora(12, {**every_module(), "lora_unet_mid_block_x": (8, 8)}), "not_applied"),
    "diffusers' names": (peft_lora(13, {f"unet.{n}": s for n, s in unet_shapes().items()}), "half_network"),
    "kohya's and diffusers' names": (
        file_with({**parts(14, unet()), "unet.a.lora_A.weight": ("F16", [1, 1], b"\x00\x3c")}),
        "mixed_families",
    ),
    "no weights at all": (b"<html>quota exceeded</html>" * 9, "header_size"),
}
IN_A_FOLDER_OF_ITS_OWN = {
    "block-wise": (lora(20, {n: s for n, s in unet().items() if "down_blocks" in n}, alpha=None), "recorded"),
    "unet-only": (lora(21, unet(), metadata=STANDARD), "recorded"),
    "conv": (lora(22, {"lora_unet_down_blocks_0_resnets_0_conv1": (32, 32, 3, 3), **unet()}, rank=8), "recorded"),
    "peft": (peft_lora(23, {f"unet.{n}": s for n, s in unet_shapes().items()}), "recorded"),
    "peft-text": (peft_lora(24, {f"text_encoder.text_model.{n}": s for n, s in text_shapes().items()}), "recorded"),
    "peft-half": (peft_lora(25, {f"unet.{n}": s for n, s in unet_shapes().items()})[:-100], "incomplete"),
    "peft-unknown": (peft_lora(26, {f"unet.{n}.x": s for n, s in unet_shapes().items()}), "not_applied"),
    "peft-other-model": (peft_lora(27, {f"transformer.{n}": s for n, s in unet_shapes().items()}), "not_applied"),
    "peft-other-strength": (
        peft_lora(
            28,
            {f"unet.{n}": s for n, s in unet_shapes().items()},
            metadata={"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 16}'},
        ),
        "recorded",  # at the strength that its metadata say
    ),
    "other-layers": (lora(29, {f"{n}_x": s for n, s in unet().items()}), "not_applied"),
}


def put_odd_things(trial: TrialLayout, epoch: int) -> dict[str, str]:
    """A truncated file, and what is no file at all; the names with the verdicts they must get."""
    paths = [trial.intermediate_checkpoint(epoch + i) for i in range(5)]
    cut, link, folder, pipe, closed = paths
    cut.write_bytes(lora(30)[:-1])
    link.symlink_to(trial.intermediate_checkpoint(1))
    folder.mkdir()
    os.mkfifo(pipe)
    closed.write_bytes(lora(31))
    closed.chmod(0)
    for path in (cut, closed):
        os.utime(path, (LONG_AGO, LONG_AGO))
    codes = ("incomplete", "symlink", "not_a_file", "not_a_file", "unreadable")
    return {path.stem: code for path, code in zip(paths, codes, strict=True)}


class SlowWriter(threading.Thread):
    """Writes a checkpoint under its final name, 2 KB at a time, as a trainer does that holds its lock."""

    def __init__(self, trial: TrialLayout, duration_s: float) -> None:
        super().__init__()
        self.trial = trial
        self.path = trial.intermediate_checkpoint(1)
        self.duration_s = duration_s
        self.seen_before_whole: set[str] = set()

    def log(self) -> str:
        """What the trial's evaluator has said."""
        return self.trial.evaluation_log.read_text() if self.trial.evaluation_log.exists() else ""

    def run(self) -> None:
        content = lora(40, metadata=STANDARD)
        pieces = [content[start : start + 2048] for start in range(0, len(content), 2048)]
        with FileLock(self.trial.trainer_lock), self.path.open("wb", buffering=0) as file:
            for index, piece in enumerate(pieces):
                if index == 1:  # the daemon has started and looks on
                    wait_until(lambda: "checkpoint waits" in self.log(), PATIENCE_S)
                self.seen_before_whole.add(verdict(records_of(self.trial).get(self.path.stem)))
                file.write(piece)
                time.sleep(self.duration_s / len(pieces))
        set_state(self.trial, "complete")


class Verdicts:
    """What the daemon made of everything."""

    def __init__(self, lab: Lab, slow_s: float) -> None:
        study = lab.study
        self.mixed = make_trial(study, 1)
        self.expected = {}
        self.mixed.intermediate_checkpoint(1).write_bytes(lora(0, metadata=STANDARD))
        for epoch, (what, (content, code)) in enumerate(BAD_FILES.items(), 2):
            path = self.mixed.intermediate_checkpoint(epoch)
            path.write_bytes(content)
            self.expected[what] = path.stem, code
        odd = put_odd_things(self.mixed, len(BAD_FILES) + 2)
        self.closed = self.mixed.folder / f"{list(odd)[-1]}.safetensors"
        self.expected |= {f"{code} {name}": (name, code) for name, code in odd.items()}
        self.mixed.final_checkpoint.write_bytes(lora(99, metadata=STANDARD))

        self.alone = make_trial(study, 2)  # nothing good comes before the halves
        self.alone.intermediate_checkpoint(1).write_bytes(lora(50, unet(), metadata=STANDARD))
        halves = {**half_of(unet()), **half_of(every_module())}
        self.alone.intermediate_checkpoint(2).write_bytes(lora(51, halves, metadata=STANDARD))
        self.alone.final_checkpoint.write_bytes(lora(52, metadata=STANDARD))

        self.silent = make_trial(study, 3)  # no metadata tells of the training
        self.silent.intermediate_checkpoint(1).write_bytes(lora(60, {**half_of(unet()), **text_encoder()}))
        self.silent.final_checkpoint.write_bytes(lora(61))

        self.foreign = TrialLayout(study.root / "trial_foreign")  # no params.json, no trial_state.json
        self.foreign.folder.mkdir()
        for name, (content, _) in IN_A_FOLDER_OF_ITS_OWN.items():
            path = self.foreign.folder / f"{name}.safetensors"
            path.write_bytes(content)
            os.utime(path, (LONG_AGO, LONG_AGO))

        self.written = make_trial(study, 5, "training")
        self.writer = SlowWriter(self.written, slow_s)
        self.plan_hash = read_model(study.run, Run).plan_hash
        self.run(lab)

    def run(self, lab: Lab) -> None:
        self.writer.start()
        manager = bound_by_modes(lab)
        settled = {"recorded", "quarantined", "truncated"}

        def is_done() -> bool:
            assert manager.exit_status is None, manager.said
            trials = (self.mixed, self.alone, self.silent, self.foreign, self.written)
            return all(
                path.stem in (known := records_of(trial)) and known[path.stem].status in settled
                for trial in trials
                for path in trial.list_checkpoints()
            )

        wait_until(lambda: not self.writer.is_alive() and is_done(), PATIENCE_S + self.writer.duration_s)
        self.first = {trial.name: records_of(trial) for trial in (self.mixed, self.alone, self.silent, self.foreign)}
        self.closed.chmod(0o644)
        wait_until(lambda: verdict(records_of(self.mixed)[self.closed.stem]) == "recorded", PATIENCE_S)
        assert manager.stop(timeout_s=PATIENCE_S) == 143
        self.said = manager.said


@pytest.fixture(
    scope="module", params=[15.0, pytest.param(200.0, marks=pytest.mark.slow)], ids=["in seconds", "in minutes"]
)
def judged(tmp_path_factory, request) -> Iterator[Verdicts]:
    with lab_in(tmp_path_factory.mktemp("faults")) as lab:
        yield Verdicts(lab, request.param)


def test_each_bad_checkpoint_ends_in_its_own_verdict_with_a_reason(judged):
    records = judged.first["trial_0001"]
    assert {what: verdict(records[name]) for what, (name, _) in judged.expected.items()} == {
        what: code for what, (_, code) in judged.expected.items()
    }
    for name, _ in judged.expected.values():
        assert len(records[name].quarantine.reason) > 15
        assert not records[name].attempts or records[name].quarantine.code == "not_applied"
        if name != judged.closed.stem:
            assert not judged.mixed.evaluations.checkpoint(name).metrics.exists()


def test_what_is_good_is_scored_exactly_once_whatever_lies_beside_it(judged):
    records = records_of(judged.mixed)
    good = [judged.mixed.intermediate_checkpoint(1).stem, judged.closed.stem, judged.mixed.final_checkpoint.stem]
    assert [outcomes(records[name]) for name in good] == [["recorded"]] * 3
    assert list(read_model(judged.mixed.evaluations.summary, EvaluationSummary).checkpoints) == good
    assert false_claims(judged.mixed) == []


def test_the_optimizer_waits_for_none_of_them(judged):
    scores = ScoreReader(judged.plan_hash, "combined_score").read(judged.mixed, LAST_EPOCH)
    assert scores.seen == scores.recorded
    assert scores.scoring == "scored"


def test_a_half_is_found_without_a_whole_one_beside_it(judged):
    by_name = records_of(judged.alone)
    first, second = (by_name[judged.alone.intermediate_checkpoint(epoch).stem] for epoch in (1, 2))
    assert verdict(first) == verdict(second) == "half_network"
    assert "text_encoder_lr" in first.quarantine.reason
    assert "networks.lora" in second.quarantine.reason
    assert verdict(by_name[judged.alone.final_checkpoint.stem]) == "recorded"


def test_a_half_that_nothing_told_is_taken_back_when_the_whole_one_comes(judged):
    half, whole = judged.silent.intermediate_checkpoint(1).stem, judged.silent.final_checkpoint.stem
    assert verdicts(judged.silent) == {half: "half_network", whole: "recorded"}
    assert whole in records_of(judged.silent)[half].quarantine.reason
    assert false_claims(judged.silent) == []


def test_loras_of_any_making_are_scored_where_no_training_is_known_and_only_what_applies(judged):
    expected = {name: code for name, (_, code) in IN_A_FOLDER_OF_ITS_OWN.items()}
    assert verdicts(judged.foreign) == expected
    assert false_claims(judged.foreign) == []


def test_a_checkpoint_written_slowly_in_place_is_scored_once_when_it_is_whole(judged):
    record = records_of(judged.written)[judged.writer.path.stem]
    assert judged.writer.seen_before_whole == {"no record"}
    assert (record.status, outcomes(record)) == ("recorded", ["recorded"])
    assert re.search(r"checkpoint waits .*code=incomplete", judged.writer.log())
    assert false_claims(judged.written) == []


# --------------------------------------------------------------------------------- files that change under evaluation


def being_evaluated(trial: TrialLayout, name: str) -> bool:
    """Whether the evaluator stands where metrics.json is written and the record is not."""
    record = records_of(trial).get(name)
    path = trial.evaluations.checkpoint(name).metrics
    if record is None or record.status != "evaluating" or not path.exists():
        return False
    return read_model(path, Metrics).checkpoint_sha256 == record.checkpoint_sha256


def test_files_and_folders_that_change_during_their_evaluation(tmp_path):
    with lab_in(tmp_path) as lab:
        trial = make_trial(lab.study, 1)
        replaced, deleted, rewritten, renamed = (trial.intermediate_checkpoint(epoch) for epoch in (1, 2, 3, 4))
        for seed, path in enumerate((replaced, deleted, rewritten, renamed), 70):
            path.write_bytes(lora(seed))
        goes = [tmp_path / f"go{i}" for i in (1, 2, 3, 4)]
        waits = [f"evaluator.metrics_written=wait:{go}@{i}" for i, go in enumerate(goes, 1)]
        manager = lab.manager(failpoints=",".join(waits))

        def at(path: Path, go: Path, change) -> None:
            wait_until(lambda: being_evaluated(trial, path.stem), PATIENCE_S, f"{path.stem}\n{manager.said}")
            change()
            go.touch()

        old_sha = read_checkpoint(replaced, trial.folder).sha256
        at(replaced, goes[0], lambda: replaced.write_bytes(lora(80)))
        at(deleted, goes[1], deleted.unlink)
        at(rewritten, goes[2], lambda: rewritten.write_bytes(lora(72)))
        wait_until(lambda: verdict(records_of(trial).get(rewritten.stem)) == "recorded", PATIENCE_S)
        moved = lab.study.trial(2)
        at(renamed, goes[3], lambda: trial.folder.rename(moved.folder))
        wait_until(
            lambda: list(verdicts(moved).values()) == ["recorded"] * 4, PATIENCE_S, f"{verdicts(moved)}\n{manager.said}"
        )
        assert manager.stop(timeout_s=PATIENCE_S) == 143

        records = records_of(moved)
        assert records[replaced.stem].checkpoint_sha256 != old_sha
        assert outcomes(records[replaced.stem]) == ["recorded"]
        assert outcomes(records[deleted.stem]) == ["recorded"]
        assert "deleted" in records[deleted.stem].attempts[-1].reason
        assert outcomes(records[rewritten.stem]) == ["recorded"], "equal content is not evaluated again"
        assert false_claims(moved) == []
        assert not trial.folder.exists(), "a trial that was renamed must not come back"
        log = moved.evaluation_log.read_text()
        assert re.search(rf"result thrown away .*checkpoint={replaced.stem}", log)
        assert re.search(rf"superseded .*checkpoint={replaced.stem} .*sha256={old_sha[:12]}", log)

"""The native trainer on a real card, forked from the preloaded process as in a study."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from optimizer_daemon.trainers.native import preload_of
from shared.devices import gpu_uuid
from shared.errors import Stopped
from shared.preloaded import Preloaded
from shared.supervised import start_supervised
from tests.evaluator_daemon.tiny_models import save_sdxl_model
from tests.optimizer_daemon.lora_training.tiny_model import save_tiny_model
from tests.optimizer_daemon.lora_training.workshop import StopAt, Workshop

ROOT = Path(__file__).parents[2]
MIB = 2**20


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny_base")


@pytest.fixture(scope="module")
def server(base):
    server = Preloaded(preload_of(base, {}))
    deadline = time.monotonic() + 120
    while not server.settled():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield server
    server.close()


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_a_forked_training_computes_on_the_card_and_gives_its_memory_back(tmp_path, base, server, precision):
    workshop = Workshop(tmp_path, base, tmp_path / "latents")
    config = workshop.configure(device="cuda", mixed_precision=precision, text_encoder_lr=1e-3)
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info()
    training = start_supervised(
        [sys.executable, "-m", "optimizer_daemon.lora_training", "--config", str(config)],
        directory=tmp_path,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu_uuid("cuda"))},  # as the runner starts it
        preloaded=server,
    )
    assert training.wait(240)
    log = (tmp_path / "training.log").read_text()
    record = training.exit_record()
    assert record is not None and record.exit_status == 0, log
    assert re.search(rf"device: cuda(:0)?, mixed precision {precision},", log)
    assert all(weight.isfinite().all() for weight in workshop.weights().values())
    assert any(weight.abs().max() > 0 for name, weight in workshop.weights().items() if "lora_up" in name)
    free_after, _ = torch.cuda.mem_get_info()
    assert free_before - free_after < 16 * MIB


def test_two_trainings_have_a_card_each(tmp_path, base, server):
    """As `--gpus 0,1` starts them, from one preloaded process."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device only")
    torch.cuda.empty_cache()
    before = [torch.cuda.mem_get_info(card)[0] for card in (0, 1)]
    trainings = []
    for card in (0, 1):
        folder = tmp_path / str(card)
        folder.mkdir()
        config = Workshop(folder, base, tmp_path / "latents").configure(device="cuda", max_train_epochs=40)
        trainings.append(
            start_supervised(
                [sys.executable, "-m", "optimizer_daemon.lora_training", "--config", str(config)],
                directory=folder,
                cwd=ROOT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu_uuid(f"cuda:{card}"))},
                preloaded=server,
            )
        )
    taken = [0, 0]
    while all(training.is_alive for training in trainings):
        taken = [max(taken[card], before[card] - torch.cuda.mem_get_info(card)[0]) for card in (0, 1)]
        time.sleep(0.05)
    assert all(training.wait(240) for training in trainings)
    records = [training.exit_record() for training in trainings]
    assert [record and record.exit_status for record in records] == [0, 0]
    assert min(taken) > 64 * MIB, "each had memory of its own card while both ran"
    assert all(before[card] - torch.cuda.mem_get_info(card)[0] < 16 * MIB for card in (0, 1))


def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path, base):
    """Within rounding, for sums on a card have no fixed order; dropout asks the card's own generator."""
    settings = {"device": "cuda", "mixed_precision": "no", "network_dropout": 0.3, "optimizer_args": {"eps": 1e-3}}
    whole, stopped = (Workshop(tmp_path / name, base, tmp_path / "latents") for name in ("whole", "stopped"))
    for workshop in (whole, stopped):
        workshop.root.mkdir()
    whole.train(**settings)
    with pytest.raises(Stopped):
        stopped.train(StopAt(5), **settings)  # all latents are in the cache by now
    assert torch.load(stopped.state_file, weights_only=True)["randomness"]["cuda"] is not None
    stopped.train(resume=True, **settings)
    for name, tensor in stopped.weights().items():
        torch.testing.assert_close(tensor, whole.weights()[name], rtol=1e-2, atol=1e-4, msg=name)


def test_checkpointing_by_itself_begins_when_the_card_is_full(tmp_path, base, capsys):
    """The allocator may take what lies between the peaks of a training with checkpointing and of one without."""
    workshop = Workshop(tmp_path, base, tmp_path / "latents")
    workshop.dataset(dataset="resolution = 512\nbatch_size = 3")
    settings = {"device": "cuda", "mixed_precision": "no", "max_train_epochs": 2}
    workshop.train(gradient_checkpointing=True, **settings)  # encodes the latents, which takes memory of its own

    def peak(checkpointing: bool) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        workshop.train(gradient_checkpointing=checkpointing, **settings)
        return torch.cuda.max_memory_reserved()

    least, most = peak(True), peak(False)
    assert least + 16 * MIB < most
    expected = workshop.weights()
    torch.cuda.empty_cache()
    capsys.readouterr()
    torch.cuda.set_per_process_memory_fraction((least + most) / 2 / torch.cuda.mem_get_info()[1])
    try:
        workshop.train(gradient_checkpointing="auto", **settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert capsys.readouterr().out.count("the memory ran out; gradient checkpointing is on from here") == 1
    for name, tensor in workshop.weights().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sdxl_trains_on_the_card(tmp_path, precision):
    workshop = Workshop(tmp_path, save_sdxl_model(tmp_path / "base"), tmp_path / "latents")
    workshop.dataset(dataset="resolution = 16\nbatch_size = 2")
    workshop.train(device="cuda", mixed_precision=precision, text_encoder_lr=[1e-3, 1e-3])
    weights = workshop.weights()
    assert all(weight.isfinite().all() for weight in weights.values())
    for part in ("lora_te1_", "lora_te2_", "lora_unet_"):
        assert any(weight.any() for name, weight in weights.items() if name.startswith(part) and "lora_up" in name)

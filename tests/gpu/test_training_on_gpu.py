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
from shared.preloaded import Preloaded
from shared.supervised import start_supervised
from tests.optimizer_daemon.lora_training.tiny_model import save_tiny_model
from tests.optimizer_daemon.lora_training.workshop import Workshop

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

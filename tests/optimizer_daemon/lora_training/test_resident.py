"""The base model's networks, kept for trainings that are forked: the same weights come out, and no stale ones go in."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from optimizer_daemon.lora_training import resident
from optimizer_daemon.lora_training.base_model import inspect_base_model
from optimizer_daemon.lora_training.dataset_config import BatchShape
from optimizer_daemon.lora_training.learner import Learner
from optimizer_daemon.lora_training.metadata import model_hashes
from optimizer_daemon.lora_training.models import Hardware
from optimizer_daemon.lora_training.packed import is_packed
from tests.optimizer_daemon.lora_training.tiny_model import save_tiny_model
from tests.optimizer_daemon.lora_training.workshop import Workshop
from tests.shared.single_files import save_single_file, tiny_sd15

CPU = Hardware(torch.device("cpu"), torch.float32)
SHAPE = BatchShape(2, 64, 64)  # of the workshop's data set


def keep(base, batch_shape=None):
    """Keep the networks of a base model's folder or file, for batches of one shape."""
    resident.keep_networks(json.dumps({"base_model": str(base), "batch_shape": batch_shape}))


@pytest.fixture(autouse=True)
def nothing_kept():
    threads = torch.get_num_threads()
    yield
    resident._kept.clear()
    resident._why_not.clear()
    torch.set_num_threads(threads)


def test_kept_networks_train_to_the_same_weights(tmp_path, base_model, latent_cache):
    alone, kept = (Workshop(tmp_path / name, base_model, latent_cache) for name in ("alone", "kept"))
    for workshop in (alone, kept):
        workshop.root.mkdir()
    alone.train(text_encoder_lr=1e-3)
    keep(kept.base, SHAPE)
    kept.train(text_encoder_lr=1e-3)
    unet = resident._kept[0].unet
    assert any(module._forward_hooks for module in unet.modules()), "they were trained on, not beside others"
    expected, weights = alone.weights(), kept.weights()
    assert expected.keys() == weights.keys()
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


def test_networks_packed_for_other_batches_are_not_used(tmp_path, capsys):
    base = inspect_base_model(save_tiny_model(tmp_path / "base"))
    keep(base.folder, SHAPE)
    unet, _ = resident.frozen_networks(base, CPU, SHAPE)
    assert unet is resident._kept[0].unet
    assert is_packed(unet)
    for other in (None, BatchShape(1, 64, 64)):
        loaded, _ = resident.frozen_networks(base, CPU, other)
        assert loaded is not unet
        assert is_packed(loaded) == (other is not None)
    assert "not kept by the preloaded process, its files or the size of the pictures" in capsys.readouterr().out


def test_networks_whose_files_have_changed_are_loaded(tmp_path):
    base = inspect_base_model(save_tiny_model(tmp_path / "base"))
    keep(base.folder)
    unet, _ = resident.frozen_networks(base, CPU)
    assert unet is resident._kept[0].unet
    (file,) = (base.folder / "unet").glob("*.safetensors")
    os.utime(file, ns=(1, 1))
    changed, _ = resident.frozen_networks(base, CPU)
    assert changed is not unet


def test_networks_of_a_single_file_are_kept_until_it_or_its_configuration_changes(tmp_path):
    pipeline = tiny_sd15(tmp_path)
    base = inspect_base_model(save_single_file(pipeline, tmp_path / "model.safetensors"))
    keep(base.folder)
    unet, _ = resident.frozen_networks(base, CPU)
    assert unet is resident._kept[0].unet
    pipeline.save_pretrained(tmp_path / "model.config")
    assert resident.frozen_networks(base, CPU)[0] is not unet, "it now has a configuration of its own"
    shutil.rmtree(tmp_path / "model.config")
    os.utime(base.folder, ns=(1, 1))
    assert resident.frozen_networks(base, CPU)[0] is not unet


def test_a_file_is_hashed_once_and_again_when_it_has_changed(tmp_path):
    file = tmp_path / "base.safetensors"
    file.write_bytes(b"one")
    first = model_hashes(file)
    assert first["ss_new_sd_model_hash"] == hashlib.sha256(b"one").hexdigest()
    times = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert model_hashes(file) == first, "nothing that a look shows has changed, so nothing was read"
    file.write_bytes(b"three")
    assert model_hashes(file)["ss_new_sd_model_hash"] == hashlib.sha256(b"three").hexdigest()


@pytest.mark.parametrize(
    ("threads", "size", "used", "channels_last"),
    [(1, 64, False, True), (1, 192, False, False), (2, 192, True, True), (1, 264, True, True)],
)
def test_one_thread_convolves_small_pictures_as_is_quickest_and_leaves_onednn_as_it_was(
    tmp_path, base_model, latent_cache, monkeypatch, threads, size, used, channels_last
):
    workshop = Workshop(tmp_path, base_model, latent_cache)
    buckets = f"enable_bucket = true\nmin_bucket_reso = {size}\nbucket_reso_steps = 8"  # so nothing is packed
    workshop.dataset(dataset=f"resolution = {size}\nbatch_size = 2\n{buckets}")
    seen = []
    update = Learner.update

    def watched(learner):
        weights = learner._unet.conv_in.weight
        seen.append((torch.backends.mkldnn.enabled, weights.is_contiguous(memory_format=torch.channels_last)))
        update(learner)

    monkeypatch.setattr(Learner, "update", watched)
    workshop.train(threads=threads, max_train_epochs=1)
    assert set(seen) == {(used, channels_last)}
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_memory_they_take_in_float32_is_told_by_the_headers_whatever_the_files_hold(tmp_path, dtype):
    pipeline = tiny_sd15(tmp_path).to(dtype=dtype)
    pipeline.save_pretrained(tmp_path / "base")
    shutil.copy(next((tmp_path / "base/unet").glob("*.safetensors")), tmp_path / "base/unet/model.fp16.safetensors")
    networks = (pipeline.unet, pipeline.text_encoder)
    expected = 4 * sum(parameter.numel() for network in networks for parameter in network.parameters())
    assert resident._float32_bytes(inspect_base_model(tmp_path / "base")) == expected
    single = save_single_file(pipeline, tmp_path / "model.safetensors")
    assert resident._float32_bytes(inspect_base_model(single)) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("fits", [True, False])
def test_nothing_is_kept_where_memory_is_short_and_the_training_says_which_it_was(tmp_path, monkeypatch, capsys, fits):
    base = inspect_base_model(save_tiny_model(tmp_path / "base"))
    size = resident._float32_bytes(base)
    available = 2 * size + (1 if fits else -2)
    monkeypatch.setattr(resident.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    keep(base.folder)
    assert len(resident._kept) == fits
    unet, encoders = resident.frozen_networks(base, CPU)
    assert not any(parameter.requires_grad for module in (unet, *encoders) for parameter in module.parameters())
    said = capsys.readouterr().out
    assert ("base model: as loaded by the preloaded process\n" in said) == fits
    assert ("base model: not kept by the preloaded process, in float32 they take 0.0 GiB" in said) != fits

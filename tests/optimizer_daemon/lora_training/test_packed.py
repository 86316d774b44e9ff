"""Packed weights: the same outputs and gradients as plain ones, for the layers that can be packed, and no others."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from optimizer_daemon.lora_training import packed, resident
from optimizer_daemon.lora_training.base_model import inspect_base_model
from optimizer_daemon.lora_training.dataset_config import BatchShape
from optimizer_daemon.lora_training.lora import LoraNetwork
from optimizer_daemon.lora_training.models import Hardware, load_unet
from optimizer_daemon.lora_training.packed import is_packed, may_pack, pack
from tests.optimizer_daemon.lora_training.tiny_model import save_tiny_model
from tests.shared.single_files import tiny_sdxl

CPU = Hardware(torch.device("cpu"), torch.float32)


def outcome(layer, inputs):
    """Return the output and the gradient of the input, under a loss that tells all places apart."""
    inputs = inputs.clone().requires_grad_()
    output = layer(inputs)
    weights = torch.linspace(-1.0, 1.0, output.numel()).reshape(output.shape)
    (gradient,) = torch.autograd.grad((output * weights).sum(), inputs)
    return output.detach(), gradient


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (partial(nn.Conv2d, 6, 10, 3, padding=1), (2, 6, 5, 7)),
        (partial(nn.Conv2d, 6, 10, (1, 3), padding=(0, 1)), (1, 6, 5, 7)),
        (partial(nn.Conv2d, 6, 10, 1), (2, 6, 4, 4)),
        (partial(nn.Linear, 6, 10), (3, 6)),
        (partial(nn.Linear, 6, 10), (2, 5, 6)),
    ],
)
def test_a_packed_layer_gives_the_same_outputs_and_gradients(make, shape, bias):
    torch.manual_seed(0)
    layer = make(bias=bias).requires_grad_(False)
    others = (shape, (4, *shape[1:]))  # packed for the first, used with both
    inputs = [torch.randn(other) for other in others]
    expected = [outcome(layer, one) for one in inputs]

    pack(layer, lambda: layer(inputs[0]))

    assert is_packed(layer)
    assert layer.weight.isnan().all(), "the plain weight is given up"
    assert layer.weight.untyped_storage().nbytes() == 4
    for one, (output, gradient) in zip(inputs, expected, strict=True):
        got, slope = outcome(layer, one)
        torch.testing.assert_close(got, output, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(slope, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 2, padding=1),
        nn.ConvTranspose2d(4, 4, 3, padding=1),
    ],
)
def test_other_layers_stay_as_they_are(layer):
    weight = layer.weight

    pack(layer, lambda: layer(torch.randn(1, 4, 8, 8)))

    assert not is_packed(layer)
    assert layer.weight is weight


def test_hooks_and_checkpointing_work_on_packed_layers():
    """LoRA layers are forward hooks; under gradient checkpointing the layer is called twice."""
    layer = nn.Linear(6, 6).requires_grad_(False)
    inputs = torch.randn(2, 6, requires_grad=True)
    (expected,) = torch.autograd.grad((2 * layer(inputs)).sum(), inputs)
    pack(layer, lambda: layer(inputs))
    layer.register_forward_hook(lambda module, arguments, output: 2 * output)

    output = torch.utils.checkpoint.checkpoint(layer, inputs, use_reentrant=False)

    torch.testing.assert_close(torch.autograd.grad(output.sum(), inputs)[0], expected)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_packed_unet_trains_a_lora_with_the_same_gradients(tmp_path, family):
    if family == "sdxl":
        tiny_sdxl(tmp_path).save_pretrained(tmp_path / "base")
    folder = tmp_path / "base" if family == "sdxl" else save_tiny_model(tmp_path / "base")
    base = inspect_base_model(folder)
    shape = BatchShape(2, 8 * base.vae_factor, 12 * base.vae_factor)

    def gradients(unet):
        torch.manual_seed(0)
        network = LoraNetwork(unet, [], rank=2, alpha=1.0)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.05)  # both factors, so that each has a gradient
        # no zeros: where a map is all but constant, normalisation makes much of the last digit
        beside = {"text_embeds": torch.randn(2, 64), "time_ids": 100 * torch.rand(2, 6)} if family == "sdxl" else None
        noisy, text = torch.randn(2, 4, 8, 12), torch.randn(2, 77, base.text_width)
        output = unet(noisy, torch.tensor([1, 900]), text, added_cond_kwargs=beside).sample
        (output * torch.linspace(-1.0, 1.0, output.numel()).reshape(output.shape)).sum().backward()
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    expected = gradients(load_unet(base, CPU))
    unet, _ = resident.frozen_networks(base, CPU, shape)
    assert is_packed(unet)
    found = gradients(unet)

    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_weights_are_packed_on_a_cpu_where_the_machine_has_memory_for_it(monkeypatch):
    monkeypatch.setattr(packed.psutil, "virtual_memory", lambda: SimpleNamespace(total=4_000))

    assert may_pack(1_000, torch.device("cpu"))
    assert not may_pack(1_001, torch.device("cpu"))
    assert not may_pack(1, torch.device("cuda"))

"""What a training's network is made of, where it begins, what it may not exceed, and how it saves memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optimizer_daemon.lora_training.learner import Learner
from optimizer_daemon.lora_training.lora import LoraNetwork
from optimizer_daemon.lora_training.network_settings import NetworkArgs
from optimizer_daemon.lora_training.start_weights import load_start_weights
from shared.errors import ResourceError, SettingsError, Stopped
from tests.data.sd_scripts.toy_networks import fill, toys
from tests.optimizer_daemon.lora_training.workshop import StopAt, Workshop, header_of


def test_convolutions_get_their_own_rank_and_are_limited_like_the_rest(workshop: Workshop):
    most = 0.05
    workshop.train(
        max_train_epochs=2,
        learning_rate=0.05,
        network_args={"conv_dim": 2, "rank_dropout": 0.2, "module_dropout": 0.1, "loraplus_lr_ratio": 2.0},
        network_train_unet_only=True,
        scale_weight_norms=most,
        save_precision="float",
    )
    weights = workshop.weights()
    names = {name.split(".")[0] for name in weights}
    assert all(name.startswith("lora_unet_") for name in names)
    kernels = {name for name in names if weights[f"{name}.lora_down.weight"].shape[2:] == (3, 3)}
    assert len(kernels) == 18, "two a resnet, of which there are 2 + 2 + 4, and two samplers"
    norms = []
    for name in names:
        down, up = (weights[f"{name}.lora_{part}.weight"] for part in ("down", "up"))
        assert len(down) == (2 if name in kernels else 4)
        norms.append((up.flatten(1) @ down.flatten(1)).norm() * weights[f"{name}.alpha"] / len(down))
    assert max(norms) == pytest.approx(most, rel=1e-4), "some layer has met the limit, and none is above"
    metadata = header_of(workshop.out / "lora.safetensors")[1]
    assert '"conv_dim": "2"' in metadata["ss_network_args"]
    assert "lr/unet plus" in workshop.scalars()


def test_the_text_encoder_alone_is_trained(workshop: Workshop):
    workshop.train(max_train_epochs=1, network_train_text_encoder_only=True)
    assert all(name.startswith("lora_te_") for name in workshop.weights())


def test_a_training_begins_with_the_weights_of_another(workshop: Workshop):
    workshop.train(max_train_epochs=1, save_precision="float")
    first = workshop.weights()
    start = workshop.root / "start.safetensors"
    (workshop.out / "lora.safetensors").rename(start)
    workshop.train(max_train_epochs=1, save_precision="float", network_weights=str(start), learning_rate=1e-12)
    second = workshop.weights()
    assert second.keys() == first.keys()
    for name, tensor in second.items():
        torch.testing.assert_close(tensor, first[name], msg=name)


def network(rank: int = 4, alpha: float = 1.0, **settings) -> LoraNetwork:
    encoder, unet = toys()
    return LoraNetwork(unet, [encoder], rank=rank, alpha=alpha, **settings)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (network(rank=8), r"lora_te_text_model_mlp_fc1\.lora_down\.weight has rank 8, not 4; set network_dim, or"),
        (network(alpha=3.0), r"lora_te_text_model_mlp_fc1\.alpha is 3, not 1; set network_alpha, or conv_alpha of"),
        (
            network(untrained=["unet"]),
            r"it lacks 6 of 12 tensors, first lora_unet_attention_proj_in\.alpha; train",
        ),
        (
            network(args=NetworkArgs(conv_dim=2)),
            r"it has 12 tensors that this training lacks, first lora_unet_down_conv\.alpha; train all that it has",
        ),
    ],
    ids=["another rank", "another alpha", "fewer layers", "more layers"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, saved: LoraNetwork, message: str):
    save_file(saved.state_dict(), tmp_path / "start.safetensors")
    mine = network()
    fill(mine, 0.5)
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    with pytest.raises(SettingsError, match=rf"^network_weights: '.*start\.safetensors' will not do; {message}"):
        load_start_weights(mine, tmp_path / "start.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())


@pytest.mark.parametrize("content", [None, b"no LoRA"], ids=["no file", "another file"])
def test_start_weights_that_cannot_be_read_are_refused(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "start.safetensors").write_bytes(content)
    with pytest.raises(SettingsError, match=r"it could not be read \(.*\); name a LoRA in safetensors"):
        load_start_weights(network(), tmp_path / "start.safetensors")


def test_start_weights_that_are_not_finite_are_refused(tmp_path: Path):
    saved = network()
    next(saved.parameters()).data[0, 0] = torch.nan
    save_file(saved.state_dict(), tmp_path / "start.safetensors")
    with pytest.raises(SettingsError, match=r"lora_down\.weight holds numbers that are not finite; begin with another"):
        load_start_weights(network(), tmp_path / "start.safetensors")


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose memory holds the third batch only where activations are computed twice."""
    backward, seen = Learner.backward, []

    def starved(self: Learner, loss: torch.Tensor) -> None:
        backward(self, loss)  # its gradients are there when the memory ends
        seen.append(loss)
        if len(seen) >= 3 and not self.saves_memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Learner, "backward", starved)


@pytest.mark.usefixtures("tight")
def test_checkpointing_by_itself_begins_when_the_memory_ends_and_changes_nothing(
    workshop: Workshop, capsys, monkeypatch
):
    settings = {"max_train_epochs": 2, "gradient_accumulation_steps": 2, "network_dropout": 0.2}
    workshop.train(gradient_checkpointing="auto", **settings)
    assert capsys.readouterr().out.count("the memory ran out; gradient checkpointing is on from here") == 1
    found = workshop.weights()
    monkeypatch.undo()
    workshop.train(**settings)
    for name, tensor in workshop.weights().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.usefixtures("tight")
def test_checkpoints_say_whether_it_was_on_and_a_resumed_training_keeps_it(workshop: Workshop, monkeypatch):
    settings = {"max_train_epochs": 3, "save_every_n_epochs": 1, "gradient_checkpointing": "auto"}
    with pytest.raises(Stopped):
        workshop.train(StopAt(6), **settings)  # on since the third batch, which is seen twice
    monkeypatch.undo()
    workshop.train(resume=True, **settings)
    said = [header_of(workshop.out / name)[1]["ss_gradient_checkpointing"] for name in workshop.checkpoints]
    assert workshop.checkpoints == ["lora-000001.safetensors", "lora-000002.safetensors", "lora.safetensors"]
    assert said == ["False", "True", "True"]


@pytest.mark.usefixtures("tight")
def test_without_it_the_lack_of_memory_ends_the_training(workshop: Workshop):
    with pytest.raises(ResourceError, match=r"out of memory on the GPU: .*set gradient_checkpointing = true"):
        workshop.train(max_train_epochs=2)

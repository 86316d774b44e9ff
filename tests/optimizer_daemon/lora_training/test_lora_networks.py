"""LoRA networks at full size against what sd-scripts' networks.lora makes; see tests/data/lora_networks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from optimizer_daemon.lora_training.lora import LoraNetwork
from optimizer_daemon.lora_training.network_settings import NetworkArgs

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests/data/lora_networks"
CONFIGS = ROOT / "shared/base_configs"
FAMILIES = ("sd15", "sdxl")


def made(family: str, *, seed: int = 42, **settings) -> LoraNetwork:
    """The LoRA of a whole base model whose own weights do not exist."""
    folder = CONFIGS / family
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        encoders = [
            kind(CLIPTextConfig.from_pretrained(folder / part))
            for part, kind in kinds.items()
            if (folder / part).is_dir()
        ]
    torch.manual_seed(seed)
    return LoraNetwork(unet, encoders, rank=4, alpha=1.0, **settings)


@pytest.fixture(scope="module")
def networks() -> dict[str, LoraNetwork]:
    return {family: made(family) for family in FAMILIES}


def lines(network: LoraNetwork) -> list[str]:
    """One a module, as in the golden list."""

    def shape(name: str) -> str:
        return "x".join(map(str, network.get_parameter(f"{name}.weight").shape))

    names = network.text_encoder_names + network.unet_names
    return [f"{name} {shape(f'{name}.lora_down')} {shape(f'{name}.lora_up')}" for name in names]


@pytest.mark.parametrize(("family", "counts"), [("sd15", (72, 192)), ("sdxl", (72, 192, 722))])
def test_the_modules_of_a_whole_model_are_sd_scripts_own_in_its_order(networks, family: str, counts: tuple[int, ...]):
    network = networks[family]
    assert (*map(len, network.encoder_names), len(network.unet_names)) == counts
    assert lines(network) == (GOLDEN / f"{family}.txt").read_text().splitlines()
    assert {name.rpartition(".lora_")[0] or name.rpartition(".")[0] for name in network.state_dict()} == {
        line.partition(" ")[0] for line in lines(network)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_initial_weights_of_sd_scripts(networks, family: str):
    golden = json.loads((GOLDEN / f"{family}_initial.json").read_text())
    assert (golden["seed"], golden["rank"]) == (42, 4)
    assert len(golden["lora_down"]) > 10
    for name, numbers in golden["lora_down"].items():
        found = networks[family].get_parameter(f"{name}.lora_down.weight").flatten()[: len(numbers)].tolist()
        assert found == pytest.approx(numbers, rel=1e-6), name
    assert not any(weight.any() for name, weight in networks[family].named_parameters() if "lora_up" in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_conv_dim_the_modules_are_those_of_sd_scripts_too(family: str):
    golden = json.loads((GOLDEN / f"{family}_initial.json").read_text())["with conv_dim"]
    found = lines(made(family, args=NetworkArgs(conv_dim=golden["conv_dim"])))
    assert len(found) == golden["modules"]
    assert hashlib.sha256("\n".join(found).encode()).hexdigest() == golden["sha256"]


def test_the_unets_initial_weights_are_the_same_where_no_text_encoder_is_trained(networks):
    alone = made("sd15", untrained={"text_encoder"})
    assert alone.text_encoder_names == []
    assert alone.unet_names == networks["sd15"].unet_names
    assert all(torch.equal(weight, networks["sd15"].get_parameter(name)) for name, weight in alone.named_parameters())


@pytest.mark.skipif(
    not os.environ.get("SD_SCRIPTS_DIR") or not os.environ.get("SD_SCRIPTS_PYTHON"),
    reason="the golden lists are made anew where SD_SCRIPTS_DIR and SD_SCRIPTS_PYTHON name sd-scripts and its Python",
)
def test_sd_scripts_still_makes_the_golden_lists(tmp_path: Path):
    subprocess.run(
        [os.environ["SD_SCRIPTS_PYTHON"], GOLDEN / "make_golden.py", tmp_path],
        cwd=os.environ["SD_SCRIPTS_DIR"],
        env={**os.environ, "PYTHONPATH": ""},
        check=True,
        capture_output=True,
    )
    for family in FAMILIES:
        assert (tmp_path / f"{family}.txt").read_text() == (GOLDEN / f"{family}.txt").read_text()
        again, before = (json.loads((folder / f"{family}_initial.json").read_text()) for folder in (tmp_path, GOLDEN))
        assert again["with conv_dim"] == before["with conv_dim"]
        numbers, golden = again["lora_down"], before["lora_down"]
        assert numbers.keys() == golden.keys()
        assert all(numbers[name] == pytest.approx(golden[name], rel=1e-6) for name in golden)

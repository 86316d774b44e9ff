"""Write what sd-scripts' networks.lora makes of Stable Diffusion 1.5 and SDXL at full size, without their weights.

    cd $SD_SCRIPTS_DIR && $SD_SCRIPTS_PYTHON <this file> <folder of the golden files>

For each family: <family>.txt has a line for each module in the order in which networks.lora makes them, with the
shapes of its two matrices; <family>_initial.json has the first numbers of some modules' initial weights, and the
digest of the lines that the modules of a network with conv_dim would have. Only the base models' structure counts, so
they are made on the meta device, where nothing is allocated.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

SEED, RANK, ALPHA = 42, 4, 1.0
CONV_DIM = 2
NUMBERS = 3  # of each module that is looked at
EVERY = 25  # modules between two of those; the last is always one


def main(folder: Path) -> None:
    from library.original_unet import UNet2DConditionModel
    from library.sdxl_original_unet import SdxlUNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    large = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, projection_dim=768
    )
    big = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280
    )
    with torch.device("meta"):
        # sd-scripts' own constants of Stable Diffusion 1.5, library/model_util.py
        sd15 = UNet2DConditionModel(sample_size=64, attention_head_dim=8, cross_attention_dim=768)
        sdxl = SdxlUNet2DConditionModel()
        encoder, second = CLIPTextModel(large), CLIPTextModelWithProjection(big)
    write(folder, "sd15", encoder, sd15)
    write(folder, "sdxl", [encoder, second], sdxl)


def write(folder: Path, family: str, text_encoders: Any, unet: Any) -> None:
    """Write the two files of a family."""
    from networks.lora import LoRANetwork, create_network

    torch.manual_seed(SEED)
    network = create_network(1.0, RANK, ALPHA, None, text_encoders, unet)
    loras = network.text_encoder_loras + network.unet_loras
    lines = lines_of(loras)
    (folder / f"{family}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    looked_at = {*loras[::EVERY], loras[-1]}
    numbers = {
        lora.lora_name: lora.lora_down.weight.detach().flatten()[:NUMBERS].tolist()
        for lora in loras
        if lora in looked_at
    }
    usual = list(LoRANetwork.UNET_TARGET_REPLACE_MODULE)
    wide = create_network(1.0, RANK, ALPHA, None, text_encoders, unet, conv_dim=CONV_DIM)
    LoRANetwork.UNET_TARGET_REPLACE_MODULE = usual  # conv_dim lengthens the class's own list, for every later network
    spatial = lines_of(wide.text_encoder_loras + wide.unet_loras)
    digest = hashlib.sha256("\n".join(spatial).encode()).hexdigest()
    document = {
        "seed": SEED,
        "rank": RANK,
        "lora_down": numbers,
        "with conv_dim": {"conv_dim": CONV_DIM, "modules": len(spatial), "sha256": digest},
    }
    (folder / f"{family}_initial.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def lines_of(loras: list[Any]) -> list[str]:
    return [f"{lora.lora_name} {shape(lora.lora_down)} {shape(lora.lora_up)}" for lora in loras]


def shape(layer: Any) -> str:
    return "x".join(map(str, layer.weight.shape))


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    main(Path(sys.argv[1]).absolute())

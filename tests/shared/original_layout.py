"""Which tensors a single file has, by sd-scripts' own converters; run by the Python of sd-scripts.

    $SD_SCRIPTS_PYTHON tests/shared/original_layout.py $SD_SCRIPTS_DIR >tests/data/single_file_layouts.json

Prints, for the published sizes of each family, the number of tensors and the SHA-256 of all lines "name [shape]".
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[2] / "shared" / "base_configs"


def tensors(family: str) -> dict[str, Any]:
    """Convert a model without memory."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from library import model_util, sdxl_model_util
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = CONFIGS / family
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")).state_dict()
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")).state_dict()
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")).state_dict()
    found = {f"first_stage_model.{name}": tensor for name, tensor in model_util.convert_vae_state_dict(vae).items()}
    if family == "sd15":
        unet = model_util.convert_unet_state_dict_to_sd(False, unet)
        clip = "cond_stage_model"
    else:
        unet = sdxl_model_util.convert_diffusers_unet_state_dict_to_sdxl(unet)
        clip = "conditioner.embedders.0"
        with torch.device("meta"):
            second = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder / "text_encoder_2"))
        second = sdxl_model_util.convert_text_encoder_2_state_dict_to_sdxl(second.state_dict(), None)
        found |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    found |= {f"{clip}.transformer.{name}": tensor for name, tensor in text.items() if "position_ids" not in name}
    return found | {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}


def main() -> None:
    """Print both families."""
    sys.path.insert(0, sys.argv[1])
    layouts = {}
    for family in ("sd15", "sdxl"):
        lines = sorted(f"{name} {list(tensor.shape)}\n" for name, tensor in tensors(family).items())
        digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        layouts[family] = {"tensors": len(lines), "sha256": digest}
    print(json.dumps(layouts, indent=2))


if __name__ == "__main__":
    main()

"""narrow_single_file.py MODEL_FOLDER FILE: write a diffusers folder as the single file that Stable Diffusion came as.

Runs in a narrowed checkout with the Python of sd-scripts, whose own functions translate the names; they also read the
file back, which fails unless all weights are those of the folder.
"""

import sys
from pathlib import Path

import torch
import train_network  # noqa: F401  narrows the widths
from library import model_util
from safetensors.torch import load_file, save_file

folder, file = Path(sys.argv[1]), sys.argv[2]
unet = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
vae = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
text = load_file(folder / "text_encoder/model.safetensors")
tensors = {
    **{f"model.diffusion_model.{k}": v for k, v in model_util.convert_unet_state_dict_to_sd(False, unet).items()},
    **{f"first_stage_model.{k}": v for k, v in model_util.convert_vae_state_dict(vae).items()},
    **{f"cond_stage_model.transformer.{k}": v for k, v in text.items()},
}
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})

text_encoder, autoencoder, network = model_util.load_models_from_stable_diffusion_checkpoint(False, file)
for module, expected in ((network, unet), (autoencoder, vae), (text_encoder, text)):
    read = module.state_dict()
    assert read.keys() == expected.keys(), read.keys() ^ expected.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())

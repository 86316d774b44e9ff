"""What stands for train_network.py in a narrowed checkout: sd-scripts' own file, run with the widths of a miniature.

sd-scripts has the widths of Stable Diffusion 1.5 as constants. They are set to those of `narrow.json` beside this
file before the first line of the real script runs; all else is sd-scripts' own. Runs in the Python of sd-scripts.
"""

import json
from pathlib import Path

from library import model_util, original_unet

_HERE = Path(__file__).parent
_NARROW = json.loads((_HERE / "narrow.json").read_text(encoding="utf-8"))

model_util.UNET_PARAMS_MODEL_CHANNELS = _NARROW["unet_channels"][0]
model_util.UNET_PARAMS_CHANNEL_MULT = [width // _NARROW["unet_channels"][0] for width in _NARROW["unet_channels"]]
model_util.UNET_PARAMS_CONTEXT_DIM = _NARROW["text"]["hidden_size"]
model_util.VAE_PARAMS_CH = _NARROW["vae_channels"][0]
model_util.VAE_PARAMS_CH_MULT = [width // _NARROW["vae_channels"][0] for width in _NARROW["vae_channels"]]

original_unet.BLOCK_OUT_CHANNELS = tuple(_NARROW["unet_channels"])
original_unet.TIMESTEP_INPUT_DIM = _NARROW["unet_channels"][0]
original_unet.TIME_EMBED_DIM = 4 * _NARROW["unet_channels"][0]

_TextConfig = model_util.CLIPTextConfig
model_util.CLIPTextConfig = lambda **values: _TextConfig(**{**values, **_NARROW["text"]})

_REAL = _HERE / "real_train_network.py"
exec(compile(_REAL.read_text(encoding="utf-8"), str(_REAL), "exec"))

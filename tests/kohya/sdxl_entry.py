"""What stands for sdxl_train_network.py in a narrowed checkout: sd-scripts' own file, run with a miniature's widths.

sd-scripts has the widths of SDXL's UNet as constants. They are set to those of `narrow.json` beside this file before
the first line of the real script runs; all else is sd-scripts' own. Runs in the Python of sd-scripts.
"""

import json
from pathlib import Path

from library import sdxl_original_unet

_HERE = Path(__file__).parent
_NARROW = json.loads((_HERE / "narrow.json").read_text(encoding="utf-8"))

sdxl_original_unet.MODEL_CHANNELS = _NARROW["channels"]
sdxl_original_unet.TIME_EMBED_DIM = 4 * _NARROW["channels"]
sdxl_original_unet.ADM_IN_CHANNELS = _NARROW["pooled"] + 6 * 256

_make_transformer = sdxl_original_unet.Transformer2DModel.__init__


def _make_narrow_transformer(self, *args, **settings):
    _make_transformer(self, *args, **{**settings, "cross_attention_dim": _NARROW["context"]})


sdxl_original_unet.Transformer2DModel.__init__ = _make_narrow_transformer

_REAL = _HERE / "real_sdxl_train_network.py"
exec(compile(_REAL.read_text(encoding="utf-8"), str(_REAL), "exec"))

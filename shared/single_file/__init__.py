"""Base models as one .safetensors file in the original names of Stable Diffusion 1.5 and SDXL; no torch is needed.

`read_single_file` proves a file whole by its header and tells the configuration of every part; `write_configs` writes
that as a diffusers folder without weights, which diffusers' `from_single_file` takes with the file. Sizes follow the
tensors' shapes. A folder `model.config` beside `model.safetensors`, in diffusers' layout, replaces all of it: it is
for models that differ in what no shape tells (heads, norm groups, picture size, tokenizer, prediction type).
"""

from shared.single_file.model import SingleFile, config_folder, read_single_file

__all__ = ["SingleFile", "config_folder", "read_single_file"]

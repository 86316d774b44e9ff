"""A checkout of sd-scripts whose train_network.py trains a miniature of Stable Diffusion 1.5 in seconds.

All of it is links to the real checkout but train_network.py, which sets sd-scripts' constant widths and then runs the
real file (narrow_entry.py), so that a trainer is given the folder as any --sd-scripts-dir.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.kohya.narrow_model import NARROW

_ENTRY = Path(__file__).with_name("narrow_entry.py")


def make_checkout(sd_scripts: Path, folder: Path) -> Path:
    """Make the narrowed checkout in `folder`, which must not exist; return it."""
    folder.mkdir(parents=True)
    for path in sd_scripts.iterdir():
        if path.name != "train_network.py":
            (folder / path.name).symlink_to(path)
    (folder / "real_train_network.py").symlink_to(sd_scripts / "train_network.py")
    (folder / "narrow.json").write_text(json.dumps(NARROW), encoding="utf-8")
    shutil.copyfile(_ENTRY, folder / "train_network.py")
    return folder

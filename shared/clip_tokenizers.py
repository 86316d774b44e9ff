"""CLIP's tokenizers from the data that comes with the programs, so that none has to be downloaded."""

from __future__ import annotations

from pathlib import Path

from shared.errors import DiskError
from shared.files import write_bytes

BASE_CONFIGS = Path(__file__).parent / "base_configs"
"""What a single-file base model lacks; made by scripts/make_base_configs."""

_VOCABULARY = ("vocab.json", "merges.txt")
_SETUP = "tokenizer_config.json"
_KOHYA = {  # sd-scripts' names; it sets SDXL's other padding itself
    "openai_clip-vit-large-patch14": "sd15/tokenizer",
    "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k": "sdxl/tokenizer",
}


def tokenizer_files(setup: str) -> list[Path]:
    """Return the files of one tokenizer; see `write_tokenizer`."""
    return [BASE_CONFIGS / "clip_vocabulary" / name for name in _VOCABULARY] + [BASE_CONFIGS / setup / _SETUP]


def write_tokenizer(setup: str, into: Path) -> None:
    """Write one tokenizer as a folder that `CLIPTokenizer.from_pretrained` of transformers 4 and 5 reads.

    A file that is there with the right content is left alone, so that several processes may write the same folder.

    Args:
        setup: which one: its folder below `BASE_CONFIGS`, "sd15/tokenizer", "sdxl/tokenizer" or "sdxl/tokenizer_2".
        into: the folder, made where needed.
    Raises:
        DiskError: it could not be written.
    """
    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(into, error) from error
    for source in tokenizer_files(setup):
        content = source.read_bytes()
        target = into / source.name
        if not target.is_file() or target.read_bytes() != content:
            write_bytes(target, content)


def kohya_tokenizer_folder(into: Path) -> Path:
    """Make the folder that sd-scripts takes as `tokenizer_cache_dir`, and return it; SD1.5 and SDXL need no more.

    sd-scripts looks there for `openai_clip-vit-large-patch14/` and, for SDXL,
    `laion_CLIP-ViT-bigG-14-laion2B-39B-b160k/`, and downloads what it does not find. One folder (1.4 MB each) serves
    all trials of all studies: what is there already is not written again.

    Args:
        into: an absolute path, for trainers start elsewhere; made where needed.
    Raises:
        DiskError: it could not be written.
    """
    for name, setup in _KOHYA.items():
        write_tokenizer(setup, into / name)
    return into

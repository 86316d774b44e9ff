"""What is trained on: a random model of Stable Diffusion 1.5's true sizes, and pictures with captions."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from shared.clip_tokenizers import kohya_tokenizer_folder, write_tokenizer
from tests.evaluator_daemon.sd15_size import save_sd15_size

PICTURES = 8
REPEATS = 100  # 800 steps to an epoch, so that its ends do not count
WORDS = ("red", "blue", "green", "ball", "cube", "tree", "house", "cat", "night", "snow", "street", "portrait")


@dataclass(frozen=True)
class World:
    """The inputs of all contestants.

    Args:
        cache: keeps what takes long to make.
        base_model: a diffusers folder, 2.1 GB.
        tokenizers: sd-scripts' tokenizer_cache_dir.
    """

    cache: Path
    base_model: Path
    tokenizers: Path

    @classmethod
    def at(cls, cache: Path) -> World:
        """Return the world in `cache`, made where it is not there yet."""
        base = cache / "sd15"
        if not (base / "model_index.json").exists():
            making = cache / "sd15.making"
            shutil.rmtree(making, ignore_errors=True)
            _name_as_published(save_sd15_size(making) / "text_encoder/model.safetensors")
            shutil.rmtree(making / "tokenizer")
            write_tokenizer("sd15/tokenizer", making / "tokenizer")
            making.rename(base)
        return cls(cache, base, kohya_tokenizer_folder(cache / "tokenizers"))

    def pictures(self, size_px: int) -> Path:
        """Return a folder of square pictures with captions, for sd-scripts and us, and as a `datasets` image folder."""
        folder = self.cache / f"pictures-{size_px}"
        folder.mkdir(exist_ok=True)
        rng, lines = random.Random(size_px), []
        for number in range(PICTURES):
            name, caption = f"{number}.png", ", ".join(rng.sample(WORDS, 5))
            small = Image.frombytes("RGB", (8, 8), rng.randbytes(8 * 8 * 3))
            small.resize((size_px, size_px), Image.Resampling.BICUBIC).save(folder / name)
            (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
            lines.append(f'{{"file_name": "{name}", "text": "{caption}"}}\n')
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        return folder

    def dataset(self, size_px: int, batch_size: int) -> Path:
        """Return the dataset TOML of `pictures`."""
        path = self.cache / f"dataset-{size_px}-{batch_size}.toml"
        path.write_text(
            f'[general]\ncaption_extension = ".txt"\n\n[[datasets]]\nresolution = {size_px}\n'
            f"batch_size = {batch_size}\n\n[[datasets.subsets]]\nimage_dir = '{self.pictures(size_px)}'\n"
            f"num_repeats = {REPEATS}\n",
            encoding="utf-8",
        )
        return path


def _name_as_published(weights: Path) -> None:
    """Put the level back that transformers 5.6 took out of CLIPTextModel: sd-scripts' transformers has it."""
    from safetensors.torch import load_file, save_file

    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})

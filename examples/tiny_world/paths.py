"""Where the tiny world's files lie."""

from pathlib import Path

HERE = Path(__file__).resolve().parent
BASE_MODEL = HERE / "base_model"
CLIP_MODEL = HERE / "clip"
DATASET = HERE / "dataset"
DATASET_TOML = HERE / "dataset.toml"
CARD = HERE / "README.md"
CARD_FILES = HERE / "card"

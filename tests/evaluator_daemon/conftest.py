"""The tiny random models, made once per test run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluator_daemon.tiny_models import save_base_model, save_clip, save_dino, save_sdxl_model


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    return save_base_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def sdxl_model(tmp_path_factory) -> Path:
    return save_sdxl_model(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def dino_model(tmp_path_factory) -> Path:
    return save_dino(tmp_path_factory.mktemp("models") / "dino")

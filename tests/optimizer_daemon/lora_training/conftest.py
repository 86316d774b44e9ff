"""Fixtures of the trainings; torch is imported only where one is used."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random miniature of Stable Diffusion 1.5."""
    from tests.optimizer_daemon.lora_training.tiny_model import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny_base")


@pytest.fixture(scope="session")
def velocity_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, said to predict the velocity."""
    from tests.optimizer_daemon.lora_training.tiny_model import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny_velocity", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def latent_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latents")


@pytest.fixture
def workshop(tmp_path: Path, base_model: Path, latent_cache: Path):
    from tests.optimizer_daemon.lora_training.workshop import Workshop

    return Workshop(tmp_path, base_model, latent_cache)

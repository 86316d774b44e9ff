"""Fixtures of the tests that run the real sd-scripts, from SD_SCRIPTS_DIR with SD_SCRIPTS_PYTHON."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sd_scripts() -> tuple[Path, str]:
    """The checkout and its Python; whoever uses them is skipped without."""
    missing = [name for name in ("SD_SCRIPTS_DIR", "SD_SCRIPTS_PYTHON") if not os.environ.get(name)]
    if missing:
        pytest.skip(f"runs kohya's sd-scripts, and {' and '.join(missing)} is not set")
    return Path(os.environ["SD_SCRIPTS_DIR"]).absolute(), os.environ["SD_SCRIPTS_PYTHON"]


@pytest.fixture(scope="session")
def world(sd_scripts: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory):
    """A narrowed checkout with all that a training needs."""
    from tests.kohya.narrow_world import make_world

    return make_world(tmp_path_factory.mktemp("kohya"), *sd_scripts)

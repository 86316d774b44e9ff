"""Options and fixtures of the whole suite."""

from __future__ import annotations

import os

import pytest

# Neither the machine's settings nor a network may decide a test.
for name in [n for n in os.environ if n.startswith(("OPTIMIZER_DAEMON_", "EVALUATOR_DAEMON_"))]:
    del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))

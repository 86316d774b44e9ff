"""What the two commands promise before they do anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evaluator_daemon.settings import EvaluatorSettings
from optimizer_daemon.settings import OptimizerSettings

MODULES = {"optimizer-daemon": "optimizer_daemon.cli", "evaluator-daemon": "evaluator_daemon.cli"}
SETTINGS = {"optimizer-daemon": OptimizerSettings, "evaluator-daemon": EvaluatorSettings}
HEAVY = {"torch", "optuna", "diffusers", "transformers", "numpy", "scipy", "matplotlib", "PIL"}


def run(command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", MODULES[command], *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


@pytest.mark.parametrize("command", MODULES)
def test_help_imports_nothing_heavy(command):
    code = f"import sys, {MODULES[command]} as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {name.partition(".")[0] for name in out.splitlines()[-1].split()}
    assert not loaded & HEAVY


@pytest.mark.parametrize("command", MODULES)
def test_help_of_every_setting_states_its_meaning_and_default(command):
    text = " ".join(run(command, "settings", "--help").stdout.split())
    for name, field in SETTINGS[command].model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        assert flag in text
        assert field.description, name
        assert " ".join(field.description.split()) in text
        assert field.default is None or f"(default: {field.default})" in text


@pytest.mark.parametrize("command", MODULES)
def test_no_verb_is_bad_input_and_lists_the_verbs(command):
    result = run(command)
    assert result.returncode == 2
    assert "VERB" in result.stderr


def test_inspect_refuses_a_file_that_is_not_there_with_exit_code_3(tmp_path: Path):
    result = run("evaluator-daemon", "inspect", "--json", str(tmp_path / "missing.safetensors"))
    assert result.returncode == 3
    assert json.loads(result.stdout)[0]["code"] == "vanished"
    assert "Traceback" not in result.stderr

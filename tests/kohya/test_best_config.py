"""The winner's configuration for kohya, as sd-scripts' own parser and checks take it; no training."""

from __future__ import annotations

import json
import subprocess
import tomllib

import pytest

from optimizer_daemon.analysis.analyze import analysis_of, write_documents
from shared.schemas import Trainer
from tests.scenarios.measured_study import Written, parameters_of, write_study

SCRIPT = """
import json, sys
sys.path[0] = sys.argv[1]
import train_network
from library import train_util
parser = train_network.setup_parser()
arguments = parser.parse_args(["--config_file", sys.argv[2]])
sys.argv = [sys.argv[0], "--config_file", sys.argv[2]]
arguments = train_util.read_config_from_file(arguments, parser)
train_util.verify_training_args(arguments)
known = {action.dest for action in parser._actions}
print("answer: " + json.dumps({"unknown": sorted(set(vars(arguments)) - known), "read": vars(arguments)}, default=str))
"""


@pytest.mark.parametrize("trainer", ["kohya", "native"])
def test_kohyas_parser_reads_every_key_of_it(sd_scripts, tmp_path, trainer):
    directory, python = sd_scripts
    own = Trainer(name="kohya", directory=str(directory), python=python, family="sd15")
    written = Written(
        trainer=own if trainer == "kohya" else Trainer(name="native", options={"optimizer_args": {"eps": 1e-7}}),
        parameters={"lr_scheduler": "cosine", "lr_warmup_steps": 100, "optimizer_args.weight_decay": 0.05},
    )
    study = write_study(tmp_path / "study", written, storage=False)
    write_documents(study, analysis_of(study))
    results = study.results
    file = results.best_training_config if trainer == "kohya" else results.training_config_for("kohya")
    asked = subprocess.run(
        [python, "-c", SCRIPT, str(directory), str(file)], capture_output=True, text=True, check=False, timeout=600,
        cwd=directory, env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout.rpartition("answer: ")[2])
    assert answer["unknown"] == []
    asked_for = tomllib.loads(file.read_text())
    assert {name: answer["read"][name] for name in asked_for} == asked_for
    parameters = parameters_of(1, written)
    for name in ("learning_rate", "network_dim", "network_alpha", "optimizer_type", "max_train_epochs"):
        assert answer["read"][name] == parameters[name]
    assert "weight_decay=0.05" in answer["read"]["optimizer_args"]

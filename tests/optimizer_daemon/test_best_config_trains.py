"""best_training_config.toml is what it says it is: the printed command trains it, for real, in the tiny world."""

from __future__ import annotations

import subprocess

from examples.tiny_world.paths import BASE_MODEL
from optimizer_daemon.analysis.analyze import analysis_of, write_documents
from shared.safetensors_file import read_checkpoint
from tests.scenarios.lab import DATASET_TOML
from tests.scenarios.measured_study import Written, write_study


def test_the_command_beside_it_trains_the_winners_configuration(tmp_path):
    dataset = tmp_path / "dataset.toml"
    dataset.write_text(DATASET_TOML)
    written = Written(
        trials=2,
        epochs=(1, 2),
        base_model=str(BASE_MODEL),
        settings={"dataset-config": str(dataset), "save-every-n-epochs": 1, "seed": 42, "device": "cpu"},
        parameters={"network_dim": 4, "network_alpha": 2, "optimizer_type": "AdamW", "learning_rate": 1e-3},
    )
    study = write_study(tmp_path / "study", written, storage=False)
    analysis = analysis_of(study)
    write_documents(study, analysis)
    command = analysis.config.command
    assert command and f"  {command}" in study.results.best_training_config_text.read_text()
    trained = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=600)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    files = sorted(path.name for path in study.best_training.glob("*.safetensors"))
    assert files == ["lora_best_training-000001.safetensors", "lora_best_training.safetensors"]
    lora = read_checkpoint(study.best_training / files[-1], study.best_training)
    assert (lora.metadata["ss_network_dim"], lora.metadata["ss_epoch"], lora.metadata["ss_seed"]) == ("4", "2", "1")

"""What the end of a kohya training means, with the settings of that very training."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimizer_daemon.lora_training.memory import Memory, out_of_memory
from optimizer_daemon.trainers.diagnosis import explain
from shared.schemas import TrainerExit

_WORKER_KILLED = re.compile(r"DataLoader worker \(pid.*?(?:killed by signal|exited unexpectedly)")
_LATENTS_OVERFLOWED = re.compile(r"NaN detected in latents: (\S+)")


def diagnose(record: TrainerExit | None, last_lines: Sequence[str]) -> str:
    """Return one sentence that names the cause and the remedy."""
    config = _config_of(record)
    text = "\n".join(last_lines)

    def remedies(memory: Memory) -> str:
        workers, rank = config.get("max_data_loader_n_workers"), config.get("network_dim")
        return out_of_memory(
            memory,
            batch_size=_where_the_batch_size_is_set(config),
            gradient_checkpointing=config.get("gradient_checkpointing") is True,
            network_dim=rank if isinstance(rank, int) else None,
            workers=workers if isinstance(workers, int) else 0,
        )

    if overflowed := _LATENTS_OVERFLOWED.search(text):
        return (
            f"the VAE gave no numbers for {overflowed[1]}, for 16 bits are too few for it; set no_half_vae = true in "
            "[trainer.kohya]"
        )
    if _WORKER_KILLED.search(text):
        return f"{remedies('host')} (a process that loads pictures was killed)"
    return explain(record, last_lines, remedies=remedies)


def _config_of(record: TrainerExit | None) -> Mapping[str, Any]:
    """Return the settings that a training ran with; none where its file is gone."""
    if record is None or "--config_file" not in record.command[:-1]:
        return {}
    path = Path(record.command[record.command.index("--config_file") + 1])
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _where_the_batch_size_is_set(config: Mapping[str, Any]) -> str:
    try:
        document = json.loads(Path(str(config.get("dataset_config"))).read_text(encoding="utf-8"))
        tables = [document.get("general", {}), *document["datasets"]]
    except (OSError, ValueError, KeyError, AttributeError):
        tables = [{"batch_size": None}]
    if any("batch_size" in table for table in tables):
        return "batch_size in the data-set TOML"
    return "train_batch_size in [trainer.kohya]"

"""python -m optimizer_daemon.lora_training --config trial_0005/train_config.toml

Exit status: 0 trained; 2 bad input; 3 a damaged training state; 4 no memory, GPU or disk; 143 and 130 stopped by
SIGTERM and SIGINT, with the state saved in state_dir.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from optimizer_daemon.lora_training.base_model import inspect_base_model
from optimizer_daemon.lora_training.config import load_config
from optimizer_daemon.lora_training.dataset import load_data
from optimizer_daemon.lora_training.families import require_encoder_rates
from optimizer_daemon.lora_training.stopping import StopWish
from shared.commands import run_command
from shared.errors import DiskError


def main(arguments: Sequence[str]) -> int:
    """Train what the configuration describes."""
    options = _parse(arguments)
    wish = StopWish()
    wish.listen()
    config = load_config(options.config)
    if options.resume:
        config = config.model_copy(update={"resume": True})
    base = inspect_base_model(config.pretrained_model_name_or_path)
    config.predicts_velocity(base.predicts_velocity)  # refuses settings of the other kind
    require_encoder_rates(config.text_encoder_lr, base)
    data = load_data(
        config.dataset_config,
        batch_size=config.train_batch_size,
        multiple_of=base.vae_factor,
        held_out=config.held_out,
        seed=config.seed,
        command=config.of_datasets,
    )
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(config.output_dir, error) from error
    wish.check()
    # On CPUs with AVX512-BF16 it asks on stderr for a package of kernels that only 4-bit weights would need.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Takes seconds, so it comes after everything that can be refused without it.
    from optimizer_daemon.lora_training.train import train

    train(config, data, base, wish)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m optimizer_daemon.lora_training",
        description="Train one LoRA on a Stable Diffusion 1.5 or SDXL model.",
    )
    parser.add_argument("--config", type=Path, required=True, help="train_config.toml")
    parser.add_argument("--resume", action="store_true", help="go on from the state in state_dir, where there is one")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

"""Make tests/data/kohya anew by running the real sd-scripts:

    SD_SCRIPTS_DIR=/src/sd-scripts SD_SCRIPTS_PYTHON=/src/sd-scripts/venv/bin/python python -m tests.kohya.make_golden

What the files are: tests/data/kohya/README.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.kohya.narrow_world import NarrowWorld, make_world
from tests.optimizer_daemon.lora_training.workshop import header_of

GOLDEN = Path(__file__).resolve().parents[1] / "data/kohya"
NAME = "lora_trial_1"
# Every bar that sd-scripts draw beside that of the steps: validation, samples.
TRAINING: dict[str, Any] = {
    "save_state": True,
    "validation_split": 0.34,
    "validation_seed": 1,
    "validate_every_n_epochs": 2,
    "sample_every_n_epochs": 2,
}
_PARSER = """
import json, train_network
actions = [a for a in train_network.setup_parser()._actions if a.dest != "help"]
print(json.dumps(sorted(a.dest for a in actions)))
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        world = make_world(root, Path(os.environ["SD_SCRIPTS_DIR"]).absolute(), os.environ["SD_SCRIPTS_PYTHON"])
        GOLDEN.mkdir(exist_ok=True)
        make_golden(world, root, GOLDEN)
    return 0


def make_golden(world: NarrowWorld, root: Path, into: Path) -> None:
    """Train plainly, with every bar, from a state, and to a loss that is no number; write what each of them left."""
    world.train(root / "plain")
    _write_header(into / "lora.json", root / f"plain/{NAME}.safetensors")

    out = root / "trial_0001"
    prompts = root / "prompts.txt"
    prompts.write_text("a red ball --w 64 --h 64 --s 2 --d 7\n")
    training = {**TRAINING, "sample_prompts": str(prompts)}
    _write_log(into / "training", world.train(out, **training), root)
    _write_states(into / "states.json", out)

    state = {"resume": str(out / f"{NAME}-000002-state"), "initial_epoch": 3}
    _write_log(into / "resumed", world.train(out, **training, **state), root)
    _write_states(into / "states_of_resumed.json", out)

    _write_log(into / "no_number", world.train(root / "no_number", learning_rate=1e30, unet_lr=1e30), root)
    options = world.run(["-c", _PARSER])
    options.check_returncode()
    _write_json(into / "options.json", json.loads(options.stdout.splitlines()[-1]))


def _write_log(stem: Path, done: subprocess.CompletedProcess[bytes], root: Path) -> None:
    """Keep both streams; only blanks that fill a line are taken away, and the folders get names of their own."""
    environment = os.fsencode(Path(os.environ["SD_SCRIPTS_PYTHON"]).absolute().parents[1])
    for suffix, output in ((".stdout.log", done.stdout), (".stderr.log", done.stderr)):
        lines = output.replace(os.fsencode(root), b"/study").replace(environment, b"/venv").split(b"\n")
        stem.with_name(stem.name + suffix).write_bytes(b"\n".join(line.rstrip(b" ") for line in lines))


def _write_header(file: Path, lora: Path) -> None:
    entries, metadata, _ = header_of(lora)
    tensors = {name: [entry["dtype"], entry["shape"]] for name, entry in entries.items()}
    _write_json(file, {"metadata": metadata, "tensors": tensors})


def _write_states(file: Path, out: Path) -> None:
    states = {
        folder.name: {
            "files": sorted(path.name for path in folder.iterdir()),
            "train_state.json": json.loads((folder / "train_state.json").read_text()),
        }
        for folder in sorted(out.glob("*-state"))
    }
    _write_json(file, states)


def _write_json(file: Path, content: Any) -> None:
    """Write one entry a line, and not one number."""
    if isinstance(content, dict) and "tensors" in content:
        tensors = ",\n".join(f"  {json.dumps(name)}: {json.dumps(fact)}" for name, fact in content["tensors"].items())
        metadata = json.dumps(content["metadata"], indent=2)
        file.write_text(f'{{"metadata": {metadata},\n"tensors": {{\n{tensors}\n}}}}\n', encoding="utf-8")
    else:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

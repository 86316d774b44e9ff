"""A real training command that needs milliseconds: it writes whole kohya LoRA files, a log, and resume state.

As a module it is the trainer plugin `scripted_trainer:TRAINER`; as a script it is the command that plugin plans.
SCRIPTED_TRAINER in the environment holds its behaviour as JSON; `hold` names a file without which
it does not get beyond epoch 1, {} in it being its output name; `preloaded` has it forked from a server.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from pathlib import Path

BEHAVIOUR = {"epoch_s": 0.05, "exit_at_epoch": 0, "exit_status": 1, "deaf": False, "hold": "", "preloaded": False}


def lora(epoch: int, score: float) -> bytes:
    """One module of rank 2 whose weights differ from epoch to epoch."""
    module = "lora_unet_mid_block_attentions_0_proj_in"
    parts = {
        f"{module}.alpha": ([], struct.pack("<f", 2.0)),
        f"{module}.lora_down.weight": ([2, 4], struct.pack("<8f", *[0.5] * 8)),
        f"{module}.lora_up.weight": ([4, 2], struct.pack("<8f", *[0.1 * epoch + score] * 8)),
    }
    header: dict = {"__metadata__": {"ss_epoch": str(epoch), "score": repr(score)}}
    end = 0
    for name, (shape, data) in parts.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, data in parts.values())


def train(folder: Path, output_name: str, epochs: int, every: int, score: float) -> None:
    behaviour = BEHAVIOUR | json.loads(os.environ.get("SCRIPTED_TRAINER", "{}"))
    state = folder / "state" / "epoch.json"
    done = json.loads(state.read_text()) if state.exists() else 0

    def save_and_exit(*_: object) -> None:
        state.parent.mkdir(exist_ok=True)
        state.write_text(json.dumps(done))
        sys.exit(143)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour["deaf"] else save_and_exit)
    print(f"training from epoch {done + 1} on {os.environ.get('CUDA_VISIBLE_DEVICES') or 'the CPU'}", flush=True)
    hold = behaviour["hold"].replace("{}", output_name)
    for epoch in range(done + 1, epochs + 1):
        time.sleep(behaviour["epoch_s"])
        while epoch == 2 and hold and not Path(hold).exists():
            time.sleep(0.05)
        if epoch == behaviour["exit_at_epoch"]:
            print("RuntimeError: CUDA out of memory", flush=True)
            sys.exit(behaviour["exit_status"])
        print(f"scripted: {epoch} {epochs} {1 / epoch:.3f}", end="\r", flush=True)
        if epoch % every == 0 or epoch == epochs:
            name = output_name if epoch == epochs else f"{output_name}-{epoch:06d}"
            target = folder / f"{name}.safetensors"
            hidden = target.with_name(f".tmp-{target.name}")
            hidden.write_bytes(lora(epoch, score + 0.1 / epoch))
            hidden.replace(target)
        done = epoch
    print("\ndone", flush=True)


def __getattr__(name: str) -> object:
    if name != "TRAINER":
        raise AttributeError(name)
    from scripted_plugin import ScriptedTrainer  # what the plugin needs, the command must not load

    return ScriptedTrainer()


if __name__ == "__main__":
    folder, output_name, epochs, every, score = sys.argv[1:]
    train(Path(folder), output_name, int(epochs), int(every), float(score))

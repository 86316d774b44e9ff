"""A training program of somebody else's: it counts steps, saves in place and slowly, and knows nothing of trials.

    python other_program.py --out DIR --steps 12 --save_every 6 --lr 1e-3 [--resume checkpoint-6] [--fault NAME]

As diffusers' example does it leaves checkpoint-<step>/pytorch_lora_weights.safetensors and, at the end,
pytorch_lora_weights.safetensors; its state is checkpoint-<step>/state.json. At SIGTERM it saves nothing and dies.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripted_trainer import lora

STEP_S = 0.2
LAST_RITES_S = 2.0  # what real ones do between their last step and their last save
WEIGHTS = "pytorch_lora_weights.safetensors"


def write_slowly(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        for begin in range(0, len(content), 64):
            file.write(content[begin : begin + 64])
            time.sleep(0.01)


def fail(fault: str) -> None:
    if fault == "exits with 3":
        print("something is wrong", flush=True)
        sys.exit(3)
    if fault == "crashes":
        raise ValueError("3 is no rank")
    if fault == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "leaves a child":
        subprocess.Popen(["sleep", "600"], start_new_session=True)
    if fault == "says done when interrupted":
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    if fault == "hears nothing but SIGINT":
        signal.signal(signal.SIGINT, lambda *_: sys.exit(7))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save_every", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--resume", default="")
    parser.add_argument("--fault", default="")
    given = parser.parse_args()
    done = json.loads((given.out / given.resume / "state.json").read_text()) if given.resume else 0
    print(f"training from step {done + 1}, rank {given.rank}", flush=True)
    fail(given.fault)
    for step in range(done + 1, given.steps + 1):
        time.sleep(STEP_S)
        counts = f"{step}/{given.steps} [00:01<00:02,  {STEP_S:.2f}s/it, lr={given.lr}, step_loss={1 / step:.3f}]"
        print(f"\rSteps:  50%|#####     | {counts}", end="", file=sys.stderr, flush=True)
        if step % given.save_every == 0:
            checkpoint = given.out / f"checkpoint-{step}"
            write_slowly(checkpoint / WEIGHTS, lora(step, given.lr))
            (checkpoint / "state.json").write_text(json.dumps(step))
    time.sleep(LAST_RITES_S)
    if given.fault != "saves no final checkpoint":
        write_slowly(given.out / WEIGHTS, lora(given.steps, given.lr)[: 200 if given.fault == "saves half" else None])
    print("\nbye", flush=True)


if __name__ == "__main__":
    main()

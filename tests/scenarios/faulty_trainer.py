"""A real training command that goes wrong as told, and its plugin `faulty_trainer:TRAINER`.

FAULTS in the environment is a JSON object, trial number -> name of a function below; other trials train well. The
output is that of sd-scripts, and it is read and explained as sd-scripts' is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS, STEPS_PER_EPOCH = 12, 6


class Training:
    """One training: it draws the bar and leaves checkpoints."""

    def __init__(self, folder: Path, output_name: str) -> None:
        self.folder, self.output_name = folder, output_name
        self.step = 0

    def bar(self, loss: str = "0.5") -> None:
        epoch = f"epoch={1 + self.step // STEPS_PER_EPOCH}/{STEPS // STEPS_PER_EPOCH}"
        counts = f"| {self.step}/{STEPS} [00:01<00:01, 20.00it/s, avr_loss={loss}, {epoch}]"
        print(f"\rsteps:  50%|#####     {counts}", end="", file=sys.stderr, flush=True)

    def train(self, until: int = STEPS) -> None:
        while self.step < until:
            self.step += 1
            time.sleep(0.01)
            self.bar()

    def save(self, size: int | None = None) -> None:
        sys.path.insert(0, str(HERE.parent / "optimizer_daemon"))
        from scripted_trainer import lora

        (self.folder / f"{self.output_name}.safetensors").write_bytes(lora(2, 0.5)[:size])


def crash_at_start(training: Training) -> None:
    raise ModuleNotFoundError("No module named 'lycoris'")


def crash_in_epoch_2(training: Training) -> None:
    training.train(until=8)
    print(file=sys.stderr)
    raise RuntimeError("expected scalar type Half but found Float")


def segfault(training: Training) -> None:
    training.train(until=3)
    os.kill(os.getpid(), signal.SIGSEGV)


def nan_and_goes_on(training: Training) -> None:
    while True:
        training.step += 1
        training.bar(loss="nan")
        time.sleep(0.02)


def hangs_and_ignores_sigterm(training: Training) -> None:
    """Chatters on without progress; neither it nor the child it forked heeds SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    training.train(until=4)
    child = subprocess.Popen(["sleep", "600"], start_new_session=True, stderr=subprocess.DEVNULL)
    (training.folder / "logs").mkdir(exist_ok=True)
    (training.folder / "logs" / "child").write_text(str(child.pid))
    while True:
        print("waiting for the GPU", flush=True)
        time.sleep(0.5)


def floods_the_log(training: Training) -> None:
    """200 MB of short lines, 100 MB without a line feed, and then what the matter is."""
    for _ in range(200):
        sys.stdout.buffer.write(b"DEBUG a line nobody asked for\n" * 33_000)
    for _ in range(100):
        sys.stdout.buffer.write(b"x" * 1_000_000)
        time.sleep(0.02)
    print("\nthe last but one line", flush=True)
    raise ValueError("too much to say")


def leaves_children(training: Training) -> None:
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    training.train()
    training.save()


def saves_no_final_checkpoint(training: Training) -> None:
    training.train()


def saves_half_a_final_checkpoint(training: Training) -> None:
    training.train()
    training.save(size=200)


def gpu_memory(training: Training) -> None:
    training.train(until=1)
    (training.folder / "logs").mkdir(exist_ok=True)
    (training.folder / "logs" / f"start-{time.time_ns()}").touch()
    while (gate := os.environ.get("FAULT_GATE")) and not Path(gate).exists():
        time.sleep(0.02)
    print("\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", file=sys.stderr, flush=True)
    sys.exit(1)


def host_memory(training: Training) -> None:
    bytearray(2**62)


def is_killed(training: Training) -> None:
    training.train(until=2)
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk(training: Training) -> None:
    training.train(until=6)
    raise OSError(28, "No space left on device", "lora.safetensors")


def trains_well(training: Training) -> None:
    training.train()
    training.save()


def __getattr__(name: str) -> object:
    if name != "TRAINER":
        raise AttributeError(name)
    from faulty_plugin import FaultyTrainer  # what the plugin needs, the command must not load

    return FaultyTrainer()


if __name__ == "__main__":
    folder, output_name, fault = sys.argv[1:]
    globals()[fault](Training(Path(folder), output_name))

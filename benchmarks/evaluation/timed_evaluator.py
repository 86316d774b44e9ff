"""`evaluator-daemon evaluate` with a clock at its networks: where a checkpoint's time goes. Used by `throughput`.

    python -m benchmarks.evaluation.timed_evaluator TIMES.json evaluate --trial DIR ...

The command and everything it does are the real ones. Forward hooks add up the time inside UNet, text encoders, VAE and
every network of the metrics; the whole of a checkpoint runs from the end of the one before to its own end, looking at
the folder, reading, hashing, writing and all. TIMES.json gets one entry for each checkpoint but the first, which also
loads the models.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from evaluator_daemon.cli import main as evaluator_daemon
from evaluator_daemon.evaluator import Evaluator
from evaluator_daemon.resident import ResidentModel


class Clock:
    """Seconds spent inside watched networks since the last `take`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._watched: set[int] = set()
        self._begun: list[float] = []

    def watch(self, name: str, module: nn.Module) -> None:
        """Add the time of every call of this module to `name`'s; one inside another counts once, for the outer."""
        if id(module) in self._watched:
            return
        self._watched.add(id(module))
        module.register_forward_pre_hook(lambda *_: self._begun.append(time.perf_counter()))

        def end(*_: object) -> None:
            begun = self._begun.pop()
            if not self._begun:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

        module.register_forward_hook(end)

    def take(self) -> dict[str, float]:
        """Return and forget what has added up."""
        taken, self.seconds = self.seconds, {}
        return taken


def networks_of(owner: object) -> Iterator[nn.Module]:
    """The networks that a metric holds, itself or in what it is made of, and their parts, which it may call alone."""
    for value in getattr(owner, "__dict__", {}).values():
        if isinstance(value, nn.Module):
            yield value
            yield from value.children()
        elif type(value).__module__.startswith("evaluator_daemon.metrics"):
            yield from networks_of(value)


def main(times_file: Path, arguments: list[str]) -> None:
    """Run the command and write the times; exits as the command does."""
    clock = Clock()
    entries: list[dict[str, object]] = []
    ends: list[float] = []
    ready, evaluate = ResidentModel._ready, Evaluator.evaluate

    def watched_ready(model: Any) -> Any:
        found = ready(model)
        pipeline = model._renderer._pipeline
        for name in ("unet", "text_encoder", "text_encoder_2"):
            if isinstance(network := getattr(pipeline, name, None), nn.Module):
                clock.watch(name, network)
        clock.watch("vae", pipeline.vae.decoder)
        clock.watch("vae", pipeline.vae.post_quant_conv)
        for source in model._sources:
            for network in networks_of(source):
                clock.watch(type(source).__name__, network)
        return found

    def timed_evaluate(evaluator: Any, file: Any, view: Any) -> bool:
        done: bool = evaluate(evaluator, file, view)
        ends.append(time.perf_counter())
        inside = clock.take()
        if len(ends) > 1:
            entries.append({"checkpoint": file.name, "whole": ends[-1] - ends[-2], "inside": inside})
        return done

    ResidentModel._ready = watched_ready  # type: ignore[method-assign]
    Evaluator.evaluate = timed_evaluate  # type: ignore[method-assign]
    try:
        evaluator_daemon(arguments)
    finally:
        times_file.write_text(json.dumps(entries))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""The progress bar that kohya's sd-scripts and our native trainer draw.

    steps:  12%|█▎        | 2/16 [00:46<05:28, 23.48s/it, avr_loss=1.17, epoch=1/4]

The native trainer adds the epoch; kohya announces it on a line of its own, `epoch 1/4`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_BAR = re.compile(
    r"steps:\s+\d+%\|[^|]*\|\s*(?P<step>\d+)/(?P<steps>\d+)\s+\[[\d:]+<(?P<eta>[\d:]+|\?)"
    r",\s*(?P<rate>[\d.]+|\?)(?P<unit>s/it|it/s)(?P<rest>[^\]\r\n]*)\]"
)
_LOSS = re.compile(r"avr_loss=([-+]?(?:[\d.]+(?:e[-+]?\d+)?|nan|inf))", re.IGNORECASE)
_EPOCH = re.compile(r"epoch=(\d+)")
_ANNOUNCED = re.compile(r"\s*epoch (?P<epoch>\d+)/\d+\s*")
# The bar of kohya's latents has no name; that of its captions has.
_PREPARING = re.compile(
    r"\s*(?:(?P<what>read caption|get image size|(?:epoch )?validation steps):\s+)?"
    r"\d+%\|[^|]*\|\s*(?P<done>\d+)/(?P<all>\d+) \["
)
_PREPARATION = re.compile(r"(?:encoding )?(?P<what>latents|validating): (?P<done>\d+)/(?P<all>\d+)")


@dataclass(frozen=True)
class Progress:
    """What one line of a training's output says about how far it is.

    Args:
        epoch: the running epoch, counted from 1; None where the line does not tell.
        step: optimizer steps done; 0 where the line does not tell.
        steps: optimizer steps of the whole training; 0 where the line does not tell.
        preparing: what is done before the first step, such as "latents"; `step` and `steps` then count that.
        loss: mean loss over about one epoch; may be NaN.
        seconds_per_step: mean so far.
        eta_s: seconds to the end, by the trainer's estimate.
    """

    epoch: int | None
    step: int
    steps: int
    loss: float | None = None
    seconds_per_step: float | None = None
    eta_s: float | None = None
    preparing: str | None = None

    def after(self, before: Progress | None) -> Progress:
        """Return what is known after this line, when `before` was known: kohya's lines tell the epoch or the step."""
        if before is None or before.preparing is not None:
            return self
        if self.preparing is not None:  # a picture is sampled, and the like
            return before if before.epoch is not None or before.steps else self
        if self.steps == 0:
            return replace(before, epoch=self.epoch)
        return self if self.epoch is not None else replace(self, epoch=before.epoch)


def parse_bar(line: str) -> Progress | None:
    """Read the last bar in `line`; other bars, such as those of sampling or validation, are none of ours."""
    bars = [match for match in _BAR.finditer(line) if not line[: match.start()].endswith("validation ")]
    if not bars:
        return None
    bar = bars[-1]
    loss, epoch = _LOSS.search(bar["rest"]), _EPOCH.search(bar["rest"])
    return Progress(
        epoch=int(epoch[1]) if epoch else None,
        step=int(bar["step"]),
        steps=int(bar["steps"]),
        loss=float(loss[1]) if loss else None,
        seconds_per_step=_seconds_per_step(bar["rate"], bar["unit"]),
        eta_s=_seconds(bar["eta"]),
    )


def parse_preparation(line: str) -> Progress | None:
    """Read what the native trainer says while it encodes images, before its first step, and while it validates."""
    found = _PREPARATION.search(line)
    return found and Progress(None, int(found["done"]), int(found["all"]), preparing=found["what"])


def parse_epoch(line: str) -> Progress | None:
    """Read the line on which kohya announces an epoch."""
    announced = _ANNOUNCED.fullmatch(line)
    return announced and Progress(int(announced["epoch"]), 0, 0)


def parse_unnamed_bar(line: str) -> Progress | None:
    """Read the bars that kohya draws where it takes no step: over captions, pictures, samples and validation."""
    found = _PREPARING.match(line)
    return found and Progress(None, int(found["done"]), int(found["all"]), preparing=found["what"] or "latents")


def _seconds_per_step(rate: str, unit: str) -> float | None:
    if rate == "?" or float(rate) == 0.0:
        return None
    return float(rate) if unit == "s/it" else 1.0 / float(rate)


def _seconds(clock: str) -> float | None:
    """Read [H:]MM:SS."""
    if clock == "?":
        return None
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60.0 * seconds + float(part)
    return seconds

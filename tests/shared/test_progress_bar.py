"""kohya's lines tell the epoch or the step, never both: what is known after each."""

from __future__ import annotations

import pytest

from shared.progress_bar import Progress, parse_bar, parse_epoch, parse_unnamed_bar


def read(line: str) -> Progress | None:
    return parse_bar(line) or parse_epoch(line) or parse_unnamed_bar(line)


LATENTS = "  0%|          | 0/3 [00:00<?, ?it/s]"
CAPTIONS = "read caption: 100%|██████████| 3/3 [00:00<00:00, 900.13it/s]"
STEPS = "steps:  25%|██▌       | 2/8 [00:04<00:12,  2.05s/it, avr_loss=1.13]"
VALIDATION = (
    "epoch validation steps:  50%|█████     | 2/4 [00:01<00:01,  1.0it/s, val_epoch_avg_loss=0.1, timestep=400]"
)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (LATENTS, Progress(None, 0, 3, preparing="latents")),
        (CAPTIONS, Progress(None, 3, 3, preparing="read caption")),
        ("epoch 2/4", Progress(2, 0, 0)),
        (STEPS, Progress(None, 2, 8, 1.13, 2.05, 12.0)),
        (VALIDATION, Progress(None, 2, 4, preparing="epoch validation steps")),
        ("epoch is incremented. current_epoch: 0, epoch: 3", None),
        ("saving checkpoint: /study/trial_0001/lora_trial_1-000002.safetensors", None),
    ],
)
def test_a_line_tells_what_it_says(line: str, told: Progress | None):
    assert read(line) == told


def known(*lines: str) -> Progress | None:
    """What is known after these lines."""
    progress: Progress | None = None
    for line in lines:
        told = read(line)
        assert told is not None, line
        progress = told.after(progress)
    return progress


def test_the_epoch_is_kept_through_the_steps_of_it_and_the_steps_through_the_next_epoch():
    assert known(LATENTS, "epoch 1/4", STEPS) == Progress(1, 2, 8, 1.13, 2.05, 12.0)
    assert known(LATENTS, "epoch 1/4", STEPS, "epoch 2/4") == Progress(2, 2, 8, 1.13, 2.05, 12.0)


def test_bars_that_take_no_step_change_nothing_once_it_trains():
    assert known("epoch 1/4", STEPS, VALIDATION) == known("epoch 1/4", STEPS)
    assert known(CAPTIONS, LATENTS) == read(LATENTS)

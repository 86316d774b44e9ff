"""Trainers: each turns a trial's parameters into the command that trains them."""

from optimizer_daemon.trainers.base import TrainerPlugin
from shared.registry import Registry

TRAINERS: Registry[TrainerPlugin] = Registry(
    "trainer",
    TrainerPlugin,
    {
        "command": "optimizer_daemon.trainers.command:TRAINER",
        "kohya": "optimizer_daemon.trainers.kohya:TRAINER",
        "native": "optimizer_daemon.trainers.native:TRAINER",
    },
)
"""Every trainer by the name that --trainer takes."""

__all__ = ["TRAINERS"]

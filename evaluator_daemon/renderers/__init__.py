"""From a checkpoint to pictures at fixed prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable

from evaluator_daemon.job import Job
from evaluator_daemon.renderers.base import Renderer
from shared.registry import Registry

RENDERERS: Registry[Callable[[Job], Renderer]] = Registry(
    "renderer", Renderer, {"diffusion": "evaluator_daemon.renderers.diffusion:DiffusionRenderer"}
)
"""Each is made with the job and holds its model for the life of the process."""

"""A study whose trials are trained by the real sd-scripts, and the real processes of both daemons."""

from __future__ import annotations

from pathlib import Path

from examples.tiny_world.paths import CLIP_MODEL
from tests.kohya.narrow_world import NarrowWorld
from tests.scenarios.lab import Lab

SPACE = """
name = "narrow"
[parameters.learning_rate]
type = "float"
low = 1e-4
high = 1e-2
log = true
[parameters.network_dim]
type = "categorical"
choices = [4, 8]
[parameters.network_alpha]
type = "categorical"
choices = [2, 4]
[parameters.optimizer_type]
type = "categorical"
choices = ["AdamW"]
[parameters.lr_scheduler]
type = "categorical"
choices = ["cosine", "constant"]
[parameters.max_train_epochs]
type = "categorical"
choices = [{epochs}]
"""


class KohyaLab(Lab):
    """A lab whose study file names the narrowed sd-scripts; checkpoints come every second epoch.

    Args:
        folder: an empty folder.
        world: what sd-scripts need.
        epochs: of each trial.
    """

    def __init__(self, folder: Path, world: NarrowWorld, *, epochs: int) -> None:
        super().__init__(folder, space=SPACE.format(epochs=epochs))
        self.study_file.write_text(
            f'[optimizer]\nbase_model = "{world.base}"\nclip_model = "{CLIP_MODEL}"\n'
            f'dataset_config = "{world.dataset}"\nsearch_space = "space.toml"\noutput_dir = "study"\ndevice = "cpu"\n'
            f'trainer = "kohya"\nsd_scripts_dir = "{world.checkout}"\ntrainer_python = "{world.python}"\n'
            'num_samples = 2\nrender_steps = 2\nsave_every_n_epochs = 2\nsampler = "random"\n'
            "[trainer.kohya]\nmax_data_loader_n_workers = 0\n"
            '[evaluator]\noptimization_dir = "study"\ndevice = "cpu"\ncheck_interval = 2\n'
            "evaluator_check_interval = 1\nidle_timeout = 30\n"
        )

"""What the real sd-scripts take and do not take, asked at the start of a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimizer_daemon.trainers.base import TrainerInput
from optimizer_daemon.trainers.kohya_checks import ask, require_accepted, require_known
from shared.errors import UserError
from shared.schemas import Trainer
from tests.optimizer_daemon.trainers.test_kohya import config_of, params, study
from tests.scenarios.bad_input import World
from tests.scenarios.kohya_cases import in_dataset, refusal, saved_by_transformers_4

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("space", "table", "line", "says"),
    [
        ("v1", "optimizer_args = { weight_decay = 0.01 }", "flip_aug = true", ""),
        ("v2.1", 'network_args = ["conv_dim=4"]\nmin_snr_gamma = 5.0\nxformers = false', "keep_tokens = 1", ""),
        ("v2.1", "min_snr_gama = 5.0", "", "have no such option; did you mean 'min_snr_gamma'?; take it out"),
        ("v2.1", 'min_snr_gamma = "5"', "", "[trainer.kohya] min_snr_gamma: '5' will not do; a number is expected"),
        ("v2.1", "optimizer_args = { decay = 1 }", "", "unexpected keyword argument 'decay'"),
        ("v2.1", 'lr_scheduler_args = ["odd=1"]', "", "sd-scripts refuse lr_scheduler "),
        ("v2.1", 'network_module = "networks.none"', "", "No module named 'networks.none'"),
        ("v2.1", "adaptive_noise_scale = 0.1", "", "adaptive_noise_scale requires noise_offset; correct"),
        ("v2.1", "", "colour_aug = true", "dataset.toml: sd-scripts refuse it: extra keys not allowed"),
        ("v2.1", "", "num_repeats = '3'", "dataset.toml: sd-scripts refuse it: expected int"),
    ],
    ids=lambda value: value if value and "\n" not in value and len(value) < 40 else "-",
)
def test_the_real_checkout_is_asked(
    sd_scripts: tuple[Path, str], tmp_path: Path, space: str, table: str, line: str, says: str
):
    world = World(tmp_path, None)
    base = saved_by_transformers_4(world)
    with world.study_file.open("a") as file:
        file.write(f"[trainer.kohya]\n{table}\n")
    in_dataset("[[datasets.subsets]]", line)(world)
    flags = ("--sd-scripts-dir", sd_scripts[0], "--trainer-python", sd_scripts[1], "--base-model", base)
    said = refusal(world.optimizer(*flags, "--search-space", space))
    assert (says in said) if says else said == ""


def test_the_sdxl_script_takes_every_setting_of_an_sdxl_trial(sd_scripts: tuple[Path, str]):
    """No SDXL model is at hand, and none is needed to ask the script's parser and functions."""
    run = study("sdxl", clip_skip=1)
    config, trial = config_of(run), params()
    dataset = {"datasets": [{"resolution": 1024, "subsets": [{"image_dir": "/data/luca"}]}]}
    answer = ask(*sd_scripts, "sdxl_train_network", [config], dataset, python_path=[])
    given = TrainerInput(Path("/base"), Path("/dataset.toml"), "sdxl", run.trainer, "cpu", (trial,))
    require_known(given, config, answer, "tried")
    require_accepted(given.dataset_config, answer)
    assert "no_half_vae" in config
    with pytest.raises(UserError, match="no_half_vea: sd-scripts tried have no such option"):
        mistyped = Trainer(name="kohya", options={"no_half_vea": True})
        given = TrainerInput(Path("/base"), Path("/dataset.toml"), "sdxl", mistyped, "cpu", (trial,))
        require_known(given, {**config, "no_half_vea": True}, answer, "tried")

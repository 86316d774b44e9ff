"""What the real sd-scripts take and do not take, asked at the start of a study."""

from __future__ import annotations

from pathlib import Path

import pytest

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

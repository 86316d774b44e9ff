"""Is a LoRA the whole one that its trial trains? As a table; and what has become of a file since it was admitted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from evaluator_daemon.admission import EVALUATOR_CODES, admit, require_own_network, standing
from shared.errors import RefusedCheckpointError
from shared.safetensors_file import CODES, lora_modules, lora_ranks, read_checkpoint
from shared.schemas import TrialParams
from tests.scenarios.lora_files import STANDARD, every_module, lora, peft_lora, unet, unet_shapes
from tests.shared.weight_files import saved

ALL = every_module()
HALF = dict(list(ALL.items())[::2])
CONV = {**unet(), "lora_unet_conv_in": (32, 4, 3, 3)}
ARGS = {**STANDARD, "ss_network_args": '{"conv_dim": "4"}'}
TE_RATE = {"text_encoder_lr": 1e-4}
PEFT = {f"unet.{name}": shape for name, shape in unet_shapes().items()}


def params(**parameters) -> TrialParams:
    return TrialParams(trial=1, optuna_number=0, parameters=parameters, origin="sampler", training_seed=1)


def verdict(folder: Path, content: bytes, parameters: dict, scored: bytes | None = None) -> str | None:
    checkpoint = read_checkpoint(saved(folder / "a.safetensors", content), folder)
    others = {}
    if scored is not None:
        others["b"] = lora_ranks(read_checkpoint(saved(folder / "b.safetensors", scored), folder))
    try:
        require_own_network(checkpoint, lora_modules(checkpoint), params(**parameters), others)
    except RefusedCheckpointError as error:
        assert error.code in EVALUATOR_CODES
        return error.code
    return None


@pytest.mark.parametrize(
    ("content", "parameters", "scored"),
    [
        pytest.param(lora(1), {"network_dim": 4, "network_alpha": 2.0}, lora(2), id="the same network as before"),
        pytest.param(lora(1, alpha=4.0), {"network_dim": 4, "network_alpha": 0}, None, id="alpha 0 means the rank"),
        pytest.param(lora(1, alpha=0.3), {"network_alpha": 0.3}, None, id="an alpha that half precision rounds"),
        pytest.param(lora(1, alpha=None), {"network_alpha": 2.0}, None, id="no alpha: it may be in the weights"),
        pytest.param(lora(1, unet()), {"learning_rate": 1e-4}, None, id="the UNet alone, nothing says otherwise"),
        pytest.param(lora(1, unet()), TE_RATE, None, id="the UNet alone by a trainer that tells nothing of itself"),
        pytest.param(lora(1, unet(), metadata=STANDARD), {"text_encoder_lr": 0}, None, id="a text encoder left alone"),
        pytest.param(
            lora(1, unet(), metadata=STANDARD),
            {**TE_RATE, "network_train_unet_only": True},
            None,
            id="a text encoder left alone by flag",
        ),
        pytest.param(lora(1, CONV, rank=8, metadata=ARGS), {"network_dim": 4}, None, id="arguments of the network"),
        pytest.param(lora(1, CONV, rank=8), {"network_dim": 8}, None, id="a convolution beside"),
        pytest.param(lora(1, ALL), {}, lora(2, HALF), id="more than a checkpoint before: that one is the half"),
        pytest.param(peft_lora(1, PEFT), {"network_dim": 4}, peft_lora(2, PEFT), id="diffusers' names"),
    ],
)
def test_a_legitimate_lora_is_never_refused(tmp_path, content, parameters, scored):
    assert verdict(tmp_path, content, parameters, scored) is None


@pytest.mark.parametrize(
    ("content", "parameters", "scored", "code"),
    [
        pytest.param(lora(1, rank=8), {"network_dim": 4}, None, "other_network", id="rank against params.json"),
        pytest.param(peft_lora(1, PEFT, rank=8), {"network_dim": 4}, None, "other_network", id="in diffusers' form"),
        pytest.param(lora(1, alpha=4.0), {"network_alpha": 2}, None, "other_network", id="alpha against params.json"),
        pytest.param(lora(1, rank=8), {}, lora(2), "other_network", id="rank against another checkpoint"),
        pytest.param(lora(1, HALF), {}, lora(2), "half_network", id="fewer modules than another checkpoint"),
        pytest.param(lora(1, unet(), metadata=STANDARD), TE_RATE, None, "half_network", id="no text encoder"),
        pytest.param(
            lora(1, unet(), metadata={**STANDARD, "ss_text_encoder_lr": "5e-05"}),
            {"learning_rate": 1e-4},
            None,
            "half_network",
            id="no text encoder, by its own metadata",
        ),
        pytest.param(
            lora(1, {n: s for n, s in ALL.items() if "_te_" in n}, metadata=STANDARD),
            {"unet_lr": 1e-4},
            None,
            "half_network",
            id="no UNet",
        ),
    ],
)
def test_a_half_or_a_strange_one_is_never_accepted(tmp_path, content, parameters, scored, code):
    assert verdict(tmp_path, content, parameters, scored) == code


@pytest.mark.parametrize(
    ("change", "fate"),
    [
        pytest.param(lambda path: None, "unchanged", id="nothing"),
        pytest.param(lambda path: path.write_bytes(lora(1)), "unchanged", id="the same content again"),
        pytest.param(lambda path: path.write_bytes(lora(2)), "replaced", id="other content"),
        pytest.param(lambda path: path.write_bytes(lora(1)[:-9]), "replaced", id="other content, not whole yet"),
        pytest.param(Path.unlink, "deleted", id="deleted"),
        pytest.param(lambda path: shutil.rmtree(path.parent), "deleted", id="with its folder"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), "replaced", id="a folder of that name"),
    ],
)
def test_what_has_become_of_an_admitted_file(tmp_path, change, fate):
    (tmp_path / "trial").mkdir()
    checkpoint, _ = admit(saved(tmp_path / "trial" / "a.safetensors", lora(1)), tmp_path / "trial")
    change(checkpoint.path)
    assert standing(checkpoint, tmp_path / "trial") == fate


def test_no_code_means_two_things():
    assert not EVALUATOR_CODES.keys() & CODES.keys()

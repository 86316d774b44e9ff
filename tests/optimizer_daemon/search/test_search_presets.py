"""The spaces that come with the program hold exactly the published numbers, and draw as planned."""

import ast
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from optimizer_daemon import search
from optimizer_daemon.search.load import load_space
from optimizer_daemon.search.space import format_parameters, parse_space

ROOT = Path(__file__).parents[3]
PRESETS = Path(search.__file__).parent / "presets"
SCHEDULERS = ("cosine", "cosine_with_restarts", "polynomial")
DRAWS = 10_000


def declared(space):
    """Return (low, high, log or step) or the choices of each parameter."""
    return {
        name: parameter.choices
        if parameter.type == "categorical"
        else (parameter.low, parameter.high, "log" if getattr(parameter, "log", False) else parameter.step)
        for name, parameter in space.parameters.items()
    }


@pytest.fixture(scope="module")
def v2_1():
    return load_space("v2.1")


@pytest.fixture(scope="module")
def draws(v2_1):
    rng = Random(42)
    return [v2_1.draw(rng) for _ in range(DRAWS)]


def test_v1_declares_the_first_space():
    assert declared(load_space("v1")) == {
        "learning_rate": (5e-5, 2e-4, "log"),
        "text_encoder_lr": (3e-5, 1e-4, "log"),
        "network_dim": (64, 96, 128, 192, 256),
        "network_alpha": (32, 48, 64, 96, 128),
        "optimizer_type": ("AdamW", "AdamW8bit", "Lion", "Adafactor"),
        "lr_scheduler": SCHEDULERS,
        "gradient_accumulation_steps": (1, 2, 4),
        "max_train_epochs": (8, 10, 12, 15),
        "lr_warmup_steps": (50, 200, 50),
    }


def test_v1_clamps_alpha_and_rejects_nothing():
    space, rng = load_space("v1"), Random(7)
    assert space.constraints == ()
    clamped = 0
    for _ in range(500):
        values = {name: parameter.draw(rng) for name, parameter in space.parameters.items()}
        completed = space.complete(values)
        assert completed["network_alpha"] == min(values["network_alpha"], values["network_dim"])
        assert space.validate(values) == space.validate(completed) == []
        clamped += completed["network_alpha"] < values["network_alpha"]
    assert clamped > 20


def test_v2_1_declares_the_second_space(v2_1):
    assert declared(v2_1) == {
        "learning_rate": (6e-5, 1.2e-4, "log"),
        "text_encoder_lr": (3e-5, 8e-5, "log"),
        "network_dim": (64, 128, 256),
        "network_alpha_ratio": (0.25, 0.9, 0.05),
        "optimizer_type": ("AdamW", "AdamW8bit"),
        "lr_scheduler": SCHEDULERS,
        "gradient_accumulation_steps": (1, 2, 4),
        "max_train_epochs": (12, 16, 20),
        "lr_warmup_steps": (50, 200, 50),
    }
    assert len(v2_1.parameters["network_alpha_ratio"].grid) == 14
    assert len(v2_1.constraints) == 7


SAFE = {
    "learning_rate": 9e-5,
    "text_encoder_lr": 5e-5,
    "network_dim": 128,
    "network_alpha_ratio": 0.5,
    "optimizer_type": "AdamW",
    "lr_scheduler": "cosine",
    "gradient_accumulation_steps": 2,
    "max_train_epochs": 16,
    "lr_warmup_steps": 150,
}

REASONS = [
    ("rule 1", {"learning_rate": 1.3e-4, "optimizer_type": "AdamW8bit"}, "High LR (>0.00012) + AdamW8bit = unstable"),
    ("rule 2", {"network_alpha_ratio": 1.0}, "Alpha ≈ Dim causes overfitting + instability"),
    ("rule 3", {"network_dim": 256, "max_train_epochs": 12}, "High dim (≥256) needs ≥16 epochs for convergence"),
    ("rule 4", {"learning_rate": 1.05e-4, "lr_warmup_steps": 50}, "High LR (>0.0001) needs ≥100 warmup steps"),
    (
        "rule 5",
        {"learning_rate": 1.15e-4, "gradient_accumulation_steps": 1},
        "High LR needs gradient accumulation ≥2",
    ),
    (
        "rule 6, every check",
        {
            "network_alpha_ratio": 0.75,
            "max_train_epochs": 12,
            "gradient_accumulation_steps": 1,
            "optimizer_type": "AdamW8bit",
            "lr_warmup_steps": 100,
        },
        "High alpha (≥0.75) requires: epochs >= 16, grad_accum >= 2, optimizer = AdamW, warmup >= 150",
    ),
    (
        "rule 6, two checks",
        {"network_alpha_ratio": 0.8, "optimizer_type": "AdamW8bit", "lr_warmup_steps": 50},
        "High alpha (≥0.75) requires: optimizer = AdamW, warmup >= 150",
    ),
    (
        "rule 7",
        {"network_alpha_ratio": 0.8500000000000001, "learning_rate": 1.01e-4},
        "Very high alpha (≥0.85) + LR >0.0001 = explosion risk",
    ),
]


@pytest.fixture(scope="module")
def wider():
    """V2.1 with ranges in which its rules 1 and 2 can fire."""
    text = (PRESETS / "v2_1.toml").read_text()
    text = text.replace("high = 1.2e-4", "high = 2e-4").replace("high = 0.9\n", "high = 1.0\n")
    return parse_space(text.replace("high = 0.90, weight", "high = 1.00, weight"), "wider.toml")


@pytest.mark.parametrize(("changes", "reason"), [pytest.param(*case, id=name) for name, *case in REASONS])
def test_each_rule_gives_its_reason_word_for_word(wider, changes, reason):
    assert wider.validate(SAFE) == []
    assert wider.validate({**SAFE, **changes}) == [reason]


def test_all_failing_rules_are_named_in_order(wider):
    worst = {
        **SAFE,
        "learning_rate": 1.5e-4,
        "network_dim": 256,
        "network_alpha_ratio": 1.0,
        "optimizer_type": "AdamW8bit",
        "gradient_accumulation_steps": 1,
        "max_train_epochs": 12,
        "lr_warmup_steps": 50,
    }
    assert wider.validate(worst) == [reason for name, _, reason in REASONS if name != "rule 6, two checks"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"learning_rate": 1.2e-4, "optimizer_type": "AdamW8bit"}, id="rule 1 spares 1.2e-4"),
        pytest.param({"learning_rate": 0.00012000000000000002}, id="rounding at the upper end is inside"),
        pytest.param({"network_dim": 256, "max_train_epochs": 16}, id="rule 3 spares 16 epochs"),
        pytest.param({"learning_rate": 1e-4, "lr_warmup_steps": 50}, id="rule 4 spares 1e-4"),
        pytest.param({"learning_rate": 1.1e-4, "gradient_accumulation_steps": 1}, id="rule 5 spares 1.1e-4"),
        pytest.param({"network_alpha_ratio": 0.7, "lr_warmup_steps": 50}, id="rule 6 spares 0.7"),
        pytest.param({"network_alpha_ratio": 0.9, "learning_rate": 1e-4}, id="rule 7 spares 1e-4"),
        pytest.param({"network_alpha_ratio": 0.8, "learning_rate": 1.2e-4}, id="rule 7 spares 0.8"),
    ],
)
def test_the_thresholds_themselves_are_safe(v2_1, changes):
    assert v2_1.validate({**SAFE, **changes}) == []


def objects(params):
    """Tell whether the seven rules, written as plain Python, refuse these parameters."""
    lr, dim, alpha = params["learning_rate"], params["network_dim"], params["network_alpha"]
    ratio = round(params["network_alpha_ratio"], 2)
    epochs, accumulation = params["max_train_epochs"], params["gradient_accumulation_steps"]
    warmup, optimizer = params["lr_warmup_steps"], params["optimizer_type"]
    return (
        (lr > 0.00012 and optimizer == "AdamW8bit")
        or abs(alpha - dim) < 1
        or (dim >= 256 and epochs < 16)
        or (lr > 0.0001 and warmup < 100)
        or (accumulation == 1 and lr > 0.00011)
        or (ratio >= 0.75 and not (epochs >= 16 and accumulation >= 2 and optimizer == "AdamW" and warmup >= 150))
        or (ratio >= 0.85 and lr > 0.0001)
    )


def test_the_rules_agree_with_plain_python_and_refuse_four_tenths_of_uniform_draws(v2_1):
    rng, refused, uniform = Random(3), 0, 4000
    for _ in range(uniform):
        values = {name: parameter.draw(rng) for name, parameter in v2_1.parameters.items()}
        params = v2_1.complete(values)
        assert params["network_alpha"] == int(params["network_dim"] * params["network_alpha_ratio"])
        assert bool(v2_1.validate(values)) is objects(params)
        refused += objects(params)
    assert refused / uniform == pytest.approx(0.399, abs=0.02)  # 0.3992 by enumeration


def test_no_draw_is_infeasible(v2_1, draws):
    assert sum(objects(v2_1.complete(values)) for values in draws) == 0
    assert all(v2_1.is_feasible(values) for values in draws[:1000])


@pytest.mark.parametrize(
    ("low", "high", "percent"),
    [
        pytest.param(0.25, 0.4, 29, id="low alpha"),
        pytest.param(0.45, 0.7, 43, id="middle alpha"),
        pytest.param(0.75, 0.9, 29, id="high alpha"),
    ],
)
def test_draws_keep_the_exploration_plan(draws, low, high, percent):
    share = sum(low <= values["network_alpha_ratio"] <= high for values in draws) / DRAWS
    assert 100 * share == pytest.approx(percent, abs=2)


def test_every_declared_value_is_reached(v2_1, draws):
    for name, parameter in v2_1.parameters.items():
        if name not in ("learning_rate", "text_encoder_lr"):
            everything = parameter.choices if parameter.type == "categorical" else parameter.grid
            assert {values[name] for values in draws} == set(everything)


def test_parameters_are_printed_with_the_ratio(v2_1):
    lines = format_parameters(v2_1.complete({**SAFE, "network_alpha_ratio": 0.75}))
    assert "  network_alpha: 96 (ratio: 0.750)" in lines
    assert lines[0] == "  learning_rate: 9e-05"
    assert len(lines) == 10


# -------------------------------------------------------------------------------------------------------- tiny world


def test_the_tiny_world_has_v2_1_in_small(v2_1):
    tiny = load_space(ROOT / "examples/tiny_world/search_space.toml")
    assert list(tiny.parameters) == list(v2_1.parameters)
    assert [parameter.type for parameter in tiny.parameters.values()] == [
        parameter.type for parameter in v2_1.parameters.values()
    ]
    assert list(tiny.derived) == list(v2_1.derived)
    assert [rule.when.names for rule in tiny.constraints] == [rule.when.names for rule in v2_1.constraints]
    assert [len(rule.requires) for rule in tiny.constraints] == [0, 0, 0, 0, 0, 4, 0]
    rng = Random(5)
    uniform = [{name: parameter.draw(rng) for name, parameter in tiny.parameters.items()} for _ in range(1000)]
    assert 0.30 <= sum(map(tiny.is_feasible, uniform)) / 1000 <= 0.95
    assert all(tiny.is_feasible(tiny.draw(rng)) for _ in range(100))


# ------------------------------------------------------------------------------------------------------------ purity


def test_the_guide_shows_v2_1_as_it_is():
    guide = (ROOT / "docs/search_spaces.md").read_text()
    blocks = [block.partition("```")[0] for block in guide.split("```toml\n")[1:]]
    assert (PRESETS / "v2_1.toml").read_text() in blocks


def test_spaces_are_pure_and_only_loading_touches_files():
    for path in Path(search.__file__).parent.glob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
        assert not imported & {"os", "time", "subprocess", "logging", "io", "socket"}, path.name
        assert ("pathlib" in imported) is (path.name == "load.py"), path.name


def test_loading_a_space_imports_no_heavy_library():
    code = (
        "import sys; from optimizer_daemon.search.load import load_space; load_space('v2.1');"
        "print(sorted({'numpy', 'optuna', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

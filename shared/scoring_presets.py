"""How measurements become the score of a study: presets as TOML, copied into the plan so that an edit changes nothing.

A score is a sum of weighted terms, lower is better. In the plan everything is a number or a word under a dotted name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import SettingsError
from shared.held_out import file_digest, pictures_digest
from shared.metric_names import (
    METRIC_SOURCES,
    NEEDS,
    RANDOM_BACKBONE,
    Inputs,
    is_random_backbone,
    missing_for,
    parse_metrics,
)
from shared.model_folders import digest_model, require_clip_model, require_dino_model
from shared.schemas.base import Scalar
from shared.schemas.pictures import Picture
from shared.schemas.plan import EvaluationPlan, ScoringPreset
from shared.strict_json import first_fault

PRESETS = Path(__file__).parent / "presets" / "scoring"
COMBINED = "combined"
COMBINED_SCORE = "combined_score"
TermKind = Literal["value", "distance_to_target", "shortfall", "excess", "std"]
TARGETS_OF_DATASET = ("brightness", "contrast", "saturation")

SOURCE_OF: Mapping[str, str] = {
    **dict.fromkeys((COMBINED_SCORE, "brightness", "contrast", "saturation", "sharpness"), "pixels"),
    "base_difference": "pixels",
    **{name: name for name in NEEDS if name not in ("pixels", "memorisation")},
    "prompt_match": "clip_consistency",
}
"""Quantity a term may use -> the metric that measures it. The memorisation alarm is no part of any score."""

COMBINED_VALUES: Mapping[str, Scalar] = {
    "target.brightness": 0.50,
    "target.contrast": 0.20,
    "weight.std": 0.5,
    "gate.clip_tolerance": 0.02,
}
"""The seed's formula and the gate, which every plan holds."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Term(_Part):
    """One summand: `weight` times a figure made of one quantity."""

    metric: str = Field(description="the quantity, or combined_score for the seed's formula")
    kind: TermKind = Field(
        description="value: the mean; distance_to_target: |mean - target|; shortfall: max(0, target - mean); "
        "excess: max(0, mean - target); std: the standard deviation over the pictures"
    )
    weight: float = Field(description="factor; negative where more is better, for the score is minimised")
    target: float | str | None = Field(None, description="a number, or the name of one in targets")
    required: bool = Field(True, description="without it there is no score; else its weight goes to the others")

    @model_validator(mode="after")
    def _target_belongs_to_kind(self) -> Term:
        if self.metric not in SOURCE_OF:
            raise ValueError(f"no score can use a quantity {self.metric!r}; choose one of {', '.join(SOURCE_OF)}")
        if (self.target is not None) != (self.kind in ("distance_to_target", "shortfall", "excess")):
            raise ValueError(f"kind {self.kind!r} and target {self.target!r} contradict each other")
        if self.metric == COMBINED_SCORE and self.kind == "std":
            raise ValueError("combined_score is one figure of all pictures and has no std")
        if self.weight == 0:
            raise ValueError("a weight of 0 leaves the term without effect; take it out")
        return self


class Band(_Part):
    """A goal: the closed range one figure should reach."""

    low: float
    high: float


DEFAULT_GOALS: Mapping[str, Band] = {
    "brightness": Band(low=0.45, high=0.55),
    "contrast": Band(low=0.18, high=0.22),
    "brightness_std": Band(low=0.0, high=0.05),
    "contrast_std": Band(low=0.0, high=0.02),
}


class GateLimits(_Part):
    """What a checkpoint must keep."""

    clip_tolerance: float = Field(
        ge=0, description="how far below the base model's the CLIP consistency may certainly lie"
    )


class PresetFile(_Part):
    """A scoring preset as it is written in TOML."""

    name: str = Field(min_length=1, pattern=r"^[a-z0-9_]+$", description="name of the preset")
    reason: str = Field("", description="why one would use it")
    objective: str = Field(pattern=r"^[a-z0-9_]+$", description="name of the score the study optimises")
    targets: dict[str, float] | Literal["dataset"] = Field(
        default_factory=dict, description='numbers that terms name, or "dataset": measured on the training pictures'
    )
    terms: dict[str, Term] = Field(default_factory=dict, description="the summands by name")
    gate: GateLimits = Field(GateLimits(clip_tolerance=0.02), description="limits of the gate")
    goals: dict[str, Band] = Field(default_factory=dict, description="goal bands that differ from the usual ones")

    @model_validator(mode="after")
    def _consistent(self) -> PresetFile:
        if (self.objective == COMBINED_SCORE) != (not self.terms):
            raise ValueError(
                "combined_score is always the same formula; give an objective made of terms a name of its own, "
                "or leave the terms out"
            )
        if self.objective in ("brightness_score", "contrast_score", "pixar_style_score"):
            raise ValueError(f"{self.objective} is always written with a meaning of its own; take another name")
        if unknown := sorted(set(self.goals) - set(DEFAULT_GOALS)):
            raise ValueError(f"no goal {unknown[0]!r}; choose one of {', '.join(DEFAULT_GOALS)}")
        known = TARGETS_OF_DATASET if self.targets == "dataset" else tuple(self.targets)
        for name, term in self.terms.items():
            if not name.replace("_", "").isalnum():
                raise ValueError(f"term {name!r}: write its name with letters, digits and _")
            if isinstance(term.target, str) and term.target not in known:
                raise ValueError(f"terms.{name}.target: no target {term.target!r}; there are {', '.join(known)}")
        if self.terms and not any(term.required for term in self.terms.values()):
            raise ValueError("at least one term must be required, or there could be a score of nothing")
        return self

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """Metrics that the required terms are measured by."""
        return tuple(sorted({SOURCE_OF[term.metric] for term in self.terms.values() if term.required}))

    @property
    def used_metrics(self) -> tuple[str, ...]:
        """Metrics that any term is measured by."""
        return tuple(sorted({SOURCE_OF[term.metric] for term in self.terms.values()}))


def preset_names() -> list[str]:
    """Return the names of the presets that come with the program."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_preset(name_or_file: str, setting: str = "--scoring") -> PresetFile:
    """Return a preset by its name or from a TOML file; a preset's name wins, "./combined" is always a file.

    Raises:
        SettingsError: no such preset or file, or its content will not do; the message names file and field.
    """
    named = name_or_file in preset_names()
    file = PRESETS / f"{name_or_file}.toml" if named else Path(name_or_file)
    presets = f"name a TOML file or one of the presets {', '.join(preset_names())}"
    try:
        document: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError(setting, name_or_file, f"{presets} ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(setting, name_or_file, f"mend the TOML ({error})") from error
    try:
        preset = PresetFile.model_validate(document)
    except ValidationError as error:
        raise SettingsError(setting, name_or_file, first_fault(error, document)) from error
    if not named and preset.name in preset_names():
        raise SettingsError(setting, name_or_file, f"{preset.name!r} is a preset of this program; change its name")
    return preset


def frozen_preset(
    preset: PresetFile,
    *,
    metrics: Sequence[str] = METRIC_SOURCES,
    digests: Mapping[str, str] | None = None,
    measured_targets: Mapping[str, float] | None = None,
) -> ScoringPreset:
    """Return what the plan holds: the whole preset, every target a number.

    Args:
        preset: what was named.
        metrics: what is measured.
        digests: identity of each network and set of pictures by name, such as clip_digest.
        measured_targets: brightness, contrast and saturation of the training pictures, for targets = "dataset".
    """
    values: dict[str, Scalar] = {**COMBINED_VALUES, "gate.clip_tolerance": preset.gate.clip_tolerance}
    targets = dict(measured_targets or {}) if preset.targets == "dataset" else preset.targets
    for name, term in preset.terms.items():
        frozen = term.model_dump(exclude_none=True)
        if isinstance(term.target, str):
            frozen["target"] = targets[term.target]
        values |= {f"term.{name}.{key}": value for key, value in frozen.items()}
    for name, band in preset.goals.items():
        values |= {f"goal.{name}.low": band.low, f"goal.{name}.high": band.high}
    values |= digests or {}
    if tuple(metrics) != METRIC_SOURCES:  # the default stays unwritten: the plans of earlier studies keep their hash
        values["metrics"] = ",".join(metrics)
    return ScoringPreset(name=preset.name, objective=preset.objective, values=values)


def combined_preset(clip_model: Path | None = None, metrics: Sequence[str] = METRIC_SOURCES) -> ScoringPreset:
    """The default scoring: distance to the brightness and contrast targets, behind the sentinels and the CLIP gate."""
    digests = {} if clip_model is None else {"clip_digest": digest_model(clip_model, setting="--clip-model")}
    return frozen_preset(load_preset(COMBINED), metrics=metrics, digests=digests)


def plan_scoring(
    preset: PresetFile,
    metrics: tuple[str, ...],
    inputs: Inputs,
    measure_targets: Callable[[Sequence[Picture]], Mapping[str, float]],
) -> ScoringPreset:
    """Freeze a preset with the identity of everything it measures with.

    Args:
        metrics: from `parse_metrics`.
        inputs: the networks and pictures.
        measure_targets: brightness, contrast and saturation of pictures, for targets = "dataset".
    Raises:
        SettingsError: a network is not usable, or the preset needs something that is not given.
    """
    for name in preset.needed_metrics:
        if lacking := missing_for(name, inputs):
            raise SettingsError(
                "--scoring", preset.name, f"its score needs {name}; add {lacking}, or choose another preset"
            )
    targets: Mapping[str, float] = {}
    if preset.targets == "dataset":
        known = inputs.pictures.training or inputs.pictures.held_out
        if not known:
            raise SettingsError(
                "--scoring", preset.name, 'targets = "dataset" needs pictures; name a data set, or --reference-pictures'
            )
        targets = measure_targets(known)
    return frozen_preset(preset, metrics=metrics, digests=_digests(inputs, metrics), measured_targets=targets)


def _digests(inputs: Inputs, metrics: Sequence[str]) -> dict[str, str]:
    """Identity of every network that is given, and of the pictures that a metric looks at."""
    require_networks(inputs)
    found = {}
    if inputs.clip_model is not None:
        found["clip_digest"] = digest_model(inputs.clip_model, setting="--clip-model")
    if inputs.dino_model is not None:
        found["dino_digest"] = digest_model(inputs.dino_model, setting="--dino-model")
    if inputs.lpips_weights is not None:
        found["lpips_digest"] = lpips_digest(inputs.lpips_weights)
    needs = {need for name in metrics for need in NEEDS[name]}
    if "held-out pictures" in needs and inputs.pictures.held_out:
        found["held_out_digest"] = pictures_digest(inputs.pictures.held_out)
    if "training pictures" in needs and inputs.pictures.training:
        found["training_digest"] = pictures_digest(inputs.pictures.training)
    return found


def require_networks(inputs: Inputs) -> None:
    """Refuse networks that are not there or not whole; only small files and headers are read.

    Raises:
        SettingsError: names the flag and what is wrong.
    """
    if inputs.clip_model is not None:
        require_clip_model(inputs.clip_model)
    if inputs.dino_model is not None:
        require_dino_model(inputs.dino_model)
    weights = inputs.lpips_weights
    if weights is not None and not is_random_backbone(weights) and not weights.is_file():
        raise SettingsError("--lpips-weights", str(weights), "name a readable file (there is none)")


def lpips_digest(weights: Path) -> str:
    """Return the identity of LPIPS' backbone: its SHA-256, or the word for the random one.

    Raises:
        SettingsError: the file cannot be read.
    """
    return RANDOM_BACKBONE if is_random_backbone(weights) else file_digest(weights, "--lpips-weights")


def terms_of(scoring: ScoringPreset) -> dict[str, Term]:
    """Return the terms of the objective that a plan holds; none for the seed's formula.

    Raises:
        SettingsError: the plan holds something that this program does not know.
    """
    found: dict[str, dict[str, Scalar]] = {}
    for name, value in scoring.values.items():
        if name.startswith("term."):
            _, term, key = name.split(".", 2)
            found.setdefault(term, {})[key] = value
    try:
        return {name: Term.model_validate(term) for name, term in found.items()}
    except ValidationError as error:
        raise SettingsError(f"scoring preset {scoring.name}", first_fault(error, found), "start a new study") from error


def goals_of(scoring: ScoringPreset) -> dict[str, Band]:
    """Return the goal bands of a plan by figure; a figure ending in _std is about the spread over the pictures."""
    values = scoring.values
    return {
        name: Band(
            low=float(values.get(f"goal.{name}.low", band.low)), high=float(values.get(f"goal.{name}.high", band.high))
        )
        for name, band in DEFAULT_GOALS.items()
    }


def metrics_of(plan: EvaluationPlan) -> tuple[str, ...]:
    """Return the metrics the plan's study measures.

    Raises:
        UnknownPluginError: the plan was made by a program that knows more metrics.
    """
    recorded = plan.scoring.values.get("metrics")
    return METRIC_SOURCES if recorded is None else parse_metrics(str(recorded))

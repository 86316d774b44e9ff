"""What can be measured and what each metric needs, known to both daemons; the evaluator's plug-ins say the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from shared.errors import SettingsError, UnknownPluginError
from shared.schemas.pictures import StudyPictures

Need = Literal["clip", "dino", "clip or dino", "lpips", "held-out pictures", "training pictures"]

PIXELS = "pixels"
CLIP_CONSISTENCY = "clip_consistency"
LPIPS_DIVERSITY = "lpips_diversity"
MEMORISATION = "memorisation"

RANDOM_BACKBONE = "random"
"""The word for --lpips-weights that stands for a backbone without training: for tests, and recorded as what it is."""

NEEDS: dict[str, frozenset[Need]] = {
    PIXELS: frozenset(),
    CLIP_CONSISTENCY: frozenset({"clip"}),
    "clip_image": frozenset({"clip", "held-out pictures"}),
    LPIPS_DIVERSITY: frozenset({"lpips"}),
    "dino_likeness": frozenset({"dino", "held-out pictures"}),
    MEMORISATION: frozenset({"clip or dino", "training pictures"}),
    "style_distance": frozenset({"clip", "held-out pictures"}),
}
"""Metric -> what it cannot do without."""

METRIC_SOURCES = (CLIP_CONSISTENCY, PIXELS)
"""What a plan measures that names no metrics: those of the first studies, which keep their hash."""


class Inputs(Protocol):
    """Where the networks and pictures lie that metrics may need."""

    @property
    def clip_model(self) -> Path | None: ...
    @property
    def dino_model(self) -> Path | None: ...
    @property
    def lpips_weights(self) -> Path | None: ...
    @property
    def pictures(self) -> StudyPictures: ...


@dataclass(frozen=True)
class MetricInputs:
    """What settings and study give the metrics."""

    clip_model: Path | None = None
    dino_model: Path | None = None
    lpips_weights: Path | None = None
    pictures: StudyPictures = field(default_factory=StudyPictures)


def is_random_backbone(weights: Path) -> bool:
    """Tell whether `--lpips-weights` is the word for the random backbone, wherever it was counted from."""
    return weights.name == RANDOM_BACKBONE and not weights.exists()


def missing_for(metric: str, inputs: Inputs) -> str:
    """Return the flag that gives a metric what it lacks, "" where nothing is missing."""
    lacking = {
        "clip": "" if inputs.clip_model else "--clip-model FOLDER",
        "dino": "" if inputs.dino_model else "--dino-model FOLDER",
        "clip or dino": "" if inputs.clip_model or inputs.dino_model else "--clip-model FOLDER",
        "lpips": "" if inputs.lpips_weights else "--lpips-weights FILE",
        "held-out pictures": "" if inputs.pictures.held_out else "a data set of 20 pictures or --reference-pictures",
        "training pictures": "" if inputs.pictures.training else "a data set",
    }
    return " and ".join(lacking[need] for need in sorted(NEEDS[metric]) if lacking[need])


def uses_pictures(metric: str) -> bool:
    """Tell whether a metric looks at pictures of the data set."""
    return bool(NEEDS[metric] & {"held-out pictures", "training pictures"})


def needs_held_out(metrics: tuple[str, ...]) -> bool:
    """Tell whether a study that measures these must hold pictures out of its training."""
    return any("held-out pictures" in NEEDS[name] for name in metrics)


def parse_metrics(names: str | None, inputs: Inputs | None = None, required: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the metrics that `--metrics` names, sorted.

    Args:
        names: None for the default: pixels and CLIP consistency, LPIPS diversity where its weights are given,
            the memorisation alarm where a CLIP or DINO and the training pictures are known, and `required`.
        inputs: what the settings give; None for a list that a plan holds.
        required: what the scoring preset cannot do without.
    Raises:
        UnknownPluginError: there is no such metric.
        SettingsError: one that the score needs is left out, or a network is named that nothing would use.
    """
    inputs = inputs or MetricInputs()
    if names is None:
        chosen = {*METRIC_SOURCES, *required}
        if inputs.lpips_weights is not None:
            chosen.add(LPIPS_DIVERSITY)
        if (inputs.clip_model or inputs.dino_model) and inputs.pictures.training:
            chosen.add(MEMORISATION)
    else:
        chosen = {name.strip() for name in names.split(",") if name.strip()}
        for name in sorted(chosen):
            if name not in NEEDS:
                raise UnknownPluginError("metric", name, NEEDS)
        for name in (PIXELS, *required):
            if name not in chosen:
                raise SettingsError("--metrics", names, f"the score is computed from {name}; add it")
    _refuse_useless(names, chosen, inputs)
    return tuple(sorted(chosen))


def _refuse_useless(names: str | None, chosen: set[str], inputs: Inputs) -> None:
    for need, given, flag in (
        ("clip", inputs.clip_model, "--clip-model"),
        ("dino", inputs.dino_model, "--dino-model"),
        ("lpips", inputs.lpips_weights, "--lpips-weights"),
    ):
        serves = sorted(name for name, needs in NEEDS.items() if {need, "clip or dino"} & needs and need != "lpips")
        if need == "lpips":
            serves = [LPIPS_DIVERSITY]
        if given is not None and not chosen & set(serves):
            raise SettingsError(
                "--metrics", names, f"{flag} only serves {', '.join(serves)}; add one of them or leave it out"
            )

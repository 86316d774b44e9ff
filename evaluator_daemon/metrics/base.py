"""What every metric says about itself and offers, and how per-image values become a `Metric`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from statistics import fmean, pstdev
from typing import Literal, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from evaluator_daemon.job import Job
from shared.errors import ResourceError, SettingsError
from shared.metric_names import Inputs
from shared.model_folders import require_clip_model, require_dino_model
from shared.schemas import Metric

Picture = NDArray[np.uint8]
Direction = Literal["minimise", "maximise", "target"]


@dataclass(frozen=True)
class RenderedSet:
    """One checkpoint's pictures.

    Args:
        pictures: each (height, width, 3) uint8 sRGB.
        prompts: picture i's prompt.
        base: the base model's pictures of the same samples; None when these are them.
    """

    pictures: Sequence[Picture]
    prompts: Sequence[str]
    base: Sequence[Picture] | None


@dataclass(frozen=True)
class Quantity:
    """One figure a metric yields.

    Args:
        direction: which end is better; target where that depends on the style.
        low: smallest possible value.
        high: largest possible value.
        meaning: in a few words.
    """

    direction: Direction
    low: float
    high: float
    meaning: str


@dataclass(frozen=True)
class Facts:
    """What a metric says about itself; known without importing a network library.

    Args:
        version: of the definition; figures of different versions are not comparable.
        quantities: what it yields, by the names in metrics.json.
        source: where the definition comes from.
        code_licence: of the code that computes it, besides this program's own.
        weights: which network it uses, "none" for arithmetic alone.
        weights_licence: of those weights; they are never part of this program.
        get: where the weights come from and how to hand them over.
        needs: settings it cannot do without.
    """

    version: str
    quantities: Mapping[str, Quantity]
    source: str
    code_licence: str = "-"
    weights: str = "none"
    weights_licence: str = "-"
    get: str = "-"
    needs: tuple[str, ...] = field(default=())


class MetricSource(Protocol):
    """Made once per evaluator process with its job; measures one or more quantities."""

    facts: Facts

    @staticmethod
    def why_not(inputs: Inputs) -> str:
        """Return what is missing and how to get it, "" where nothing is; only files are looked at."""

    def measure(self, rendered: RenderedSet) -> dict[str, Metric]:
        """Return each quantity by name; one that cannot be computed is unavailable with its reason."""


_networks: dict[tuple[object, ...], object] = {}
N = TypeVar("N")


def loaded_once(key: tuple[object, ...], load: Callable[[], N]) -> N:
    """Return a network that several metrics share, loaded for the first of them; a failure is not remembered.

    Args:
        key: what tells it from every other network.
    """
    if key not in _networks:
        _networks[key] = load()
    return cast("N", _networks[key])


def drop_networks() -> None:
    """Forget every loaded network; its memory is free as soon as no metric holds it."""
    _networks.clear()


def require_planned(job: Job, identity: str, why_not: str) -> None:
    """Refuse to go on without a network that the plan was made with: the scores would not be comparable.

    Args:
        identity: its name among the plan's scoring values, such as clip_digest.
        why_not: why it cannot be used, "" where it can.
    Raises:
        ResourceError: it cannot, and the plan has it.
    """
    if why_not and job.plan.scoring.values.get(identity) is not None:
        raise ResourceError(f"{why_not}; the study was started with it: put it back, evaluations go on then")


def measured(
    values: Sequence[float], direction: Direction, version: str = "1", nearest: Sequence[str] | None = None
) -> Metric:
    """A quantity with one value per picture.

    Args:
        nearest: for each picture, the file it is compared with.
    """
    return Metric(
        version=version,
        direction=direction,
        status="ok",
        value=fmean(values),
        std=pstdev(values),
        per_image=tuple(values),
        nearest=None if nearest is None else tuple(nearest),
    )


def unavailable(reason: str, direction: Direction, version: str = "1") -> Metric:
    """A quantity that cannot be computed here."""
    return Metric(version=version, direction=direction, status="unavailable", reason=reason, value=None)


def all_unavailable(facts: Facts, reason: str) -> dict[str, Metric]:
    """Every quantity of a metric that cannot be computed here."""
    return {name: unavailable(reason, quantity.direction, facts.version) for name, quantity in facts.quantities.items()}


def why_no_clip(inputs: Inputs) -> str:
    """Return why there is no CLIP, "" where there is one."""
    if inputs.clip_model is None:
        return "no CLIP model is configured; name a local folder by --clip-model"
    try:
        require_clip_model(inputs.clip_model)
    except SettingsError as error:
        return f"the CLIP in {inputs.clip_model} cannot be loaded: {error}"
    return ""


def why_no_dino(inputs: Inputs) -> str:
    """Return why there is no DINOv2, "" where there is one."""
    if inputs.dino_model is None:
        return "no DINOv2 model is configured; name a local folder by --dino-model"
    try:
        require_dino_model(inputs.dino_model)
    except SettingsError as error:
        return f"the DINOv2 in {inputs.dino_model} cannot be loaded: {error}"
    return ""


def why_no_held_out(inputs: Inputs) -> str:
    """Return why there are no held-out pictures, "" where there are some."""
    if inputs.pictures.held_out:
        return ""
    return (
        "there are no held-out pictures to compare with; a study holds them out when its --metrics names this one at "
        "the first start, and --reference-pictures names some for a folder without run.json"
    )


def why_no_package(name: str) -> str:
    """Return how to get a package, "" where it is installed; nothing is imported."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"the package {name} is not installed; pip install {name}"
    return ""

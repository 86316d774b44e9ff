"""From per-image values to a checkpoint's scores and its gate. Pure: no files, no clock, no models.

Scores are minimised unless named otherwise; every quantity is on the 0-1 scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev, stdev

from scipy.special import stdtrit

from shared.scoring_presets import COMBINED_SCORE, Term

TARGET_BRIGHTNESS = 0.50
TARGET_CONTRAST = 0.20
STD_WEIGHT = 0.5
BRIGHTNESS_RANGE = (0.4, 0.6)
CONTRAST_RANGE = (0.15, 0.25)
SATURATION_RANGE = (0.3, 0.5)
CLIP_TOLERANCE = 0.02


@dataclass(frozen=True)
class CombinedScore:
    """The seed's formula; lower is better."""

    brightness_score: float
    contrast_score: float

    @property
    def combined_score(self) -> float:
        return self.brightness_score + self.contrast_score


def combined_score(
    brightness: Sequence[float],
    contrast: Sequence[float],
    *,
    target_brightness: float = TARGET_BRIGHTNESS,
    target_contrast: float = TARGET_CONTRAST,
    std_weight: float = STD_WEIGHT,
) -> CombinedScore:
    """Distance of the set's means to the target plus half the spread over images (population standard deviation)."""
    return CombinedScore(
        abs(fmean(brightness) - target_brightness) + std_weight * pstdev(brightness),
        abs(fmean(contrast) - target_contrast) + std_weight * pstdev(contrast),
    )


def share_in_range(values: Sequence[float], bounds: tuple[float, float]) -> float:
    """Fraction of `values` inside the closed range."""
    return sum(bounds[0] <= value <= bounds[1] for value in values) / len(values)


def pixar_style_score(brightness: Sequence[float], contrast: Sequence[float], saturation: Sequence[float]) -> float:
    """0-1, higher is better: .3 brightness, .4 contrast, .2 saturation in range, .1 consistency over the images."""
    consistency = fmean((max(0.0, 1 - pstdev(brightness) / 0.1), max(0.0, 1 - pstdev(contrast) / 0.05)))
    return (
        0.3 * share_in_range(brightness, BRIGHTNESS_RANGE)
        + 0.4 * share_in_range(contrast, CONTRAST_RANGE)
        + 0.2 * share_in_range(saturation, SATURATION_RANGE)
        + 0.1 * consistency
    )


PAIRWISE = frozenset({"lpips_diversity"})
"""Quantities whose value of one picture is its mean distance to all the others: means over pairs."""


def mean_over(values: Sequence[float], subset: Sequence[int] | None = None, *, pairwise: bool = False) -> float:
    """Return the mean of a quantity over some of the pictures.

    Args:
        values: of every picture.
        subset: indices of the pictures; None for all.
        pairwise: `values[i]` is the mean distance of picture i to all the others. Without picture i both i's own
            value and its share in the others' values are gone, so that the mean over pairs moves about twice as far as
            the mean of the values: exact for all pictures and for all but one, first order for smaller subsets.
    """
    mean = fmean(values)
    if subset is None:
        return mean
    of_subset = fmean(values[index] for index in subset)
    count = len(values)
    return mean + (of_subset - mean) * 2 * (count - 1) / (count - 2) if pairwise and count > 2 else of_subset


@dataclass(frozen=True)
class Total:
    """A score that is a sum of terms.

    Args:
        value: None where a required quantity is missing.
        left_out: quantities it had to do without, or lacks.
        parts: each computed term's share in the value.
    """

    value: float | None
    left_out: tuple[str, ...]
    parts: Mapping[str, float]


def preset_total(
    terms: Mapping[str, Term],
    values: Mapping[str, Sequence[float]],
    combined: float,
    subset: Sequence[int] | None = None,
) -> Total:
    """Sum the terms of a scoring preset.

    The weight of an optional quantity that is missing goes to the others in proportion, so that the score keeps its
    scale.

    Args:
        values: each measured quantity's value of every picture.
        combined: the seed's formula over the same pictures.
        subset: indices of the pictures that count; None for all.
    """
    missing = {term.metric for term in terms.values() if term.metric != COMBINED_SCORE and term.metric not in values}
    lacking = {term.metric for term in terms.values() if term.required} & missing
    there = {name: term for name, term in terms.items() if term.metric not in missing}
    left_out = tuple(sorted(missing))
    if lacking or not there:
        return Total(None, left_out, {})
    whole = sum(abs(term.weight) for term in terms.values())
    scale = whole / sum(abs(term.weight) for term in there.values())
    parts = {
        name: scale * term.weight * _figure(term, values.get(term.metric, ()), combined, subset)
        for name, term in there.items()
    }
    return Total(sum(parts.values()), left_out, parts)


def _figure(term: Term, values: Sequence[float], combined: float, subset: Sequence[int] | None) -> float:
    if term.kind == "std":
        return pstdev(values if subset is None else [values[index] for index in subset])
    mean = combined
    if term.metric != COMBINED_SCORE:
        mean = mean_over(values, subset, pairwise=term.metric in PAIRWISE)
    if term.kind == "value":
        return mean
    assert isinstance(term.target, float), "a plan holds every target as a number"
    match term.kind:
        case "distance_to_target":
            return abs(mean - term.target)
        case "shortfall":
            return max(0.0, term.target - mean)
        case "excess":
            return max(0.0, mean - term.target)


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided confidence interval."""

    mean: float
    low: float
    high: float


def paired_interval(differences: Sequence[float], confidence: float = 0.95) -> Interval:
    """Paired-t interval of the mean difference. One pair says nothing: its interval is infinite."""
    count = len(differences)
    if count == 0:
        raise ValueError("an interval needs at least one paired difference")
    mean = fmean(differences)
    if count == 1:
        return Interval(mean, -math.inf, math.inf)
    half = float(stdtrit(count - 1, 0.5 + confidence / 2)) * stdev(differences) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class GateVerdict:
    """Whether a checkpoint may win. A failed gate never changes the measured scores."""

    reasons: tuple[str, ...]
    clip_difference: Interval | None = field(default=None)

    @property
    def passed(self) -> bool:
        return not self.reasons


def gate(
    sentinels: Sequence[str | None],
    clip_consistency: Sequence[float] | None = None,
    base_clip_consistency: Sequence[float] | None = None,
    tolerance: float = CLIP_TOLERANCE,
) -> GateVerdict:
    """Refuse collapsed checkpoints, which brightness and contrast alone can love.

    Args:
        sentinels: per image, what `metrics.pixels.sentinel` said.
        clip_consistency: per image, cosine to its prompt; None where no CLIP is available.
        base_clip_consistency: the base model's for the same prompts and seeds, in the same order.
        tolerance: how much worse than the base model the upper end of the 95 % interval may be.
    """
    reasons = [f"image {i} is {name}" for i, name in enumerate(sentinels) if name is not None]
    if clip_consistency is None or base_clip_consistency is None:
        return GateVerdict(tuple(reasons))
    pairs = zip(clip_consistency, base_clip_consistency, strict=True)
    difference = paired_interval([lora - base for lora, base in pairs])
    if difference.high < -tolerance:
        reasons.append(
            f"CLIP consistency fell by {-difference.mean:.3f} against the base model "
            f"(95 % interval {difference.low:.3f} to {difference.high:.3f}, allowed {-tolerance:.3f})"
        )
    return GateVerdict(tuple(reasons), difference)

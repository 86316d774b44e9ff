"""Which checkpoint is best, which cannot be told from it, and how sure that is. Pure: arrays in, figures out.

All checkpoints were rendered on the same grid of prompts and seeds, so every comparison is paired: what a prompt and a
seed do to a picture is common to all of them and cancels. In a table of values x[checkpoint, picture] the model is

    x = checkpoint + picture + residual

and only the residual makes a comparison uncertain. With three or more checkpoints all of them help to estimate it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import chdtri, ndtr, stdtrit

from shared.scores.formulas import Interval, paired_interval

Table = NDArray[np.float64]

ERROR = 0.05
"""How often a tie set may lack the true best, and an interval the true difference."""
SCREEN = 0.002
"""Of that, what is spent on leaving out of the reckoning those who are far behind."""
UNEQUAL_VARIANCES = 0.01
"""Below this p value of the test for equal variances each pair is judged by its own."""
FEWEST_FOR_SHRINKAGE = 4
"""With fewer checkpoints their spread says too little about how far apart checkpoints usually are."""

_Z, _Z_WEIGHTS = np.polynomial.hermite_e.hermegauss(32)
_Z_WEIGHTS = _Z_WEIGHTS / _Z_WEIGHTS.sum()
_CHI_POINTS = (np.arange(12) + 0.5) / 12


@dataclass(frozen=True)
class Ranking:
    """Checkpoints against the one with the best score; indices are rows of the table.

    Args:
        best: the row with the best score.
        tied: rows that cannot be told from the best, itself among them, best first.
        shares: each row's chance of being the true best; None with one picture, which says nothing.
        to_best: each row's score minus the best one's, with the paired 95 % interval of this one difference.
        pooled: whether one residual variance serves all pairs.
    """

    best: int
    tied: tuple[int, ...]
    shares: tuple[float, ...] | None
    to_best: tuple[Interval, ...]
    pooled: bool

    @property
    def certainty(self) -> float | None:
        """How probable it is that the row with the best score is the true best."""
        return None if self.shares is None else self.shares[self.best]


def pseudo_values(score_of: Callable[[Sequence[int]], float], count: int) -> tuple[float, ...]:
    """Spread a score of a whole set over its pictures: n S - (n - 1) S_without_i for picture i.

    For a mean these are the per-picture values themselves. For a smooth function of means, such as a distance to a
    target plus a weighted standard deviation, they behave like independent values whose mean is the score, so that a
    paired-t interval serves it too; where a term has a corner (the mean right at the target) only roughly.

    Args:
        score_of: the score of the pictures with these indices.
        count: how many pictures there are, at least 2.
    Source: Quenouille 1956; Tukey 1958; Miller 1974, "The jackknife - a review", Biometrika 61.
    """
    if count < 2:
        raise ValueError(f"leaving one picture out needs at least 2 but got {count}")
    everything = range(count)
    whole = score_of(everything)
    return tuple(count * whole - (count - 1) * score_of([i for i in everything if i != left]) for left in everything)


def difference(values: Sequence[float], others: Sequence[float], estimate: float | None = None) -> Interval:
    """Paired 95 % interval of `values` minus `others`, picture by picture.

    Args:
        estimate: the difference of the two scores, where it is not the mean of the values' differences.
    """
    found = paired_interval([a - b for a, b in zip(values, others, strict=True)], 1 - ERROR)
    shift = 0.0 if estimate is None else estimate - found.mean
    return Interval(found.mean + shift, found.low + shift, found.high + shift)


def rank(values: Table, *, minimise: bool = True, scores: Sequence[float] | None = None) -> Ranking:
    """Find the best row, the rows that cannot be told from it, and how sure that is.

    A row is tied unless it is worse than some other row by more than chance explains, with the one-sided critical
    value of Dunnett 1955 for as many comparisons as matter: rows that are far worse than the row in question cannot be
    the ones that beat it, and are not counted (Hsu 1984, comparisons with the best; the screening step is that of
    Romano, Shaikh, Wolf 2014). So the set lacks the true best in at most 5 % of studies, however close they are.

    Args:
        values: (rows, pictures), each row a checkpoint's values or pseudo-values on the common grid.
        scores: (rows,) the scores themselves; None for the rows' means.
    """
    rows, pictures = values.shape
    if rows == 0 or pictures == 0:
        raise ValueError(f"a ranking needs rows and pictures but got a table of {rows} x {pictures}")
    sign = 1.0 if minimise else -1.0
    estimates = sign * (values.mean(axis=1) if scores is None else np.asarray(scores, float))
    best = int(estimates.argmin())
    order = [int(row) for row in estimates.argsort(kind="stable")]
    if rows == 1 or pictures == 1:
        blind = tuple(Interval(float(sign * (e - estimates[best])), -math.inf, math.inf) for e in estimates)
        return Ranking(best, tuple(order), (1.0,) if rows == 1 else None, blind, pooled=True)
    residuals = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    pooled = rows == 2 or not _variances_differ(residuals)
    if pooled:
        df = (rows - 1) * (pictures - 1)
        variance = float((residuals**2).sum()) / df
        errors = np.full((rows, rows), math.sqrt(2 * variance / pictures))
        own = np.full(rows, variance / pictures)
    else:
        df = pictures - 1
        differences = values[:, None, :] - values[None, :, :]
        errors = differences.std(axis=2, ddof=1) / math.sqrt(pictures)
        own = _own_variances(residuals) / pictures
    tied = tuple(row for row in order if _may_be_best(row, estimates, errors, df, pooled))
    shares = _shares(estimates, own, (rows - 1) * (pictures - 1))
    half = _critical(1, df, ERROR / 2) * errors[:, best]
    gaps = estimates - estimates[best]
    to_best = tuple(
        Interval(float(sign * g), float(sign * g - h), float(sign * g + h)) for g, h in zip(gaps, half, strict=True)
    )
    return Ranking(best, tied, tuple(float(share) for share in shares), to_best, pooled)


def _may_be_best(row: int, estimates: Table, errors: Table, df: int, pooled: bool) -> bool:
    """Whether nobody is ahead of `row` by more than chance explains."""
    behind = _ratio(estimates[row] - estimates, errors[row])  # its own entry is 0, which never decides
    ahead = float(behind.max())
    others = len(behind) - 1
    if ahead <= _bound(1, df, ERROR - SCREEN, pooled):
        return True
    near = int((behind >= -_bound(others, df, SCREEN, pooled)).sum()) - 1
    return ahead <= _bound(near, df, ERROR - SCREEN, pooled)


def _ratio(gaps: Table, errors: Table) -> Table:
    """Gaps in standard errors; without any error a gap is infinitely sure and no gap is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(errors > 0, gaps / errors, np.sign(gaps) * np.inf)
    ratio: Table = np.where(gaps == 0, 0.0, found)
    return ratio


def _bound(comparisons: int, df: int, error: float, pooled: bool) -> float:
    """Dunnett's critical value; with variances of their own the pairs share nothing: Bonferroni's."""
    return _critical(comparisons, df, error) if pooled else _critical(1, df, error / comparisons)


@lru_cache(maxsize=4096)
def _critical(comparisons: int, df: int, error: float) -> float:
    """One-sided critical value for the largest of `comparisons` t statistics against one common row (Dunnett 1955)."""
    if comparisons == 1:
        return float(stdtrit(df, 1 - error))
    scale = _chi_scale(df)

    def exceeds(bound: float) -> float:
        below = ndtr(_Z[:, None] + math.sqrt(2) * bound * scale) ** comparisons
        return 1 - float((_Z_WEIGHTS @ below).mean()) - error

    return float(brentq(exceeds, 0.0, 200.0, xtol=1e-6))


@lru_cache(maxsize=256)
def _chi_scale(df: int) -> Table:
    """(12,) equally likely values of s / sigma for a variance estimated with `df` degrees of freedom."""
    scale: Table = np.sqrt(chdtri(df, 1 - _CHI_POINTS) / df)
    return scale


def _variances_differ(residuals: Table) -> bool:
    """Whether some pairs of rows differ more noisily than others, by John's test of sphericity.

    Neighbouring epochs draw nearly the same pictures, so that their difference is surer than that of others.
    Source: John 1972, "The distribution of a statistic used for testing sphericity of normal distributions".
    """
    if not residuals.any():
        return False
    return _john(residuals) > _john_bound(*residuals.shape)


def _john(residuals: Table) -> float:
    products = residuals @ residuals.T
    return float((products**2).sum() / np.trace(products) ** 2)


@lru_cache(maxsize=256)
def _john_bound(rows: int, pictures: int) -> float:
    """What the statistic exceeds by chance with probability UNEQUAL_VARIANCES, from 2,000 draws, always the same."""
    rng = np.random.default_rng(0)
    found = np.empty(2000)
    for draw in range(len(found)):
        values = rng.normal(size=(rows, pictures))
        values -= values.mean(axis=1, keepdims=True)
        found[draw] = _john(values - values.mean(axis=0))
    return float(np.quantile(found, 1 - UNEQUAL_VARIANCES))


def _own_variances(residuals: Table) -> Table:
    """Each row's residual variance; a residual also holds a share of everybody else's noise, taken out here."""
    rows, pictures = residuals.shape
    seen = (residuals**2).sum(axis=1) / (pictures - 1)
    average = seen.sum() / (rows - 1)
    if rows == 2:
        return np.full(rows, average)
    own: Table = np.maximum((seen - average / rows) / (1 - 2 / rows), 0.1 * average)
    return own


def _shares(estimates: Table, variances: Table, df: int) -> Table:
    """Each row's posterior chance of having the lowest true score.

    The rows' true scores are normal around a common mean, with a spread estimated from the rows themselves (empirical
    Bayes, Efron & Morris 1975): the luck of the front-runner is discounted. With fewer than four rows a flat prior.
    """
    if not (variances > 0).any():
        lowest: Table = (estimates == estimates.min()).astype(float)
        return lowest / float(lowest.sum())
    centre, weights = estimates, np.ones_like(estimates)
    if len(estimates) >= FEWEST_FOR_SHRINKAGE:
        spread = max(0.0, float(estimates.var(ddof=1) - variances.mean()))
        weights = spread / (spread + variances)
        centre = estimates.mean() + weights * (estimates - estimates.mean())
    deviations = np.sqrt(np.maximum(weights * variances, 1e-12 * variances.mean()))
    scale = deviations[:, None] / _chi_scale(df)  # (rows, chi)
    at = centre[:, None, None] + scale[:, :, None] * _Z  # (rows, chi, z)
    chances = np.empty(len(estimates))
    for row in range(len(estimates)):
        higher = ndtr((centre[:, None, None] - at[row]) / scale[:, :, None])  # P(other row's score is above)
        higher[row] = 1.0
        chances[row] = float((higher.prod(axis=0) @ _Z_WEIGHTS).mean())
    return chances / float(chances.sum())

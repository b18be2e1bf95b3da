"""Membership scores on plain arrays: higher means "more likely a member". One score per patient.

Each function names its threat model. Run every attack three times: on members, on held-out patients who never trained
(the control), and without model access (:mod:`privacy.audit.validity`, the baseline). Only :func:`counts_at` at
thresholds fixed before looking may leave the place where the scores were made.

Shape legend: P patients · K fixed noise draws · R real rows · S synthetic rows · C columns · D token numbers · T thresholds

Covered
    - Flow-loss attack, plain and calibrated by the public model (attacker holds the final weights).
    - Nearest synthetic neighbour on mixed table columns and on codec tokens, the size-matched held-out comparison, and
      verbatim copies (attacker holds the cohort only).

Not covered
    - A nearest-neighbour result is a *diagnostic*: far neighbours are no proof of privacy, near ones are a warning.
    - Shadow-model attacks, which need training runs of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_BLOCK_ROWS = 256  # rows of one distance block: memory stays near 256 x S x C numbers


def loss_score(loss_PK: npt.ArrayLike, public_loss_PK: npt.ArrayLike | None = None) -> Floats:
    """Minus the mean flow loss over K noise draws that were fixed in advance and are the same for all patients.

    Threat model: the attacker holds the final weights, and the public start of training if ``public_loss_PK`` is given.
    With it the score is how much *better than the public model* the final model fits the patient, which removes the
    patient's own difficulty. Source: Yeom et al. (2018) for the loss attack, Watson et al. (2022) for the calibration.

    Args:
        loss_PK: (P, K) losses of the final model; a patient without data has NaN in the row.
        public_loss_PK: (P, K) losses of the public model on the same draws.

    Returns:
        (P,) scores; minus infinity, never a hit, where the losses are not finite.
    """
    loss = _two_axes("loss_PK", loss_PK)
    gain = -loss
    if public_loss_PK is not None:
        public = _two_axes("public_loss_PK", public_loss_PK)
        if public.shape != loss.shape:
            raise ValueError(f"expected public losses of shape {loss.shape}, got {public.shape}; use the same draws")
        gain = public - loss
    if gain.shape[1] == 0:
        raise ValueError("expected at least one noise draw, got 0")
    finite = np.isfinite(gain).all(axis=1)
    score = np.full(len(gain), -math.inf)
    score[finite] = gain[finite].mean(axis=1)
    return score


def gower(real_RC: npt.ArrayLike, synthetic_SC: npt.ArrayLike, categorical_C: Sequence[bool]) -> Floats:
    """Gower distance between mixed rows: the mean over columns of |difference| / range, or of mismatch.

    Source: Gower (1971), with missing values as a level of their own: both missing 0, one missing 1.

    Args:
        real_RC: numeric columns scaled to [-1, 1] by their *public* range, categorical columns as level index, NaN
            where missing. No scale is taken from the data: that would be a query.
        synthetic_SC: synthetic rows in the same columns.
        categorical_C: whether each column is categorical.

    Returns:
        (R, S) distances in [0, 1].
    """
    real, synthetic = _two_axes("real_RC", real_RC), _two_axes("synthetic_SC", synthetic_SC)
    kind = np.asarray(categorical_C, bool)
    if real.shape[1] != synthetic.shape[1] or real.shape[1] != len(kind):
        raise ValueError(
            f"columns differ: {real.shape[1]} real, {synthetic.shape[1]} synthetic, {len(kind)} kinds; "
            "both tables must follow the schema of the study"
        )
    if len(kind) == 0:
        raise ValueError("expected at least one column, got 0")
    out = np.zeros((len(real), len(synthetic)))
    for start in range(0, len(real), _BLOCK_ROWS):
        block = real[start : start + _BLOCK_ROWS]
        for column, is_categorical in enumerate(kind):  # one column at a time keeps the block two-dimensional
            a, b = block[:, column, None], synthetic[None, :, column]
            gap_a, gap_b = np.isnan(a), np.isnan(b)
            if is_categorical:
                distance = (a != b).astype(np.float64)
            else:
                distance = np.minimum(np.abs(np.nan_to_num(a) - np.nan_to_num(b)) / 2.0, 1.0)
            out[start : start + len(block)] += np.where(gap_a & gap_b, 0.0, np.where(gap_a ^ gap_b, 1.0, distance))
    return out / len(kind)


def token_distance(
    real_RD: npt.ArrayLike,
    synthetic_SD: npt.ArrayLike,
    real_known_RD: npt.ArrayLike | None = None,
    synthetic_known_SD: npt.ArrayLike | None = None,
) -> Floats:
    """Root mean squared difference of codec tokens over the numbers that both sides have.

    Args:
        real_RD: flattened tokens of real patients.
        synthetic_SD: flattened tokens of synthetic patients.
        real_known_RD: which numbers belong to an instance that is there; default: all.
        synthetic_known_SD: the same for the synthetic patients.

    Returns:
        (R, S) distances; infinity where two patients share no number.
    """
    real, synthetic = _two_axes("real_RD", real_RD), _two_axes("synthetic_SD", synthetic_SD)
    if real.shape[1] != synthetic.shape[1]:
        raise ValueError(f"tokens differ in width: {real.shape[1]} and {synthetic.shape[1]}; use one codec for both")
    known_r = np.ones(real.shape) if real_known_RD is None else np.asarray(real_known_RD, np.float64)
    known_s = np.ones(synthetic.shape) if synthetic_known_SD is None else np.asarray(synthetic_known_SD, np.float64)
    r, s = np.where(known_r > 0, real, 0.0), np.where(known_s > 0, synthetic, 0.0)
    # sum over shared numbers of (r - s)^2, as three matrix products: masks zero what one side lacks
    squared = (r * r) @ known_s.T + known_r @ (s * s).T - 2.0 * r @ s.T
    shared = known_r @ known_s.T
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = np.sqrt(np.maximum(squared, 0.0) / shared)
    return np.where(shared > 0, distance, math.inf)


def nearest_neighbour_score(distance_RS: npt.ArrayLike) -> Floats:
    """Minus the distance to the nearest synthetic patient.

    Threat model: the attacker holds the cohort and the patient's full record. Members and held-out patients are
    compared with the *same* cohort, so that the cohort's size favours neither.

    Returns:
        (R,) scores; minus infinity where no distance is finite.
    """
    distance = _two_axes("distance_RS", distance_RS)
    if distance.shape[1] == 0:
        raise ValueError("expected at least one synthetic patient, got 0")
    nearest: Floats = np.where(np.isnan(distance), math.inf, distance).min(axis=1)
    return -nearest


@dataclasses.dataclass(frozen=True)
class CloserShare:
    """Which side the synthetic patients lie closer to. ``share`` is 0.5 where the cohort favours neither.

    Attributes:
        share: mean over size-matched draws of P(member closer) + 0.5 P(tie).
        low, high: percentile bootstrap over real patients, 95 %.
        matched: patients per side in each draw.
    """

    share: float
    low: float
    high: float
    matched: int


def closer_share(
    member_RS: npt.ArrayLike, held_out_HS: npt.ArrayLike, generator: np.random.Generator, repeats: int = 200
) -> CloserShare:
    """How often a synthetic patient's nearest real one is a member rather than held out, at equal group sizes.

    Ties count one half (counting them as "not copied" hides verbatim copies of coarse tables) and both groups are
    subsampled to one size (a larger group has a nearer neighbour by chance). A draw resamples patients, so its spread
    is the interval over patients.

    Args:
        member_RS: distances from members to each synthetic patient.
        held_out_HS: distances from held-out patients to each synthetic patient.
        generator: randomness of the draws.
        repeats: number of size-matched draws.
    """
    member, held_out = _two_axes("member_RS", member_RS), _two_axes("held_out_HS", held_out_HS)
    size = min(len(member), len(held_out))
    if size == 0 or member.shape[1] == 0 or member.shape[1] != held_out.shape[1]:
        raise ValueError(
            f"expected members, held-out and synthetic patients, got {member.shape} and {held_out.shape}; "
            "a comparison without a control group has no result"
        )
    shares, spread = np.empty(repeats), np.empty(repeats)
    for draw in range(repeats):
        matched = _share(
            member[generator.choice(len(member), size, replace=False)],
            held_out[generator.choice(len(held_out), size, replace=False)],
        )
        resampled = _share(
            member[generator.choice(len(member), size, replace=True)],
            held_out[generator.choice(len(held_out), size, replace=True)],
        )
        shares[draw], spread[draw] = matched, resampled
    share = float(shares.mean())
    low, high = (float(value) for value in np.quantile(spread, [0.025, 0.975]))
    return CloserShare(share, min(low, share), max(high, share), size)


def _share(member: Floats, held_out: Floats) -> float:
    near_member, near_held_out = member.min(axis=0), held_out.min(axis=0)
    return float((near_member < near_held_out).mean() + 0.5 * (near_member == near_held_out).mean())


def copied(distance_RS: npt.ArrayLike, tolerance: float) -> Bools:
    """Which real patients have a synthetic patient within ``tolerance``: verbatim copies up to storage rounding.

    Compare the count among members with the count among held-out patients: a coarse table repeats rows by chance.
    """
    if not tolerance >= 0:
        raise ValueError(f"expected tolerance >= 0, got {tolerance}")
    return np.asarray(-nearest_neighbour_score(distance_RS) <= tolerance)


def combine(scores: Sequence[npt.ArrayLike], how: Literal["sum", "max"] = "sum") -> Floats:
    """One score per patient from several attacks or slots: evidence adds up, or the worst slot counts."""
    if not scores:
        raise ValueError("no scores to combine")
    stacked = np.stack([np.asarray(score, np.float64) for score in scores])
    match how:
        case "sum":
            return np.asarray(stacked.sum(axis=0), np.float64)
        case "max":
            return np.asarray(stacked.max(axis=0), np.float64)


def public_thresholds(public_scores: npt.ArrayLike, rates: Sequence[float]) -> tuple[float, ...]:
    """Thresholds that let these shares of a *public* population pass: they can be fixed before anyone looks.

    Args:
        public_scores: scores of public patients under the attack.
        rates: wanted false-positive rates in (0, 1), in any order.

    Returns:
        strictly rising thresholds, fewer than ``rates`` where the scores tie.
    """
    scores = np.asarray(public_scores, np.float64)
    scores = scores[np.isfinite(scores)]
    if len(scores) == 0:
        raise ValueError("no finite public score; thresholds cannot be fixed before looking")
    if not rates or any(not 0 < rate < 1 for rate in rates):
        raise ValueError(f"expected rates in (0, 1), got {tuple(rates)}")
    return tuple(float(value) for value in np.unique(np.quantile(scores, [1 - rate for rate in rates])))


def counts_at(scores: npt.ArrayLike, thresholds: Sequence[float]) -> tuple[int, ...]:
    """Number of scores at or above each threshold. A score that is not a number is never a hit.

    >>> counts_at([0.1, 0.5, float("nan"), float("-inf")], [0.0, 0.5, 1.0])
    (2, 1, 0)
    """
    values = np.asarray(scores, np.float64)
    return tuple(int((values >= threshold).sum()) for threshold in thresholds)


def _two_axes(name: str, value: npt.ArrayLike) -> Floats:
    array = np.asarray(value, np.float64)
    if array.ndim != 2:
        raise ValueError(f"expected {name} with two axes, got shape {array.shape}")
    return array

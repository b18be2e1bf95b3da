"""What a list of noised releases costs: epsilon, delta, mu. Pure functions of events.

Stage: every number that a plan, a ledger or a report prints as epsilon comes from here.

An event is reduced to merged, sorted segments (:mod:`privacy.events`), and results are cached by that value.

Covered
    * :func:`epsilon`: privacy loss distributions of ``dp_accounting`` (Doroshenko et al. (2022), "connect the dots"),
      rounded to the pessimistic side, the worse of both directions. This is the authority.
    * :func:`epsilon_prv`: Gopi, Lee and Wutschitz (2021) as implemented in Opacus, the independent cross-check. It
      reports an upper bound that lies about 0.01 above; it looks at the remove direction alone.
    * :func:`cross_check`: a spend on which both disagree by more than 0.02 is refused, at planning and at approval.
    * :func:`epsilon_rdp`: Mironov (2017); looser, but valid in a filter over parameters chosen from earlier outputs
      (Feldman and Zrnic (2021)) when its order is fixed beforehand: :func:`filter_order`.
    * :func:`mu`: the smallest Gaussian mechanism that dominates the whole profile for delta >= 1e-9.
    * ``relation="replace-one"``: ``dp_accounting``'s pair (1-q)N(0)+qN(-1) against (1-q)N(0)+qN(+1) per release.

Not covered
    * The central-limit value of Gaussian DP (Bu et al. (2020)): it can lie below the truth (4.70 for 6.22) and is absent.
    * That replace-one's collinear pair dominates all others is checked numerically in the tests, not proved here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon
from numpy.typing import NDArray
from scipy.special import log_ndtr

from privacy.events import (
    Segment,
    UnsupportedEvent,
    checked_segment,
    event_from_rows,
    event_rows,
    gaussian_event,
    segments_of,
    to_event,
)

__all__ = [
    "AGREEMENT",
    "CHECKED_EPSILON",
    "CHECKED_WORK",
    "MU_DELTA",
    "ORDERS",
    "AccountantsDisagree",
    "CrossCheck",
    "Relation",
    "Segment",
    "UnsupportedEvent",
    "checked_segment",
    "cross_check",
    "epsilon",
    "epsilon_prv",
    "epsilon_rdp",
    "event_from_rows",
    "event_rows",
    "filter_order",
    "gaussian_delta",
    "gaussian_event",
    "mu",
    "profile",
    "quiet_absl",
    "segments_of",
    "to_event",
]

Relation = Literal["zero-out", "replace-one"]

GRIDS = (
    1.0,
    0.1,
    0.01,
    1e-3,
    5e-4,
    2e-4,
    1e-4,
    5e-5,
    2e-5,
    1e-5,
    5e-6,
    2e-6,
    1e-6,
)  # spacings of the privacy loss grid
MOST_CELLS = 500_000  # beyond, a coarser grid overstates a little rather than take a minute
MOST_LOSS = 1e5  # losses beyond are told as infinite: no promise is that large, and no plan may stall a site
MU_DELTA = 1e-9  # the profile is dominated down to this delta
MU_CEILING = 1e3
AGREEMENT = 0.02  # most that two accountants may differ; PRV alone reports about 0.01 above
CHECKED_EPSILON, CHECKED_WORK = 20.0, 6000.0  # beyond either, PRV is not asked; see cross_check
ORDERS = tuple(
    [1 + tenth / 10 for tenth in range(1, 100)] + [float(n) for n in range(11, 64)] + [128.0, 256.0, 512.0, 1024.0]
)


class CrossCheck(NamedTuple):
    """The authority beside the second accountant.

    Attributes:
        epsilon: by privacy loss distributions.
        epsilon_prv: by PRV; None where it was not asked, for the reason in ``note``.
        note: the outcome in words.
    """

    epsilon: float
    epsilon_prv: float | None
    note: str


class AccountantsDisagree(ValueError):
    """Two accountants that bound the same spend differ by more than :data:`AGREEMENT`: one of them is wrong."""


def _grid(segments: tuple[Segment, ...]) -> float:
    """Spacing of the loss grid: coarse enough to be fast, fine enough to add little.

    Rounding a loss to a grid of spacing g adds a variance of at most g²/4 per release. With
    v = q²(exp(1/sigma²) - 1), the chi-square divergence of one release and about the variance of its loss, the
    spacing keeps the added variance below 0.1 % of the sum, unless the losses would need too many cells.
    """
    releases = sum(s.releases if s.sampling_rate < 1 else 1 for s in segments)
    fine = math.sqrt(0.004 * sum(s.releases * _divergence(s) for s in segments) / releases)
    wanted = max(min(fine, 1e-3), _span(segments) / MOST_CELLS)
    return next((g for g in GRIDS if g <= wanted), GRIDS[-1])


def _divergence(segment: Segment) -> float:
    """Chi-square divergence of one release, which bounds its mean loss: KL <= log(1 + chi-square)."""
    return segment.sampling_rate**2 * math.expm1(min(50.0, segment.sigma**-2))


def _span(segments: tuple[Segment, ...]) -> float:
    """About how far losses reach: all of them on average, or one release (or all unsampled) at ten deviations."""

    def largest(segment: Segment) -> float:
        shift = (1.0 if segment.sampling_rate < 1 else math.sqrt(segment.releases)) / segment.sigma
        ratio = shift**2 / 2 + 10 * shift
        return math.log1p(segment.sampling_rate * math.expm1(ratio)) if ratio < 700 else ratio

    return max(*map(largest, segments), sum(s.releases * math.log1p(_divergence(s)) for s in segments))


@functools.lru_cache(maxsize=512)
def _pld(segments: tuple[Segment, ...], relation: Relation) -> Any:
    neighbours = {
        "zero-out": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace-one": dp_accounting.NeighboringRelation.REPLACE_ONE,
    }[relation]
    return PLDAccountant(neighbours, _grid(segments)).compose(to_event(segments))


def _private(segments: tuple[Segment, ...]) -> bool:
    """Whether every release is noised, and by so much that an epsilon could be told."""
    return all(segment.sigma > 1 / MOST_LOSS for segment in segments) and _span(segments) <= MOST_LOSS


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"Expected delta in (0, 1), got {delta}")


def epsilon(event: dp_accounting.DpEvent, delta: float, relation: Relation = "zero-out") -> float:
    """The authoritative epsilon at this delta: pessimistic PLD, the worse of both directions.

    Zero-out of a patient against a public capacity has the same privacy loss as adding or removing one.

    >>> round(epsilon(gaussian_event(10.0, count=100), 1e-5), 3)
    4.377
    """
    _check_delta(delta)
    return _epsilon(segments_of(event), delta, relation)


@functools.lru_cache(maxsize=4096)
def _epsilon(segments: tuple[Segment, ...], delta: float, relation: Relation) -> float:
    if not segments:
        return 0.0
    return float(_pld(segments, relation).get_epsilon(delta)) if _private(segments) else math.inf


def profile(
    event: dp_accounting.DpEvent, epsilons: Sequence[float], relation: Relation = "zero-out"
) -> NDArray[np.float64]:
    """delta(epsilon) at each non-negative epsilon, pessimistic: the privacy profile, from which a trade-off curve follows."""
    points = np.asarray(epsilons, dtype=np.float64)
    if not bool((points >= 0).all()):
        raise ValueError(f"Expected every epsilon >= 0, got a minimum of {points.min()}")
    segments = segments_of(event)
    if not segments:
        return np.zeros_like(points)
    if not _private(segments):
        return np.ones_like(points)
    return np.asarray(_pld(segments, relation).get_delta(points), dtype=np.float64)


def gaussian_delta(epsilons: NDArray[np.float64], mu: NDArray[np.float64]) -> NDArray[np.float64]:
    """Profile of a Gaussian mechanism with sensitivity mu and unit noise, Dong, Roth and Su (2022), Corollary 2.13.

    delta(eps) = Phi(-eps/mu + mu/2) - exp(eps) Phi(-eps/mu - mu/2)
    """
    head, tail = log_ndtr(mu / 2 - epsilons / mu), epsilons + log_ndtr(-mu / 2 - epsilons / mu)
    return np.asarray(np.exp(head) - np.exp(tail), dtype=np.float64)


def mu(event: dp_accounting.DpEvent, relation: Relation = "zero-out") -> float:
    """The smallest mu whose Gaussian profile lies on or above this event's for every delta >= 1e-9.

    The profile falls, so between two grid points it is at most its value at the left one while the Gaussian's is at
    least its value at the right one: solving with that pair makes the answer an upper bound, not a sample.

    >>> round(mu(gaussian_event(10.0, count=100)), 2)
    1.0
    """
    return _mu(segments_of(event), relation)


@functools.lru_cache(maxsize=256)
def _mu(segments: tuple[Segment, ...], relation: Relation) -> float:
    if not segments:
        return 0.0
    if not _private(segments):
        return math.inf
    edge = _epsilon(segments, MU_DELTA, relation)
    if not edge < math.inf:
        return math.inf
    points = np.linspace(0.0, edge, 4097)
    wanted = profile(to_event(segments), points[:-1].tolist(), relation)
    points, wanted = points[1:][wanted >= MU_DELTA], wanted[wanted >= MU_DELTA]
    if not len(points):
        return 0.0
    low, high = np.zeros_like(points), np.full_like(points, MU_CEILING)
    if not bool((gaussian_delta(points, high) >= wanted).all()):
        return math.inf
    for _ in range(60):
        middle = (low + high) / 2
        reached = gaussian_delta(points, middle) >= wanted
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return float(high.max())


@functools.lru_cache(maxsize=512)
def _prv(segments: tuple[Segment, ...], delta: float) -> float:
    from opacus.accountants import PRVAccountant  # imports torch: only when the cross-check is asked for

    accountant = PRVAccountant()
    accountant.history = [tuple(segment) for segment in segments]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # Opacus takes log(1 - q) at q = 1, overflows in tails that it then masks, and warns about orders that only
        # bound its search range
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


def epsilon_prv(event: dp_accounting.DpEvent, delta: float) -> float:
    """The cross-check: Opacus's PRV accountant, an upper bound about 0.01 above; slow for many distinct segments."""
    _check_delta(delta)
    segments = segments_of(event)
    if not segments:
        return 0.0
    return _prv(segments, delta) if _private(segments) else math.inf


def cross_check(event: dp_accounting.DpEvent, delta: float) -> CrossCheck:
    """Both accountants on the same event; a spend on which they disagree must not be promised.

    PRV is asked where it answers in about two seconds: its time grows with distinct segments × epsilon × the root of
    all releases, which may reach :data:`CHECKED_WORK` at an epsilon of at most :data:`CHECKED_EPSILON` (so eight stages,
    5000 releases, epsilon 8 are checked). Elsewhere the note says that nobody looked.

    >>> cross_check(gaussian_event(10.0, count=100), 1e-5).note
    'agrees within 0.02'

    Raises:
        AccountantsDisagree: they differ by more than :data:`AGREEMENT`.
    """
    segments, ours = segments_of(event), epsilon(event, delta)
    if math.isinf(ours):
        return CrossCheck(ours, ours, "nothing to compare: without noise, or beyond any promise")
    if ours > CHECKED_EPSILON:
        return CrossCheck(ours, None, f"not asked: epsilon above {CHECKED_EPSILON:g}")
    if len(segments) * ours * math.sqrt(sum(segment.releases for segment in segments)) > CHECKED_WORK:
        return CrossCheck(ours, None, "not asked: too many stages and steps for PRV to answer in seconds")
    theirs = epsilon_prv(event, delta)
    if not abs(theirs - ours) <= AGREEMENT:
        raise AccountantsDisagree(
            f"epsilon is {ours:.4f} by privacy loss distributions and {theirs:.4f} by PRV; they may differ by "
            f"{AGREEMENT}. Use the pinned versions of dp_accounting and opacus, and report this plan"
        )
    return CrossCheck(ours, theirs, f"agrees within {AGREEMENT}")


def filter_order(event: dp_accounting.DpEvent, ceiling: float, delta: float) -> float:
    """The Rényi order at which a lifetime ceiling is guarded: fixed by the first plan, before anything is spent.

    A filter may choose its parameters from earlier outputs only at an order fixed beforehand (Feldman and Zrnic
    (2021), Theorem 4.3). This is the order at which most copies of ``event`` fit under the ceiling.

    >>> filter_order(gaussian_event(10.0, count=100), 8.0, 1e-5)
    3.9
    """
    _check_delta(delta)
    if not 0 < ceiling < math.inf:
        raise ValueError(f"Expected a finite ceiling > 0, got {ceiling}")
    segments = segments_of(event)
    if not segments or not _private(segments):
        raise ValueError("Expected an event with noise: an order is chosen for a spend that ends; give a private plan")

    def copies(order: float, spent: float) -> float:
        room = ceiling - (math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
        return room / spent if room > 0 and 0 < spent < math.inf else room - ceiling - 1e9

    return max(ORDERS, key=lambda order: copies(order, _renyi(segments)[order]))


def epsilon_rdp(event: dp_accounting.DpEvent, delta: float, order: float | None = None) -> float:
    """Epsilon by Rényi accounting, converted by Canonne, Kamath and Steinke (2020), Proposition 12.

    Args:
        event: what was or may be spent.
        delta: in (0, 1).
        order: None takes the best of many orders, right for a spend fixed beforehand; with one of :data:`ORDERS` it
            is what a filter at that order (:func:`filter_order`) has spent.
    """
    _check_delta(delta)
    segments = segments_of(event)
    if not segments:
        return 0.0
    if not _private(segments):
        return math.inf
    curve = _renyi(segments)
    if order is not None and order not in curve:
        raise ValueError(f"Expected one of the {len(ORDERS)} orders from {ORDERS[0]} to {ORDERS[-1]}, got {order}")
    chosen = curve if order is None else {order: curve[order]}
    with quiet_absl():
        return float(compute_epsilon(list(chosen), list(chosen.values()), delta)[0])


@functools.lru_cache(maxsize=512)
def _renyi(segments: tuple[Segment, ...]) -> dict[float, float]:
    """Rényi divergence at every order; infinite where a series does not converge, which only loosens."""
    with quiet_absl():
        spent = RdpAccountant(orders=list(ORDERS)).compose(to_event(segments)).rdp
    return dict(zip(ORDERS, spent.tolist(), strict=True))


@contextlib.contextmanager
def quiet_absl() -> Iterator[None]:
    """Keep ``dp_accounting`` from printing that it left an order out: it says so for orders nobody needs."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

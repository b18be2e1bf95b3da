"""Noise that sites share: each adds a part, and only the masked sum of all parts carries the promise. A prototype.

No study uses this module and no plan can name it: every study runs with the full noise of each site. It exists so that the
gain and the price can be measured (``medgen bench shared-noise``). One release is one step over whole gradients: clip per
patient, round to the grid, sum, add a discrete Gaussian share, mask (``privacy/masking.py``), all modulo 2^32.

The mechanism is the distributed discrete Gaussian of Kairouz, Liu and Steinke (2021), with two differences: the unit is the
patient, not the client, so each patient's vector is rounded by itself; and vectors are not rotated, because 32 bits leave
room for a grid so fine that rotation would change nothing (the benchmark shows it).
Skellam shares (Agarwal, Kairouz and Liu (2021)) would add up exactly, but need exact Poisson samples with means beyond 10^10
on such a grid, where tau, all that they would save, is zero to 200 digits.

Covered
    * Sensitivity: zeroing one patient moves a site's integers by at most the square root of ``sensitivity_squared``,
      measured on the rounded integers in exact arithmetic, whatever the gradient holds. Floats decide nothing there.
    * Noise: exact (``privacy/discrete_gaussian.py``). The sum of shares is not quite a discrete Gaussian; the difference
      is in the Rényi bound (:func:`sum_rdp`), which tests compare with the divergence of brute-force convolutions.
    * Dropouts and corrupt sites: the bound counts only the shares that must be there, ``smallest - (sites - honest)``. With
      fewer than ``smallest`` survivors no sum is opened and the attempt is spent (:func:`survivors_to_open`); every
      honest site enforces that itself, because it seals its seeds for no smaller set.
    * Overflow of 32 bits costs accuracy, not privacy; its probability is bounded (:func:`wrap_probability`).

Not covered
    * More than ``sites - honest`` sites that add no share, or that tell theirs: then the promise is broken, not weakened.
      A curious site knows its own share; towards one, epsilon is that of ``known=1``, and for patients to be promised
      the target towards their neighbours, ``honest`` must be declared at most ``sites - 1``.
    * Failure of masking. Elsewhere in this project the promise does not rest on it; here it rests on X25519, HKDF and
      ChaCha20, on a survivor set that is answered once, and on a roster without invented sites.
    * Amplification by sampling: none is claimed. Patients may be left out at random, and each release still costs as much
      as one over all of them. Rounding coins and shares are fresh, from the source given; a deterministic one is not
      private.
    * Events for ledger and privacy loss distributions: the accounting is Rényi only, for releases fixed beforehand.
    * Run time, which grows with the number of patients and of rounding attempts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from privacy.boundary.plan import MIN_COHORT
from privacy.boundary.refusals import Refused
from privacy.discrete_gaussian import LARGEST_STD, Integers, discrete_gaussian
from privacy.masking import MAX_SITES, Cohort, Vector
from privacy.noise import NoiseSource

WRAP_LIMIT = 2**31  # a signed sum of this size or more wraps around
LARGEST_NORM = 2**25  # of a clipped vector in grid steps: squares of its integers add up exactly in 64 bits
ATTEMPTS = 64  # roundings tried before a vector is rounded towards zero
ORDERS = 1 + np.geomspace(1e-2, 1e5, 6001)

Floats = NDArray[np.float64]


class MaskingIsOff(ValueError):
    """A site admits updates without masks (``min_contributors = 1``): a share of the noise would leave bare."""


class AttemptSpent(Refused):
    """Too few survivors: the sum stays closed. Shares were drawn and answers sent, so the attempt is spent all the same."""

    def __init__(self, detail: str) -> None:
        super().__init__("COHORT_TOO_SMALL", f"{detail}; the attempt is spent", "start another attempt with new shares")


@dataclasses.dataclass(frozen=True)
class SharedNoise:
    """What is declared about shared noise before anybody draws any. Public.

    Attributes:
        sites: most sites that are invited to one release.
        honest: fewest of them that add their share and keep it to themselves; the others may help an attacker.
        smallest: fewest survivors whose sum may be opened.
        dim: coordinates of a gradient.
        clip: L2 bound of one patient's gradient.
        step: width of the grid, a power of two.
        share_std: discrete Gaussian parameter of one site's share, in steps; 0 is not private.
        beta: most that a rounding may be tried again, a probability below 1 (Kairouz, Liu and Steinke use exp(-1/2)).
    """

    sites: int
    honest: int
    smallest: int
    dim: int
    clip: float
    step: float
    share_std: int = 0
    beta: float = math.exp(-0.5)

    def __post_init__(self) -> None:
        if not MIN_COHORT <= self.smallest <= self.sites <= MAX_SITES:
            raise ValueError(
                f"expected {MIN_COHORT} <= smallest <= sites <= {MAX_SITES}, got {self.smallest} and {self.sites}"
            )
        if not self.honest <= self.sites or self.shares < 2:
            raise ValueError(
                f"{self.honest} honest of {self.sites} sites leave {self.shares} honest shares when {self.smallest} "
                "survive; at least two must be left: raise smallest, or let each site add its full noise"
            )
        if not (self.dim >= 1 and 0 < self.beta < 1 and math.isfinite(self.clip)):
            raise ValueError(f"expected dim >= 1, 0 < beta < 1 and a finite clip, got {self}")
        if not (self.step > 0 and math.frexp(self.step)[0] == 0.5 and 1 <= self.clip / self.step <= LARGEST_NORM):
            raise ValueError(f"expected a power-of-two step of 1 to {LARGEST_NORM} steps per clip, got {self.step}")
        if not 0 <= self.share_std <= LARGEST_STD:
            raise ValueError(f"expected 0 <= share_std <= {LARGEST_STD}, got {self.share_std}")

    @property
    def shares(self) -> int:
        """Honest shares that are in every sum that is opened: survivors less all sites that may be corrupt."""
        return self.smallest - (self.sites - self.honest)

    @property
    def sensitivity_squared(self) -> int:
        """Most that zeroing one patient moves the integers, squared L2 norm; rounding is in it."""
        return math.floor(rounded_norm_squared(self.clip / self.step, self.dim, self.beta))

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the honest shares' sum over the sensitivity."""
        return self.share_std * math.sqrt(self.shares / self.sensitivity_squared)

    def epsilon(self, delta: float, releases: int = 1, known: int = 0) -> float:
        """Epsilon of so many releases, spent attempts included, towards somebody who knows ``known`` honest shares.

        Raises:
            ValueError: delta outside (0, 1), releases below 1, or no share is left unknown.
        """
        if not 0 < delta < 1 or releases < 1 or not 0 <= known < self.shares:
            raise ValueError(f"expected delta in (0, 1), releases >= 1, 0 <= known < {self.shares}, got {known}")
        if self.share_std == 0:
            return math.inf
        curve = sum_rdp(ORDERS, self.sensitivity_squared, self.share_std, self.shares - known, self.dim)
        return rdp_epsilon(ORDERS, releases * curve, delta)


def rounded_norm_squared(norm: float, dim: int, beta: float) -> float:
    """Bound on the squared norm after randomised rounding to integers, Kairouz, Liu and Steinke (2021), Theorem 1.

    min(c² + d/4 + sqrt(2 ln(1/beta)) (c + sqrt(d)/2), (c + sqrt(d))²); the first holds with probability 1 - beta at
    least, the second always.
    """
    root = math.sqrt(dim)
    likely = norm**2 + dim / 4 + math.sqrt(2 * math.log(1 / beta)) * (norm + root / 2)
    return min(likely, (norm + root) ** 2)


def sum_excess(share_std: float, shares: int) -> float:
    """tau: how far the sum of discrete Gaussians is from one, Kairouz, Liu and Steinke (2021), Theorem 1.

    tau = 10 sum of exp(-2 pi² s² k / (k + 1)) for k = 1 to shares - 1, for s >= 1/2.

    >>> sum_excess(1.0, 2) < 6e-4, sum_excess(8.0, 20) < 1e-200
    (True, True)
    """
    return 10 * sum(math.exp(-2 * math.pi**2 * share_std**2 * k / (k + 1)) for k in range(1, shares))


def sum_rdp(orders: Floats, sensitivity_squared: float, share_std: float, shares: int, dim: int) -> Floats:
    """Rényi divergence of one release at each order, Kairouz, Liu and Steinke (2021), Proposition 14.

    With mu² = sensitivity² / (shares s²): min(order mu² / 2 + tau d, order (mu + tau sqrt(d))² / 2).

    Raises:
        ValueError: ``share_std`` is below 1/2, where the proposition says nothing.
    """
    if not share_std >= 0.5:
        raise ValueError(f"expected share_std >= 1/2, got {share_std}; choose a finer grid")
    tau, mu = sum_excess(share_std, shares), math.sqrt(sensitivity_squared / shares) / share_std
    return np.minimum(orders * mu**2 / 2 + tau * dim, orders * (mu + tau * math.sqrt(dim)) ** 2 / 2)


def rdp_epsilon(orders: Floats, rdp: Floats, delta: float) -> float:
    """Epsilon of a Rényi curve, Canonne, Kamath and Steinke (2020), Proposition 12; every order gives a valid bound."""
    bounds = rdp + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    return max(0.0, float(bounds.min()))


def wrap_probability(shared: SharedNoise, patients: int) -> float:
    """Bound on the chance that some coordinate of one opened sum wraps around modulo 2^32.

    Clipped vectors of at most ``patients`` patients of all sites together reach patients * sensitivity in a coordinate, if
    all point along it. The shares of all sites stay within the rest: a discrete Gaussian is sub-Gaussian,
    E exp(tX) = exp(t² s²/2) (sum of exp(-(x - t s²)²/(2 s²)) over sum of exp(-x²/(2 s²))) <= exp(t² s²/2), so
    P <= 2 d exp(-rest² / (2 sites s²)).
    """
    rest = WRAP_LIMIT - 1 - patients * math.isqrt(shared.sensitivity_squared)
    if rest <= 0:
        return 1.0
    if shared.share_std == 0:
        return 0.0
    exponent = math.log(2 * shared.dim) - rest**2 / (2 * shared.sites * shared.share_std**2)
    return min(1.0, math.exp(min(0.0, exponent)))


def calibrate(shared: SharedNoise, epsilon: float, delta: float, releases: int) -> SharedNoise:
    """The same with the smallest share that costs at most ``epsilon`` over all releases; infinity gives share 0.

    Raises:
        ValueError: no share that fits the grid is large enough.
    """
    if not epsilon > 0:
        raise ValueError(f"expected epsilon > 0, got {epsilon}; use math.inf for what is not private")
    if math.isinf(epsilon):
        return dataclasses.replace(shared, share_std=0)
    low, high = 0, LARGEST_STD
    if dataclasses.replace(shared, share_std=high).epsilon(delta, releases) > epsilon:
        raise ValueError(f"epsilon {epsilon} needs more noise than 2^27 steps; choose a coarser step")
    while high - low > 1:
        middle = (low + high) // 2
        enough = dataclasses.replace(shared, share_std=middle).epsilon(delta, releases) <= epsilon
        low, high = (low, middle) if enough else (middle, high)
    return dataclasses.replace(shared, share_std=high)


def finest(
    shared: SharedNoise, epsilon: float, delta: float, releases: int, patients: int, wrap: float = 2.0**-40
) -> SharedNoise:
    """The same, calibrated, on the finest grid on which one sum wraps with probability ``wrap`` at most.

    Args:
        shared: its step and share are replaced.
        epsilon: target over all releases; delta and releases as in :func:`calibrate`.
        patients: declared capacities of all sites together, public.
        wrap: largest chance for one sum.

    Raises:
        ValueError: even the coarsest grid wraps.
    """
    coarsest = 2.0 ** math.floor(math.log2(shared.clip))
    best = calibrate(dataclasses.replace(shared, step=coarsest), epsilon, delta, releases)
    if wrap_probability(best, patients) > wrap:
        raise ValueError(f"{patients} patients and their noise do not fit into 32 bits; ask for less noise or fewer")
    while shared.clip / best.step <= LARGEST_NORM / 2:
        try:
            finer = calibrate(dataclasses.replace(shared, step=best.step / 2), epsilon, delta, releases)
        except ValueError:  # more noise than the sampler's largest
            return best
        if wrap_probability(finer, patients) > wrap:
            return best
        best = finer
    return best


def patient_vector(gradient: ArrayLike, shared: SharedNoise, noise: NoiseSource) -> Integers:
    """One patient's gradient, clipped and rounded to the grid by fresh coins; not finite gives zero.

    Randomised rounding is repeated until the integers' squared norm is at most ``sensitivity_squared``. If that fails
    :data:`ATTEMPTS` times the vector is rounded towards zero, which makes nothing longer.

    Returns:
        int64 (dim,), with squared norm at most ``sensitivity_squared``, always.
    """
    flat = np.asarray(gradient, dtype=np.float64).ravel()
    if flat.size != shared.dim:
        raise ValueError(f"expected {shared.dim} coordinates, got {flat.size}")
    limit = shared.sensitivity_squared
    peak = float(np.abs(flat).max())
    if not math.isfinite(peak) or peak == 0:
        return np.zeros(shared.dim, dtype=np.int64)
    norm = float(np.linalg.norm(flat / peak))  # at least 1, and nothing overflows
    grid = flat / peak * (min(peak, shared.clip / norm) / shared.step)
    whole = np.floor(grid)
    fraction = grid - whole
    for _ in range(ATTEMPTS):
        rounded = (whole + (noise.uniform(shared.dim) < fraction)).astype(np.int64)
        if squared_norm(rounded) <= limit:
            return rounded
    rounded = np.trunc(grid).astype(np.int64)
    return rounded if squared_norm(rounded) <= limit else np.zeros_like(rounded)


def squared_norm(values: Integers) -> int:
    """Sum of squares of integers below 2^26 in magnitude, exactly."""
    if int(np.abs(values).max(initial=0)) > 2 * LARGEST_NORM:
        raise ValueError("expected integers below 2^26; clip first")
    squares = (values**2).astype(np.uint64)  # 2^52 at most, so 2^11 of them fit into 64 bits
    return int(sum(int(part) for part in np.add.reduceat(squares, np.arange(0, squares.size, 2048))))


def site_vector(gradients: Iterable[ArrayLike], shared: SharedNoise, noise: NoiseSource) -> Vector:
    """What one site masks: the sum of its patients' vectors and its share of the noise, modulo 2^32 (uint32).

    Without masks this carries ``1 / shares`` of the promised variance. It must not leave before ``masking.mask``.
    """
    total = discrete_gaussian(shared.dim, shared.share_std, noise)
    for gradient in gradients:
        total += patient_vector(gradient, shared, noise)
    return (total & 0xFFFFFFFF).astype(np.uint32)


def shared_cohort(shared: SharedNoise, task_digest: str, group: str, min_contributors: Mapping[str, int]) -> Cohort:
    """The cohort between which the masks of one release run; it opens for no fewer survivors than were declared.

    Args:
        shared: the declaration.
        task_digest: of this attempt.
        group: parameter group.
        min_contributors: invited site -> smallest cohort that its policy admits.

    Raises:
        MaskingIsOff: a site's policy admits updates without masks.
        Refused: ``COHORT_TOO_SMALL`` if fewer than ``smallest`` are invited.
        ValueError: more sites than declared.
    """
    if bare := sorted(site for site, number in min_contributors.items() if number < MIN_COHORT):
        raise MaskingIsOff(
            f"sites {bare} have min_contributors below {MIN_COHORT}, so their updates may leave without masks; "
            f"shared noise needs masks: set min_contributors to {MIN_COHORT} or more, or add full noise at each site"
        )
    if len(min_contributors) > shared.sites:
        raise ValueError(f"{len(min_contributors)} sites are invited and {shared.sites} were declared")
    smallest = max([shared.smallest, *min_contributors.values()])
    return Cohort(task_digest, group, tuple(sorted(min_contributors)), smallest)


def survivors_to_open(shared: SharedNoise, cohort: Cohort, survivors: Iterable[str]) -> tuple[str, ...]:
    """The survivors whose sum may be opened, sorted.

    Raises:
        AttemptSpent: fewer than were declared are left, so too little noise may be in the sum. It stays closed.
        ValueError: the cohort would open for fewer survivors than were declared.
    """
    if cohort.smallest < shared.smallest:
        raise ValueError(
            f"the cohort opens for {cohort.smallest} survivors and the noise counts on {shared.smallest}; "
            "make it with shared_cohort()"
        )
    left = tuple(sorted(set(survivors) & set(cohort.members)))
    if len(left) < cohort.smallest:
        raise AttemptSpent(f"group {cohort.group}: {len(left)} survivors, {cohort.smallest} needed")
    return left

"""The discrete Gaussian on the integers, sampled exactly from the cryptographic stream.

P(X = x) is proportional to exp(-x² / (2 s²)) for every integer x (Canonne, Kamath and Steinke (2020), Definition 1). The
sampler is a rejection sampler in blocks of s after Karney (2016), "Sampling exactly from the normal distribution":
x = ±(k s + j) with k drawn with weight exp(-k²/2), j uniform below s, kept with probability exp(-j (2 k s + j) / (2 s²)).

Covered
    * Exactness: given independent uniform words, the law is the discrete Gaussian itself, tails included; nothing is
      truncated. Every decision compares a uniform real, of which as many bits are drawn as are needed, with a number
      that is enclosed in rational bounds. A float64 value of that number decides only where it differs from the
      uniform by more than :data:`MARGIN`, about 2000 times its error; all else is decided in exact arithmetic. A test
      decides everything exactly and gets the same integers.
    * Cost: the number of words and of numpy operations for a block depends on the block's size alone, not on the values
      drawn, except with probability below 1e-30 per block (too few kept) and 2^-39 per proposal (exact decision).

Not covered
    * Timing at the level of the processor: the exponential, the search and copies of kept values are not constant-time.
    * That the platform's exp errs by less than 2^-41 on [-745, 0]; every known one errs by less than 2^-51.
    * A standard deviation that is no whole number; choose the grid fine enough and round up.
"""

from __future__ import annotations

import decimal
import functools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from privacy.noise import NoiseSource

MARGIN = 2.0**-40  # floats nearer to a uniform than this decide nothing
LARGEST_STD = 2**27  # up to here all products are exact in 64 bits
BLOCK_SAMPLES = 1 << 16  # samples made at once: the working arrays stay near the processor
KEPT = 0.7148  # least share of proposals that is kept: sqrt(pi/2) over the sum of exp(-k²/2), k >= 0

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]
Bounds = Callable[[int], tuple[Fraction, Fraction]]


def discrete_gaussian(n: int, std: int, noise: NoiseSource) -> Integers:
    """``n`` independent samples of the discrete Gaussian with parameter ``std``; 0 gives zeros (not private).

    The variance is at most std², and equal to it within a millionth.

    Raises:
        ValueError: ``std`` is no whole number of 0 to 2^27, or ``n`` is negative.
    """
    if isinstance(std, bool) or std != int(std) or not 0 <= std <= LARGEST_STD:
        raise ValueError(f"Expected a whole std from 0 to {LARGEST_STD}, got {std}; choose another grid step")
    if n < 0:
        raise ValueError(f"Expected n={n} >= 0")
    out = np.zeros(n, dtype=np.int64)
    filled = 0 if std else n
    while filled < n:
        wanted = min(n - filled, BLOCK_SAMPLES)
        kept = _propose(math.ceil(wanted / KEPT + 10 * math.sqrt(wanted)) + 64, int(std), noise)[:wanted]
        out[filled : filled + len(kept)] = kept
        filled += len(kept)
    return out


def _propose(proposals: int, std: int, noise: NoiseSource) -> Integers:
    """The kept ones of so many proposals, in order: independent samples, each with the discrete Gaussian law."""
    words = noise.words(3 * proposals).reshape(3, proposals)
    k = _blocks(words[0], noise)
    sign = 1 - 2 * (words[1] & np.uint64(1)).astype(np.int64)
    drawn = (words[1] >> np.uint64(1)).astype(
        np.int64
    )  # 63 bits: uniform below std where below the last whole multiple
    j = drawn % std
    exponent = j * (2 * k * std + j)
    kept = _below_exp(words[2], exponent, 2 * std * std, noise)
    kept &= drawn < 2**63 // std * std
    kept &= (exponent > 0) | (k > 0) | (sign > 0)  # zero has one sign
    samples: Integers = (sign * (k * std + j))[kept]
    return samples


def _blocks(words: Words, noise: NoiseSource) -> Integers:
    """A block k >= 0 for each word, with probability exp(-k²/2) / sum of exp(-i²/2), by inversion."""
    edges = np.array(_edge_words(), dtype=np.uint64)
    k = np.searchsorted(edges, words, side="right")
    for i in np.flatnonzero(np.isin(words, edges)):  # 64 bits do not tell on which side of an edge
        uniform, block = _Uniform(int(words[i]), noise), 0
        while not uniform.below(functools.partial(edge_bounds, block)):
            block += 1
        k[i] = block
    return k.astype(np.int64)


def _below_exp(words: Words, numerators: Integers, denominator: int, noise: NoiseSource) -> NDArray[np.bool_]:
    """Whether each uniform lies below exp(-numerator/denominator)."""
    gap = np.exp(numerators / -float(denominator)) - words * 2.0**-64
    below: NDArray[np.bool_] = gap > 0
    for i in np.flatnonzero(np.abs(gap) <= MARGIN):
        bounds = functools.partial(exp_bounds, int(numerators[i]), denominator)
        below[i] = _Uniform(int(words[i]), noise).below(bounds)
    return below


class _Uniform:
    """A uniform real in [0, 1): its first 64 bits are given, further ones are drawn when a comparison needs them."""

    def __init__(self, word: int, noise: NoiseSource) -> None:
        self._bits, self._length, self._noise = word, 64, noise

    def below(self, bounds: Bounds) -> bool:
        """Whether it is smaller than the number that ``bounds(digits)`` encloses ever more closely."""
        digits = 30
        while True:
            low, high = bounds(digits)
            if self._bits + 1 <= low * 2**self._length:
                return True
            if self._bits >= high * 2**self._length:
                return False
            self._bits = self._bits << 64 | int(self._noise.words(1)[0])
            self._length += 64
            digits += 20


def exp_bounds(numerator: int, denominator: int, digits: int) -> tuple[Fraction, Fraction]:
    """Rational bounds of exp(-numerator/denominator) for a ratio >= 0, at most 2 * 10^-digits apart.

    ``decimal`` rounds quotient and exponential correctly, so each errs by half a unit of its last place.
    """
    if numerator == 0:
        return Fraction(1), Fraction(1)
    if numerator > 3 * digits * denominator:  # exp(-3 digits) is below 10^-digits, and its digits would fill the memory
        return Fraction(0), Fraction(1, 10**digits)
    with decimal.localcontext(_context(digits)):
        value = Fraction((-(decimal.Decimal(numerator) / denominator)).exp())
    return max(Fraction(0), value - Fraction(1, 10**digits)), value + Fraction(1, 10**digits)


def edge_bounds(block: int, digits: int) -> tuple[Fraction, Fraction]:
    """Rational bounds of P(k <= block) = sum of exp(-i²/2) up to the block over the whole sum, 2 * 10^-digits apart."""
    last = math.isqrt(5 * (digits + 6)) + 1  # exp(-last²/2) is below 10^-(digits + 6), and so is what follows it
    with decimal.localcontext(_context(digits)):
        weights = [Fraction((decimal.Decimal(-i * i) / 2).exp()) for i in range(max(last, block) + 1)]
    value = sum(weights[: block + 1], Fraction(0)) / sum(weights, Fraction(0))
    return value - Fraction(1, 10**digits), value + Fraction(1, 10**digits)


@functools.lru_cache(maxsize=1)
def _edge_words() -> tuple[int, ...]:
    """floor(2^64 P(k <= block)) for the blocks that 64 bits can tell apart, and one more."""
    edges = [int(2**64 * edge_bounds(block, 40)[0]) for block in range(12)]
    return tuple(sorted(set(edges)))


def _context(digits: int) -> decimal.Context:
    return decimal.Context(prec=digits + 10, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, rounding="ROUND_HALF_EVEN")

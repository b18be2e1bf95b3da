"""Gaussian noise and sampling coins from a ChaCha20 stream keyed by the operating system.

Stage: the randomness that the promise rests on. Nothing here reads a patient.

Covered
    * A fresh 256-bit key from ``os.urandom`` for every source; torch's and numpy's global generators are neither read
      nor set, so a seed in a configuration cannot cancel the noise.
    * Fast key erasure: each request replaces the key before its bytes are used, so noise already given out cannot be
      recomputed from the state of the process. A forked child draws a new key. A source cannot be pickled or copied,
      and two threads that draw at once get an error, never the same bytes.
    * Normal values by Box and Muller (1958) from 64-bit and 53-bit uniforms in float64; the largest possible value is
      9.49 standard deviations, so the mass that is cut off is below 1e-20 per value.
    * :func:`to_grid` puts a noised value on a public power-of-two grid about a millionth of the noise wide, so that the
      last bits of a float, which betray the summands (Mironov (2012); Haney et al. (2022)), never leave.

Not covered
    * A proof at the level of float bits: inside one grid cell the noise is a finite set of float64 values with
      rounding errors of log, cos and sin. The cells' probabilities differ from a true Gaussian's by about one part in
      2^30, and by more in the far tail: 1e-6 at 7.5 deviations, 3e-4 at 8 (measured), which one value in 10^15 passes.
      This is not part of (epsilon, delta); the discrete Gaussian (``privacy/discrete_gaussian.py``) would close it.
      Adding a sum that is much larger than the noise opens nothing more: a float64 sum is a function of the exact one.
    * A virtual machine that is cloned or set back, for as long as its operating system's random pool is the same in both copies;
      fresh bytes of the pool enter the key at every request.
    * Somebody who reads this process's memory or its operating system's random pool.
    * :func:`test_noise`: anybody who knows the labels removes that noise. Whatever used it is not private.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from typing import NoReturn, Protocol, runtime_checkable

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from torch import Tensor

KEY_BYTES = 32
BLOCK_VALUES = 1 << 15  # Gaussians made at once: the working arrays stay in the processor's cache
GRID_BITS = 20  # grid step: between 2^-20 and 2^-21 of the noise's standard deviation


@runtime_checkable
class NoiseSource(Protocol):
    """Where noise, sampling coins and the seeds of non-private draws come from."""

    @property
    def deterministic(self) -> bool:
        """True for the test switch: everything drawn is known to whoever knows the labels, so nothing is private."""
        ...

    def gaussian(self, shape: Sequence[int], std: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Independent N(0, std²) values of this shape, on the CPU."""
        ...

    def uniform(self, n: int) -> NDArray[np.float64]:
        """``n`` independent values in [0, 1), multiples of 2^-53."""
        ...

    def words(self, n: int) -> NDArray[np.uint64]:
        """``n`` independent uniform 64-bit words, for samplers that count in integers."""
        ...

    def torch_generator(self) -> torch.Generator:
        """A CPU generator seeded from the stream, for draws that carry no privacy (diffusion times, augmentations)."""
        ...


class ChaChaNoise:
    """A :class:`NoiseSource` on one ChaCha20 stream (RFC 8439) with fast key erasure.

    Made by :func:`system_noise` or :func:`test_noise`; not to be pickled, copied or used by two threads at once.
    """

    def __init__(self, key: bytes, *, deterministic: bool) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"Expected a key of {KEY_BYTES} bytes, got {len(key)}; use system_noise()")
        self._key = key
        self._deterministic = deterministic
        self._pid = os.getpid()

    @property
    def deterministic(self) -> bool:
        """Whether the stream can be repeated by whoever knows its labels."""
        return self._deterministic

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a noise source holds a key: it is never pickled or copied, because copied noise cancels out")

    def __repr__(self) -> str:
        return f"ChaChaNoise(deterministic={self._deterministic})"

    def _bytes(self, n: int) -> NDArray[np.uint8]:
        """``n`` bytes of keystream; the key is replaced first. The all-zero nonce is used once per key.

        Raises:
            RuntimeError: another thread is drawing from this source.
        """
        zeros, out = np.zeros(n, dtype=np.uint8), np.empty(n, dtype=np.uint8)
        if not self._deterministic and os.getpid() != self._pid:
            # A fork duplicates the key: two processes would give out the same noise, and a difference would cancel it.
            self._key, self._pid = os.urandom(KEY_BYTES), os.getpid()
        key = vars(self).pop("_key", None)  # one step: a second thread finds no key instead of the same one
        if key is None:
            raise RuntimeError("two threads draw from one noise source at once; make one source for each")
        stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
        erased = stream.update(bytes(KEY_BYTES))
        # fresh bytes at every request: a copied process or machine goes on with other noise
        fresh = bytes(KEY_BYTES) if self._deterministic else os.urandom(KEY_BYTES)
        self._key = bytes(a ^ b for a, b in zip(erased, fresh, strict=True))
        stream.update_into(zeros.data, out.data)
        return out

    def _words(self, n: int) -> NDArray[np.uint64]:
        return self._bytes(8 * n).view("<u8").astype(np.uint64, copy=False)

    def words(self, n: int) -> NDArray[np.uint64]:
        """``n`` independent uniform 64-bit words."""
        if n < 0:
            raise ValueError(f"Expected n={n} >= 0")
        return self._words(n)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """``n`` independent values in [0, 1), multiples of 2^-53.

        >>> test_noise("doc").uniform(3).round(6).tolist() == test_noise("doc").uniform(3).round(6).tolist()
        True
        """
        if n < 0:
            raise ValueError(f"Expected n={n} >= 0")
        return (self._words(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _normal(self, n: int) -> Tensor:
        """Standard normal values, Box and Muller (1958): r = sqrt(-2 ln u), (r cos t, r sin t), t uniform on a turn.

        numpy turns words into numbers exactly; torch's vectorised log, cos and sin take a third of numpy's time.
        """
        pairs = (n + 1) // 2
        words = self._words(2 * pairs)
        # (k + 1/2) / 2^64 lies in (0, 1]: never 0, and 2^-65 at the least, which reaches 9.49 deviations
        radius = torch.from_numpy((words[:pairs].astype(np.float64) + 0.5) * 2.0**-64).log_().mul_(-2.0).sqrt_()
        angle = torch.from_numpy((words[pairs:] >> np.uint64(11)).astype(np.float64)).mul_(2.0**-53 * 2.0 * math.pi)
        out = torch.empty(2 * pairs, dtype=torch.float64)
        torch.cos(angle, out=out[:pairs]).mul_(radius)
        torch.sin(angle, out=out[pairs:]).mul_(radius)
        return out[:n]

    def gaussian(self, shape: Sequence[int], std: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Independent N(0, std²) values of this shape, made in float64 and rounded once to ``dtype``.

        ``std`` 0 gives zeros (the non-private path) and leaves the stream where it was.

        Raises:
            ValueError: ``std`` is negative, infinite or not a number.
        """
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"Expected a finite std={std} >= 0")
        if std == 0:
            return torch.zeros(tuple(shape), dtype=dtype)
        out = torch.empty(tuple(shape), dtype=dtype)
        flat = out.view(-1)
        for start in range(0, flat.numel(), BLOCK_VALUES):
            part = flat[start : start + BLOCK_VALUES]
            part.copy_(self._normal(part.numel()).mul_(std))
        return out

    def torch_generator(self) -> torch.Generator:
        """A CPU generator seeded with 63 bits of the stream."""
        return torch.Generator().manual_seed(int(self._words(1)[0] >> np.uint64(1)))


def system_noise() -> NoiseSource:
    """The source of every private run: keyed by the operating system, never repeatable.

    >>> system_noise().deterministic
    False
    """
    return ChaChaNoise(os.urandom(KEY_BYTES), deterministic=False)


def test_noise(*labels: str | int) -> NoiseSource:
    """The deterministic test switch: a stream keyed by SHA-256 of the labels (site, stage, round, ...).

    Equal labels give equal words and uniforms on every machine, and Gaussians that are equal up to the last bits of the
    processor's logarithm; anything made with it is *not private* and must say so.
    """
    text = "".join(f"{type(label).__name__}:{len(str(label))}:{label};" for label in labels)
    return ChaChaNoise(hashlib.sha256(b"medgen test noise\x00" + text.encode()).digest(), deterministic=True)


test_noise.__test__ = False  # type: ignore[attr-defined]  # a source for tests, not a test


def grid_step(std: float) -> float:
    """Step of the public grid for noise of this standard deviation: 2^-20 of the power of two at or below it.

    >>> grid_step(1.5) == 2.0**-20
    True

    Raises:
        ValueError: ``std`` is so small or large that the step or its inverse is no ordinary float64.
    """
    if not 2.0**-900 <= std <= 2.0**900:
        raise ValueError(f"Expected std={std} between 2^-900 and 2^900; scale the clip or the values")
    return 2.0 ** (math.floor(math.log2(std)) - GRID_BITS)


def to_grid(values: Tensor, std: float) -> Tensor:
    """Round float64 noised values to the nearest multiple of :func:`grid_step`; post-processing, so it costs nothing.

    ``std`` 0 (not private) returns the values as they are. The step is a power of two, so scaling by it is exact.
    """
    if std == 0:
        return values
    step = grid_step(std)
    return torch.round(values * (1.0 / step)).mul_(step)

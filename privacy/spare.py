"""Canaries in spare coordinates of the sums that a private step makes, beside those of the network.

Stage: inside a training step. Whoever audits training puts D coordinates behind the network's; canary j, if its secret coin
enrolled it, is a patient whose gradient lies along coordinate j alone and is ten times as long as the clip.

Covered
    * One sampler call draws patients and canaries, in that order, so which patients are drawn is the same with and without.
    * A drawn canary is clipped and summed by the code that clips and sums patients, and the spare coordinates are noised, put
      on the grid and divided by the code that does it to the network's, into the same vector of sums.
    * A canary is zero in every coordinate of the network and a patient in every spare one, so neither is computed: a drawn
      canary costs a row of D numbers and no pass through the network. What comes out is a function of coins and noise alone.
    * The spare coordinates belong to no parameter, so no update can hold them. They are in no declared capacity.

Not covered
    * The gradient engine: no canary passes it. That a patient's gradient is that patient's alone is for
      :mod:`privacy.probe`; :func:`privacy.audit.canaries.enrol` sends canaries through it, outside a study.
    * The randomness of the network's noise itself: the spare coordinates draw from a source of their own, of the same make,
      so that training draws the same stream with and without an audit.
    * Noise that is right in the spare coordinates and wrong in others.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privacy.noise import NoiseSource

Floats = NDArray[np.float64]
STRENGTH = 10.0  # a canary's gradient before the clip, in units of the clip: a clip that does not clip shows


@dataclasses.dataclass(frozen=True)
class SpareCanaries:
    """The canaries of one round at one site.

    Attributes:
        enrolled_D: which of the D canaries their coins put in: secret until the audit.
        noise: source of the noise on the spare coordinates, and of nothing else.
    """

    enrolled_D: NDArray[np.bool_]
    noise: NoiseSource

    def __post_init__(self) -> None:
        if self.enrolled_D.ndim != 1 or not self.enrolled_D.size or self.enrolled_D.dtype != np.bool_:
            raise ValueError(f"Expected one coin for each of at least one canary, got shape {self.enrolled_D.shape}")

    @property
    def coordinates(self) -> Tensor:
        """The coordinates of the enrolled canaries, in the order in which the sampler numbers them."""
        return torch.from_numpy(np.flatnonzero(self.enrolled_D))

    def gradients(self, coordinates: Tensor, clip: float) -> Tensor:
        """Raw gradients (B, D), float32, of these canaries in the spare coordinates."""
        rows = torch.zeros(len(coordinates), self.enrolled_D.size)
        rows[torch.arange(len(coordinates)), coordinates] = STRENGTH * clip
        return rows

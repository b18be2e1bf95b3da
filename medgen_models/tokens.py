"""Encoded patients: the tensor record that the core trains on.

Shape legend: B patients, V visits, I instances, N tokens, W token width, F factors.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from medgen_models.layout import Layout


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """B encoded patients; one row is one patient, the unit of privacy.

    Attributes:
        z_BVNW: tokens of about unit variance, 0 where nothing was recorded.
        weight_BVNW: weight of each number in the loss; 0 on padding, values of missing columns, unobserved bins, given-only
            text and absent instances.
        present_BVI: bool.
        factor_BVIF: int64 factor levels, 0 where unknown.
        gap_BVI: hours between a reference and the instance that it precedes, 0 elsewhere.
        visit_BV: bool.
    """

    z_BVNW: Tensor
    weight_BVNW: Tensor
    present_BVI: Tensor
    factor_BVIF: Tensor
    gap_BVI: Tensor
    visit_BV: Tensor

    def __len__(self) -> int:
        """Number of patients."""
        return int(self.z_BVNW.shape[0])

    def as_dict(self) -> dict[str, Tensor]:
        """Patient-leading tensors under the names that :mod:`medgen_models.flow` reads."""
        return {
            "z": self.z_BVNW,
            "weight": self.weight_BVNW,
            "present": self.present_BVI,
            "factor": self.factor_BVIF,
            "gap": self.gap_BVI,
            "visit": self.visit_BV,
        }

    @staticmethod
    def from_dict(tensors: dict[str, Tensor]) -> TokenBatch:
        """Inverse of :meth:`as_dict`."""
        return TokenBatch(
            tensors["z"], tensors["weight"], tensors["present"], tensors["factor"], tensors["gap"], tensors["visit"]
        )

    @staticmethod
    def empty(layout: Layout, patients: int) -> TokenBatch:
        """``patients`` null patients."""
        visits, i, f = layout.schema.max_visits, layout.instances, len(layout.factors)
        return TokenBatch(
            z_BVNW=torch.zeros(patients, visits, layout.tokens, layout.width),
            weight_BVNW=torch.zeros(patients, visits, layout.tokens, layout.width),
            present_BVI=torch.zeros(patients, visits, i, dtype=torch.bool),
            factor_BVIF=torch.zeros(patients, visits, i, f, dtype=torch.int64),
            gap_BVI=torch.zeros(patients, visits, i),
            visit_BV=torch.zeros(patients, visits, dtype=torch.bool),
        )

    def select(self, rows: Tensor | list[int]) -> TokenBatch:
        """The patients at ``rows``, in that order."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        return TokenBatch.from_dict({name: value[index] for name, value in self.as_dict().items()})

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same patients on ``device``."""
        return TokenBatch.from_dict({name: value.to(device) for name, value in self.as_dict().items()})

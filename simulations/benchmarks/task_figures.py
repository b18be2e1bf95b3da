"""What one row of ``medgen bench tasks`` gives at one seed: named figures, each with its peers and, where one was set, its bar."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Privacy = Literal["public", "inf", "8"]
"""The public model as it is; federated training without noise; federated training at epsilon 8."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        name: what was measured, in words that stand alone.
        value: the number; NaN where it is not defined.
        unit: its unit, empty for a pure number.
        peers: the same measure for what it is compared with, by name.
        bar, at: the number that was asked for, and whether as the least or the most; both or neither.
    """

    name: str
    value: float
    unit: str = ""
    peers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bar: float | None = None
    at: Literal["least", "most"] | None = None

    def __post_init__(self) -> None:
        """Refuse a bar without a direction."""
        if (self.bar is None) != (self.at is None):
            raise ValueError(f"figure {self.name!r}: expected bar and at together, got {self.bar} and {self.at}")

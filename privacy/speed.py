"""How private steps are computed: engine, chunk, threads. Nothing here can change the guarantee.

Stage: read from ``site.toml``, or measured once; this module knows no tensor, so that reading a configuration loads none.

Covered
    * A closed list of engines; what Opacus offers beside them is refused with the reason.

Not covered
    * Run time is not private: see ``docs/sharp-edges.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

Engine = Literal["expand", "vmap", "loop", "hooks"]
FREE_ENGINES: tuple[Engine, ...] = ("expand", "vmap", "loop")
"""Engines that need no proof beside the probe."""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "ghost": "with a loss of shape (B, 1) it does not clip at all, and it inherits the wrong norms of convolutions on "
        "channels-last input",
        "ew": "expanded weights fail on attention, embeddings and transposed convolutions, and on empty batches",
        "functorch": "it reads the first input of a layer alone and fails on empty batches; 'vmap' does the same for the "
        "whole model",
        "adaptive": "adaptive clipping divides by the private batch size and resets its counters at every chunk",
        "gdp": "the central-limit accountant underestimates (4.70 for 6.22)",
    }
)
"""What Opacus offers and this project does not, with the reason (each measured with Opacus 1.6.0)."""


def checked_engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        ValueError: there is none; what Opacus calls so is refused with the reason.
    """
    if name in get_args(Engine):
        return name  # type: ignore[return-value]  # it is one of the literals
    why = f": {REFUSED[name]}" if name in REFUSED else ""
    raise ValueError(f"Expected engine expand, vmap, loop or hooks, got {name!r}{why}; use 'expand', 'vmap' or 'loop'")


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast, never how private: no field here can change the guarantee.

    Attributes:
        engine: which gradient engine; a run keeps one.
        chunk: patients whose gradients are held at once.
        threads: torch threads the measurement ran with; the caller sets them.
    """

    engine: Engine = "expand"
    chunk: int = 16
    threads: int = 1

    def __post_init__(self) -> None:
        checked_engine(self.engine)
        if self.chunk < 1 or self.threads < 1:
            raise ValueError(f"Expected chunk={self.chunk} >= 1 and threads={self.threads} >= 1")

"""What the wire, the masks and many sites cost: one exchange over real processes, masking, memory, a hundred sites.

``exchange`` starts a SuperLink and two SuperNodes of our own and then of stock Flower; the other parts run in processes of
this benchmark alone. Other work on the same cores lengthens the exchange, which is wall time; the rest is processor time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console

from simulations.benchmarks.runner import BenchResult, Row, collect


def parts() -> Mapping[str, Callable[[], list[Row]]]:
    """The parts by name, quick ones first; what a part needs is imported when it is run."""

    def masking() -> list[Row]:
        from simulations.benchmarks import federation_masking

        return federation_masking.masking()

    def memory() -> list[Row]:
        from simulations.benchmarks import federation_masking

        return federation_masking.memory()

    def exchange() -> list[Row]:
        from simulations.benchmarks import federation_exchange

        return federation_exchange.rows()

    def sites() -> list[Row]:
        from simulations.benchmarks import federation_sites

        return federation_sites.rows()

    return {"masking": masking, "memory": memory, "exchange": exchange, "sites": sites}


def run(rows: Sequence[str] = ()) -> BenchResult:
    """Run the named parts, or all; minutes on two cores.

    Raises:
        ValueError: a part of another name.
    """
    known = parts()
    chosen = list(rows) or list(known)
    if unknown := sorted(set(chosen) - set(known)):
        raise ValueError(f"no part {', '.join(unknown)}; known are {', '.join(known)}")

    def measure() -> list[Row]:
        found: list[Row] = []
        for name in chosen:
            Console(stderr=True).print(name, style="dim")
            found += known[name]()
        return found

    words = f" --rows {','.join(chosen)}" if rows else ""
    return collect("federation", f"medgen bench federation{words}", measure)

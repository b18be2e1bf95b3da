"""Epsilon of random schedules against an independent composition."""

from __future__ import annotations

from simulations.benchmarks.runner import BenchResult


def run() -> BenchResult:
    """Measure."""
    raise ValueError("this benchmark is being written")

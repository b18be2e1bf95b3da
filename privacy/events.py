"""What was spent, as a canonical value: Gaussian releases by noise multiplier, sampling rate and count.

Stage: the form in which plans, ledgers and accountants hand a spend to each other. Every mechanism of this project is a
Gaussian one, Poisson-sampled or not, so an event of ``dp_accounting`` is reduced to *segments* that are merged and sorted:
equal spends are equal values, whatever the order in which they were composed.

Covered
    * Every number is checked when a segment is made; NaN fails every check.

Not covered
    * Mechanisms other than the Gaussian, and sampling other than Poisson: refused by name, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import dp_accounting


class Segment(NamedTuple):
    """``releases`` Gaussian releases with the same noise multiplier (noise std / L2 sensitivity) and Poisson rate.

    ``sigma`` 0 stands for a release without noise: epsilon is infinite.
    """

    sigma: float
    sampling_rate: float
    releases: int


class UnsupportedEvent(ValueError):
    """An event that is not a (Poisson-sampled) Gaussian release; it is refused, not guessed."""


def gaussian_event(sigma: float, sampling_rate: float = 1.0, count: int = 1) -> dp_accounting.DpEvent:
    """The event of ``count`` Gaussian releases on Poisson samples; sigma 0 is a non-private event.

    Raises:
        ValueError: sigma negative or not finite, sampling rate outside (0, 1], count below 1.
    """
    return to_event((checked_segment(sigma, sampling_rate, count),))


def checked_segment(sigma: float, sampling_rate: float, count: int) -> Segment:
    """A :class:`Segment` after the checks; comparisons are written so that NaN fails them."""
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"Expected a finite noise multiplier sigma={sigma} >= 0")
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"Expected a sampling rate in (0, 1], got {sampling_rate}")
    if isinstance(count, bool) or count != int(count) or count < 1:
        raise ValueError(f"Expected a whole count >= 1, got {count}")
    return Segment(float(sigma), float(sampling_rate), int(count))


def to_event(segments: Iterable[Segment]) -> dp_accounting.DpEvent:
    """The ``dp_accounting`` event of these segments, in their order."""
    events: list[dp_accounting.DpEvent] = []
    for segment in segments:
        event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(segment.sigma)
        if segment.sampling_rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(segment.sampling_rate, event)
        if segment.sigma == 0:
            event = dp_accounting.NonPrivateDpEvent()
        events.append(event if segment.releases == 1 else dp_accounting.SelfComposedDpEvent(event, segment.releases))
    if not events:
        return dp_accounting.NoOpDpEvent()
    return events[0] if len(events) == 1 else dp_accounting.ComposedDpEvent(events)


def segments_of(event: dp_accounting.DpEvent) -> tuple[Segment, ...]:
    """The event as merged, sorted segments: a canonical value, equal for equal spends.

    >>> segments_of(dp_accounting.ComposedDpEvent([gaussian_event(2.0, 0.1, 3), gaussian_event(2.0, 0.1, 4)]))
    (Segment(sigma=2.0, sampling_rate=0.1, releases=7),)

    Raises:
        UnsupportedEvent: for any event of another kind, named.
    """
    counts: dict[tuple[float, float], int] = {}
    for sigma, rate, count in _walk(event, 1):
        counts[sigma, rate] = counts.get((sigma, rate), 0) + count
    return tuple(Segment(sigma, rate, counts[sigma, rate]) for sigma, rate in sorted(counts))


def _walk(event: dp_accounting.DpEvent, count: int) -> Iterable[Segment]:
    match event:
        case dp_accounting.NoOpDpEvent():
            return
        case dp_accounting.NonPrivateDpEvent():
            yield checked_segment(0.0, 1.0, count)
        case dp_accounting.GaussianDpEvent():
            yield checked_segment(event.noise_multiplier, 1.0, count)
        case dp_accounting.PoissonSampledDpEvent() if isinstance(event.event, dp_accounting.GaussianDpEvent):
            yield checked_segment(event.event.noise_multiplier, event.sampling_probability, count)
        case dp_accounting.SelfComposedDpEvent():
            yield from _walk(event.event, count * checked_segment(1.0, 1.0, event.count).releases)
        case dp_accounting.ComposedDpEvent():
            for part in event.events:
                yield from _walk(part, count)
        case _:
            raise UnsupportedEvent(
                f"unsupported event {event!r}; only (Poisson-sampled) Gaussian releases are accounted"
            )


def event_rows(event: dp_accounting.DpEvent) -> list[list[float]]:
    """The event as plain numbers ``[[sigma, sampling rate, count], ...]``, for a ledger or JSON.

    >>> event_rows(gaussian_event(1.5, 0.1, 40))
    [[1.5, 0.1, 40]]
    """
    return [[segment.sigma, segment.sampling_rate, segment.releases] for segment in segments_of(event)]


def event_from_rows(rows: Sequence[Sequence[float]]) -> dp_accounting.DpEvent:
    """Inverse of :func:`event_rows`; every number is checked again."""
    for row in rows:
        if len(row) != 3:
            raise ValueError(f"Expected [sigma, sampling rate, count], got {list(row)}")
    return to_event(checked_segment(row[0], row[1], int(row[2]) if row[2] == int(row[2]) else -1) for row in rows)

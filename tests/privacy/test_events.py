"""Equal spends are equal values, and what is not a Gaussian release is refused by name."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.events import (
    Segment,
    UnsupportedEvent,
    event_from_rows,
    event_rows,
    gaussian_event,
    segments_of,
    to_event,
)

SEGMENTS = st.lists(
    st.builds(Segment, st.sampled_from([0.7, 1.0, 2.5]), st.sampled_from([0.1, 1.0]), st.integers(1, 9)),
    min_size=1,
    max_size=8,
)


@given(segments=SEGMENTS, order=st.randoms(use_true_random=False), times=st.integers(1, 3))
def test_neither_order_nor_grouping_changes_a_spend(segments: list[Segment], order: object, times: int) -> None:
    shuffled = list(segments)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    middle = len(shuffled) // 2
    nested = dp_accounting.ComposedDpEvent([to_event(shuffled[:middle]), to_event(shuffled[middle:])])
    once = segments_of(to_event(segments))
    assert segments_of(nested) == once == tuple(sorted(once))
    assert len({(segment.sigma, segment.sampling_rate) for segment in once}) == len(once)
    repeated = segments_of(dp_accounting.SelfComposedDpEvent(nested, times))
    assert repeated == tuple(segment._replace(releases=times * segment.releases) for segment in once)


def test_events_are_canonical_values() -> None:
    one = dp_accounting.SelfComposedDpEvent(
        dp_accounting.ComposedDpEvent([gaussian_event(2.0, 0.1, 3), gaussian_event(5.0), gaussian_event(2.0, 0.1)]), 2
    )
    other = dp_accounting.ComposedDpEvent([gaussian_event(5.0, count=2), gaussian_event(2.0, 0.1, 8)])
    assert segments_of(one) == segments_of(other)
    assert event_rows(one) == [[2.0, 0.1, 8], [5.0, 1.0, 2]]
    assert segments_of(event_from_rows(event_rows(one))) == segments_of(one)
    assert isinstance(gaussian_event(1.0), dp_accounting.GaussianDpEvent)
    assert event_rows(gaussian_event(0.0, 0.3, 2)) == [[0.0, 1.0, 2]]


@pytest.mark.parametrize(
    "event",
    [
        dp_accounting.LaplaceDpEvent(1.0),
        dp_accounting.UnsupportedDpEvent(),
        dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.LaplaceDpEvent(1.0)),
        dp_accounting.ComposedDpEvent([gaussian_event(1.0), dp_accounting.ZCDpEvent(1.0)]),
        "an event",
    ],
)
def test_other_events_are_refused_by_name(event: object) -> None:
    with pytest.raises(UnsupportedEvent, match="unsupported event"):
        segments_of(event)


@pytest.mark.parametrize(
    "row",
    [
        [math.nan, 0.1, 1],
        [-1.0, 0.1, 1],
        [math.inf, 0.1, 1],
        [1.0, 0.0, 1],
        [1.0, 1.1, 1],
        [1.0, math.nan, 1],
        [1.0, 0.1, 0],
        [1.0, 0.1, -3],
        [1.0, 0.1, 1.5],
        [1.0, 0.1],
    ],
)
def test_bad_rows_are_refused(row: list[float]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        event_from_rows([row])


def test_bad_events_are_refused_inside_a_composition() -> None:
    for bad in (
        dp_accounting.GaussianDpEvent(-1.0),
        dp_accounting.GaussianDpEvent(math.nan),
        dp_accounting.PoissonSampledDpEvent(1.2, dp_accounting.GaussianDpEvent(1.0)),
        dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(1.0), -2),
    ):
        with pytest.raises(ValueError, match="Expected"):
            segments_of(dp_accounting.ComposedDpEvent([gaussian_event(1.0), bad]))

"""The benchmark of the federation on small sizes: what it compares is comparable, and what it says is what was measured."""

from __future__ import annotations

import pytest

from simulations.benchmarks import federation, federation_masking, federation_sites
from simulations.benchmarks.federation_parts import part_rows, parts_of


def test_masking_is_beside_the_same_step_of_flower() -> None:
    *speeds, size, packed = federation_masking.masking(numbers=2000, cohorts=(3,), repeats=1)
    assert size.peers["Flower SecAgg+"] == 8.0  # as it keeps them: 64-bit integers
    assert 4.0 < size.value < 4.2  # type: ignore[operator]
    assert size.bar == federation_masking.OURS_BYTES
    (speed,) = speeds
    assert speed.value == pytest.approx(4 * speed.peers["M numbers a second"])
    assert speed.peers["times faster"] == pytest.approx(
        speed.peers["M numbers a second"] / speed.peers["Flower SecAgg+, M numbers a second"]
    )

    assert packed == federation_masking.packing()


def test_packed_bits_hold_every_site_at_its_bound_without_wrapping() -> None:
    row = federation_masking.packing(rate=1.0, steps=16)  # spread 4, grid 1, bound 51.2
    for sites, bits in ((5, row.value), (20, row.peers["20 sites"])):
        assert bits is not None
        assert sites * 2 * 51.2 <= 2**bits < 2 * sites * 2 * 51.2 * 1.0001


def test_flowers_masks_come_off_again() -> None:
    """The peer is its protocol and not something cheaper: without masks, its numbers come back, on its grid of 16 / 2^22."""
    found = federation_masking.flower_masking(50, 4, 1)
    assert 0 < found["error"] <= 16 / 2**22
    assert found["bytes"] == 8.0


def test_memory_counts_what_is_kept() -> None:
    """Enough numbers that a kept answer would show; twelve sites need what four need."""
    few, most = (federation_masking.peak_bytes(sites, 50_000) for sites in (4, 12))
    assert most < few + 2 * 4 * 50_000
    assert few > 4 * 50_000


@pytest.mark.slow
def test_a_study_of_four_sites_finishes_and_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    federation_sites.study(4)
    seconds, mebibytes = map(float, capsys.readouterr().out.split()[-2:])
    assert seconds > 0
    assert mebibytes > 10


def test_growth_is_an_exponent() -> None:
    assert federation_sites.exponent(30, 2.0, 90, 6.0) == pytest.approx(1.0)
    assert federation_sites.exponent(30, 2.0, 90, 18.0) == pytest.approx(2.0)


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(ValueError, match="no part nothing; known are masking, memory, exchange, sites"):
        federation.run(["nothing"])


# -- where the seconds go ----------------------------------------------------------------------------------------------


def words(fetched: float, running: float, sending: float) -> list[tuple[float, str]]:
    said = [(fetched, "Receiving: query.ask message"), (running, "Start `flwr-clientapp` process")]
    return [
        (1.0, "Receiving: query.ask message"),
        *said,
        (sending, "Sending: query.ask message"),
    ]  # the first is of another


def test_the_parts_are_those_of_the_slowest_site_and_add_up() -> None:
    said = {"east": words(11.0, 13.0, 14.0), "west": words(12.5, 14.5, 15.0)}
    assert parts_of(10.0, 15.5, said) == (2.5, 2.0, 0.5, 0.5)
    rows = part_rows([(2.5, 2.0, 0.5, 0.5), (1.5, 1.0, 0.5, 0.5)])
    assert [row.value for row in rows] == [2.0, 1.5, 0.5, 0.5]


def test_a_supernode_with_other_words_is_an_error_and_no_figure() -> None:
    with pytest.raises(ValueError, match="other words"):
        parts_of(10.0, 20.0, {"east": words(11.0, 13.0, 14.0)[:3]})

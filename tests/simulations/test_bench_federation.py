"""The benchmark of the federation on small sizes: what it compares is comparable, and what it says is what was measured."""

from __future__ import annotations

import numpy as np
import pytest

from simulations.benchmarks import federation, federation_masking, federation_sites


def test_masking_is_beside_the_same_step_of_flower() -> None:
    *speeds, size = federation_masking.masking(numbers=2000, cohorts=(3,), repeats=1)
    assert size.peers["Flower SecAgg+"] == 8.0  # as it keeps them: 64-bit integers
    assert 4.0 < size.value < 4.2  # type: ignore[operator]
    assert size.bar == federation_masking.OURS_BYTES
    (speed,) = speeds
    assert speed.value == pytest.approx(4 * speed.peers["M numbers a second"])
    assert speed.peers["times faster"] == pytest.approx(
        speed.peers["M numbers a second"] / speed.peers["Flower SecAgg+, M numbers a second"]
    )


def test_flowers_masks_cancel_in_its_own_sum() -> None:
    """The peer is its protocol and not something cheaper: without masks, its numbers come back."""
    values = np.linspace(-1, 1, 50)
    masked = federation_masking.flower_mask(values, 1)
    from flwr.common.secure_aggregation.quantization import dequantize
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    plain = (masked - pseudo_rand_gen(bytes(32), 2**32, [values.shape])[0]) % 2**32
    assert np.allclose(dequantize([plain], 8.0, 2**22)[0], values, atol=2 * 8.0 / 2**21)


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

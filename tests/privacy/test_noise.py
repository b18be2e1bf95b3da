"""The noise stream: right distribution, right tails, no seed reaches it, nothing repeats."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import random
import sys
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from privacy.noise import ChaChaNoise, NoiseSource, grid_step, system_noise, test_noise, to_grid

N = 400_000


def test_normal_values_pass_kolmogorov_smirnov() -> None:
    values = test_noise("ks").gaussian((N,), 1.0, dtype=torch.float64).numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3


@pytest.mark.parametrize("std", [1e-6, 0.5, 37.0, 1e6])
def test_standard_deviation_is_the_promised_one(std: float) -> None:
    values = test_noise("std", str(std)).gaussian((N,), std).double().numpy()
    statistic = float(((values / std) ** 2).sum())
    assert 1e-4 < stats.chi2.cdf(statistic, N) < 1 - 1e-4
    assert abs(values.mean() / std) < 5 / np.sqrt(N)


def test_both_halves_of_box_and_muller_are_independent() -> None:
    first, second = test_noise("halves").gaussian((2, N // 2), 1.0, dtype=torch.float64).numpy()
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(N // 2)
    assert abs(np.corrcoef(first**2, second**2)[0, 1]) < 5 / np.sqrt(N // 2)


@pytest.mark.parametrize("at", [3.0, 4.0, 4.5])
def test_tails_have_their_mass(at: float) -> None:
    values = test_noise("tails").gaussian((4_000_000,), 1.0).numpy()
    beyond = int((np.abs(values) > at).sum())
    assert stats.binomtest(beyond, len(values), 2 * stats.norm.sf(at)).pvalue > 1e-4


def test_extreme_words_give_finite_values_beyond_nine_deviations(monkeypatch: pytest.MonkeyPatch) -> None:
    source = ChaChaNoise(bytes(32), deterministic=True)
    for word in (0, 2**64 - 1):
        monkeypatch.setattr(source, "_words", lambda n, word=word: np.full(n, word, dtype=np.uint64))
        values = source.gaussian((2,), 1.0, dtype=torch.float64)
        assert torch.isfinite(values).all()
        assert float(values.abs().max()) == pytest.approx(9.4925 if word == 0 else 0.0, abs=1e-3)


def test_uniform_is_uniform_and_below_one() -> None:
    values = test_noise("uniform").uniform(N)
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert np.array_equal(values * 2.0**53, np.floor(values * 2.0**53))


def test_no_global_seed_reaches_the_noise() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  # the very seed that must not matter
        drawn.append(system_noise().gaussian((64,), 1.0))
    assert not torch.equal(drawn[0], drawn[1])


def test_drawing_leaves_torchs_global_generator_alone() -> None:
    before = torch.get_rng_state()
    source = system_noise()
    source.gaussian((64,), 1.0)
    torch.randn(4, generator=source.torch_generator())
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_repeats_within_a_source() -> None:
    source = system_noise()
    words = np.concatenate([source.uniform(5000) for _ in range(8)])
    assert len(np.unique(words)) == len(words)
    assert not torch.equal(source.gaussian((64,), 1.0), source.gaussian((64,), 1.0))


def test_copies_of_a_process_go_on_with_other_noise() -> None:
    """Two copies with one key give out the same bytes once at most: fresh bytes of the system enter the next key."""
    first, second = (ChaChaNoise(bytes(range(32)), deterministic=False) for _ in range(2))
    assert np.array_equal(first.words(4), second.words(4))
    assert not np.array_equal(first.words(4), second.words(4))
    first, second = (ChaChaNoise(bytes(range(32)), deterministic=True) for _ in range(2))
    first.words(4), second.words(4)
    assert np.array_equal(first.words(4), second.words(4))


def test_the_key_is_erased_before_its_bytes_are_used() -> None:
    source = ChaChaNoise(bytes(range(32)), deterministic=True)
    before = source._key
    first = source._bytes(64)
    assert source._key != before
    assert source._key not in first.tobytes()
    assert np.array_equal(ChaChaNoise(before, deterministic=True)._bytes(64), first)
    assert not np.array_equal(ChaChaNoise(source._key, deterministic=True)._bytes(64), first)


def test_stream_is_chacha20_of_rfc_8439() -> None:
    # RFC 8439, appendix A.1, test vectors 1 and 2: all-zero key and nonce, block counters 0 and 1.
    # The first half of block 0 is the next key; what follows it is given out.
    source = ChaChaNoise(bytes(32), deterministic=True)
    out = source._bytes(48).tobytes()
    assert source._key.hex() == "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    assert out.hex() == (
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586" + "9f07e7be5551387a98ba977c732d080d"
    )


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_source_cannot_be_copied(duplicate: object) -> None:
    with pytest.raises(TypeError, match="never pickled or copied"):
        duplicate(system_noise())  # type: ignore[operator]


def _child(source: NoiseSource, pipe: object) -> None:
    pipe.send(source.uniform(4).tolist())  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_draws_other_noise() -> None:
    source = system_noise()
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(source, there))
    child.start()
    assert here.poll(20)
    forked = here.recv()
    child.join(20)
    assert forked != source.uniform(4).tolist()


def test_two_threads_at_once_never_get_the_same_bytes() -> None:
    # without the guard a quarter of these draws repeat
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    source, drawn, refused = system_noise(), [], []

    def draw() -> None:
        for _ in range(500):
            try:
                drawn.append(source.words(8).tobytes())
            except RuntimeError as error:
                refused.append(str(error))

    try:
        threads = [threading.Thread(target=draw) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(drawn) + len(refused) == 2000
    assert len(set(drawn)) == len(drawn) > 0
    assert all("one source for each" in text for text in refused)
    assert source.words(1).shape == (1,)  # and it goes on


@pytest.mark.parametrize("magnitude", [1e3, 1e9, 1e12])
def test_a_sum_far_above_the_noise_is_a_function_of_the_exact_sum(magnitude: float) -> None:
    # rounding the exact sum to float64 and then to the grid gives what float addition and the grid give
    noise = test_noise("far").gaussian((200,), 1.0, torch.float64)
    found = to_grid(magnitude / 3 + noise, 1.0)
    exact = [Fraction(magnitude / 3) + Fraction(value) for value in noise.tolist()]
    assert found.tolist() == to_grid(torch.tensor([float(value) for value in exact], dtype=torch.float64), 1.0).tolist()


@pytest.mark.parametrize("std", [5e-324, 1e-305, 1e305, float("inf"), float("nan")])
def test_a_grid_that_float64_cannot_hold_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="std="):
        to_grid(torch.zeros(1, dtype=torch.float64), std)


def test_values_beyond_the_grids_own_digits_stay_as_they_are() -> None:
    huge = torch.tensor([2.0**60 + 2.0**20, -(2.0**80)], dtype=torch.float64)
    assert torch.equal(to_grid(huge, 1.0), huge)


def test_the_test_switch_repeats_and_says_so() -> None:
    one, two, other = test_noise("site", 1, 2), test_noise("site", 1, 2), test_noise("site", 12)
    assert one.deterministic
    assert not system_noise().deterministic
    assert torch.equal(one.gaussian((9,), 2.0), two.gaussian((9,), 2.0))
    assert one.uniform(3).tolist() == two.uniform(3).tolist() != other.uniform(3).tolist()
    assert torch.equal(torch.rand(3, generator=one.torch_generator()), torch.rand(3, generator=two.torch_generator()))


@pytest.mark.parametrize(("one", "two"), [(("a", "b"), ("ab",)), ((1,), ("1",)), (("a;str:1:b",), ("a", "b"))])
def test_labels_do_not_run_together(one: tuple[str | int, ...], two: tuple[str | int, ...]) -> None:
    assert test_noise(*one).uniform(1)[0] != test_noise(*two).uniform(1)[0]


def test_zero_noise_is_exactly_zero_and_bad_noise_is_refused() -> None:
    source = test_noise("zero")
    assert not source.gaussian((3, 0, 2), 1.0).numel()
    assert torch.equal(source.gaussian((5,), 0.0), torch.zeros(5))
    for std in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite std"):
            source.gaussian((1,), std)


@given(
    std=st.floats(1e-6, 1e6),
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
)
def test_the_grid_is_public_fine_and_exact(std: float, values: list[float]) -> None:
    step = grid_step(std)
    assert std * 2.0**-21 <= step <= std * 2.0**-20 or step == pytest.approx(std * 2.0**-20)
    given_values = torch.tensor(values, dtype=torch.float64)
    rounded = to_grid(given_values, std)
    assert torch.equal(torch.round(rounded / step) * step, rounded)
    assert float((rounded - given_values).abs().max()) <= step / 2
    assert torch.equal(to_grid(given_values, 0.0), given_values)


def test_a_million_values_are_quick() -> None:
    source = system_noise()
    best = min(_seconds(source) for _ in range(5))
    assert best < 0.5  # 0.025 s on a quiet core; the bound leaves room for a busy one


def _seconds(source: NoiseSource) -> float:
    start = time.perf_counter()
    source.gaussian((1_000_000,), 1.0)
    return time.perf_counter() - start

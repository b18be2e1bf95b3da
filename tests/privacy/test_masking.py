from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.boundary.refusals import Refused
from privacy.identity import MaskingKey
from privacy.masking import (
    Cohort,
    MaskedSum,
    Party,
    Reveal,
    Vector,
    dequantise,
    expand,
    largest_magnitude,
    mask,
    open_reveals,
    pair_seed,
    quantise,
    self_seed,
    unmask_seeds,
)

STEP = 2.0**-24
TASK = "1" * 64
NAMES = tuple("abcdefgh")
KEYS = {name: MaskingKey(bytes([number + 1]) * 32) for number, name in enumerate(NAMES)}
ROSTER = {name: key.public for name, key in KEYS.items()}
PARTIES = {name: Party(name, key, ROSTER) for name, key in KEYS.items()}


def cohort(members: tuple[str, ...] = NAMES[:5], group: str = "trunk", task: str = TASK, smallest: int = 3) -> Cohort:
    return Cohort(task, group, members, smallest)


def code_of(found: pytest.ExceptionInfo[Refused]) -> str:
    return found.value.code


# -- the grid ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-20, 20), max_size=20), st.integers(1, 256))
def test_quantised_numbers_lie_within_half_a_step(values: list[float], sites: int) -> None:
    limit = largest_magnitude(sites, STEP)
    array = np.clip(np.array(values, np.float64), -limit, limit)
    result = quantise(array, sites, STEP)
    assert result.saturated == 0
    assert np.abs(dequantise(result.vector, STEP) - array).max(initial=0.0) <= STEP / 2


@given(st.integers(1, 256))
def test_no_sum_of_the_largest_numbers_wraps(sites: int) -> None:
    huge = quantise(np.array([1e30, -1e30]), sites, STEP)
    assert huge.saturated == 2
    total = (huge.vector.astype(np.uint64) * sites).astype(np.uint32)
    reached = dequantise(total, STEP)
    assert reached[0] > 0 > reached[1]
    assert reached[0] == -reached[1] == pytest.approx(largest_magnitude(sites, STEP) * sites)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_not_sent(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        quantise(np.array([0.0, bad]), 3, STEP)


def test_counts_are_exact_at_step_one() -> None:
    counts = np.array([0, 1, 12345, 7_000_000])
    assert np.array_equal(dequantise(quantise(counts, 256, 1.0).vector, 1.0), counts)


@pytest.mark.parametrize(("sites", "step"), [(0, STEP), (257, STEP), (3, 0.0), (3, -1.0), (3, float("nan"))])
def test_grid_parameters_are_checked(sites: int, step: float) -> None:
    with pytest.raises(ValueError, match="sites"):
        quantise(np.zeros(1), sites, step)


# -- streams and seeds -------------------------------------------------------------------------------------------------


def test_the_stream_is_chacha20_and_does_not_depend_on_pieces() -> None:
    seed = bytes(range(32))
    length = 2**18 + 5
    plain = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor().update(bytes(4 * length))
    assert np.array_equal(expand(seed, length), np.frombuffer(plain, "<u4"))
    assert np.array_equal(expand(seed, 7), expand(seed, length)[:7])
    assert expand(seed, 0).size == 0


@given(st.integers(0, 255), st.integers(0, 7))
def test_every_bit_of_a_seed_matters(byte: int, bit: int) -> None:
    seed = bytearray(range(32))
    seed[byte % 32] ^= 1 << bit
    assert not np.array_equal(expand(bytes(seed), 8), expand(bytes(range(32)), 8))


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_seeds_have_256_bits(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        expand(bytes(length), 4)


def test_seeds_are_shared_by_their_pair_and_differ_everywhere_else() -> None:
    seeds = set()
    for task in (TASK, "2" * 64):
        for group in ("trunk", "slot/mri"):
            one = cohort(NAMES[:3], group, task)
            assert pair_seed(PARTIES["a"], "b", one) == pair_seed(PARTIES["b"], "a", one)
            seeds |= {
                pair_seed(PARTIES["a"], "b", one),
                pair_seed(PARTIES["a"], "c", one),
                self_seed(PARTIES["a"], one),
            }
            seeds |= {self_seed(PARTIES["b"], one)}
    assert len(seeds) == 2 * 2 * 4
    assert all(len(seed) == 32 for seed in seeds)


def test_the_self_seed_comes_back_after_a_crash() -> None:
    again = Party("a", MaskingKey(KEYS["a"].secret_bytes()), ROSTER)
    assert self_seed(again, cohort()) == self_seed(PARTIES["a"], cohort())


# -- the sum -----------------------------------------------------------------------------------------------------------


def add(masked: dict[str, Vector], group: Cohort, sites: Iterable[str]) -> MaskedSum:
    """The sum of these sites' vectors, added in this order."""
    total = MaskedSum(group, next(iter(masked.values())).size)
    for site in sites:
        total.add(site, masked[site])
    return total


def run(
    vectors: dict[str, Vector],
    groups: list[Cohort],
    survivors: tuple[str, ...],
    told: dict[str, tuple[str, ...]] | None = None,
) -> dict[str, np.ndarray]:
    """Mask everything, lose the sites outside ``survivors``, unmask, and return the sums that open."""
    masked = {
        group.group: {name: mask(vectors[name], PARTIES[name], group) for name in group.members} for group in groups
    }
    reveals = {name: unmask_seeds(PARTIES[name], groups, (told or {}).get(name, survivors)) for name in survivors}
    seeds = open_reveals(reveals, groups, survivors)
    sums = {}
    for group in groups:
        if len(set(survivors) & set(group.members)) >= group.smallest:
            alive = [name for name in reversed(survivors) if name in group.members]
            sums[group.group] = add(masked[group.group], group, alive).open(seeds, 1.0)
    return sums


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 8), st.integers(0, 40), st.data())
def test_the_masked_sum_is_the_plain_sum_for_any_dropouts(sites: int, length: int, data: st.DataObject) -> None:
    members = NAMES[:sites]
    survivors = tuple(sorted(data.draw(st.sets(st.sampled_from(members), min_size=3))))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    numbers = {name: rng.integers(-(2**20), 2**20, length) for name in members}
    vectors = {name: quantise(values, sites, 1.0).vector for name, values in numbers.items()}
    sums = run(vectors, [cohort(members)], survivors)
    assert np.array_equal(sums["trunk"], sum((numbers[name] for name in survivors), np.zeros(length)))


def test_groups_with_other_owners_open_apart_and_small_ones_stay_closed() -> None:
    vectors = {name: np.full(4, number, np.uint32) for number, name in enumerate(NAMES)}
    groups = [cohort(NAMES[:6]), cohort(("a", "b", "c", "f"), "slot/mri"), cohort(("c", "d", "e"), "slot/pet")]
    sums = run(vectors, groups, ("a", "b", "c", "e"))
    assert {name: total[0] for name, total in sums.items()} == {"trunk": 0 + 1 + 2 + 4, "slot/mri": 0 + 1 + 2}
    with pytest.raises(Refused) as found:
        MaskedSum(groups[2], 4).open({}, 1.0)
    assert code_of(found) == "COHORT_TOO_SMALL"


def test_masked_vectors_look_uniform_and_hide_equal_inputs() -> None:
    zeros = np.zeros(40_000, np.uint32)
    vectors = [mask(zeros, PARTIES[name], cohort()) for name in NAMES[:5]]
    for vector in vectors:
        counts = np.bincount(vector >> 24, minlength=256)
        expected = zeros.size / 256
        assert ((counts - expected) ** 2 / expected).sum() < 400  # chi-square, 255 degrees of freedom: p ~ 1e-8
    for first in range(5):
        for second in range(first):
            assert (vectors[first] == vectors[second]).mean() < 1e-3


def test_the_coordinator_cannot_open_the_sum_of_two() -> None:
    with pytest.raises(Refused) as found:
        cohort(("a", "b"))
    assert code_of(found) == "COHORT_TOO_SMALL"
    for survivors in (("a",), ("a", "b"), ("a", "b", "h")):
        with pytest.raises(Refused) as found:
            unmask_seeds(PARTIES["a"], [cohort()], survivors)
        assert code_of(found) == "COHORT_TOO_SMALL"
        with pytest.raises(Refused) as found:
            cohort().survivors(survivors)
        assert code_of(found) == "COHORT_TOO_SMALL"
    with pytest.raises(ValueError, match="smallest"):
        cohort(smallest=2)


def test_a_stricter_policy_asks_for_more_survivors() -> None:
    strict = cohort(smallest=5)
    unmask_seeds(PARTIES["a"], [strict], NAMES[:5])
    with pytest.raises(Refused):
        unmask_seeds(PARTIES["a"], [strict], NAMES[:4])


def test_a_site_outside_survivors_or_cohort_reveals_nothing() -> None:
    with pytest.raises(Refused) as found:
        unmask_seeds(PARTIES["a"], [cohort()], ("b", "c", "d"))
    assert code_of(found) == "NOT_A_SURVIVOR"
    with pytest.raises(Refused) as found:
        mask(np.zeros(1, np.uint32), PARTIES["h"], cohort())
    assert code_of(found) == "NOT_INVITED"


@given(st.sets(st.sampled_from(NAMES[:6]), min_size=3))
def test_never_both_seeds_of_one_site(survivors: set[str]) -> None:
    groups = [cohort(NAMES[:6]), cohort(NAMES[2:6], "slot/mri")]
    seeds = open_reveals(
        {name: unmask_seeds(PARTIES[name], groups, survivors) for name in survivors}, groups, survivors
    )
    for group in groups:
        own = {name.split(" of ")[1] for name in seeds if name.startswith(f"{group.group} self")}
        pairs = {name.split(" ")[2] for name in seeds if name.startswith(f"{group.group} pair")}
        assert not own & pairs
        assert own <= survivors
        assert not pairs & survivors
        known = {self_seed(PARTIES[name], group) for name in set(NAMES) - survivors}
        assert not known & set(seeds.values())


# -- a coordinator that lies -------------------------------------------------------------------------------------------


def test_two_survivor_sets_for_one_attempt_open_nothing() -> None:
    """The attack on double masking: get e's self seed from e, and e's pair seeds from the others."""
    everyone, without = NAMES[:5], NAMES[:4]
    reveals = {name: unmask_seeds(PARTIES[name], [cohort()], without) for name in without}
    open_reveals(reveals, [cohort()], without)  # the honest outcome: four sites, e dropped
    reveals["e"] = unmask_seeds(PARTIES["e"], [cohort()], everyone)
    with pytest.raises(Refused) as found:
        open_reveals(reveals, [cohort()], everyone)
    assert code_of(found) == "SURVIVORS_CONFLICT"
    honest = {name: unmask_seeds(PARTIES[name], [cohort()], everyone) for name in everyone}
    mixed = {**honest, "e": dataclasses.replace(honest["e"], agreement=reveals["e"].agreement), "a": reveals["a"]}
    with pytest.raises(Refused):
        open_reveals(mixed, [cohort()], everyone)


def test_a_missing_or_damaged_reveal_discards_the_round() -> None:
    survivors = NAMES[:4]
    reveals = {name: unmask_seeds(PARTIES[name], [cohort()], survivors) for name in survivors}
    damaged = bytearray(reveals["b"].sealed)
    damaged[3] ^= 1
    for broken in (
        {name: reveals[name] for name in "abc"},
        {**reveals, "b": Reveal(bytes(damaged), reveals["b"].agreement)},
        {**reveals, "b": Reveal(reveals["b"].sealed, {})},
        {**reveals, "b": Reveal(reveals["b"].sealed, {**reveals["b"].agreement, "a": bytes(32)})},
        {**reveals, "b": Reveal(b"", reveals["b"].agreement)},
    ):
        with pytest.raises(Refused) as found:
            open_reveals(broken, [cohort()], survivors)
        assert code_of(found) == "SURVIVORS_CONFLICT"


def test_a_replayed_round_does_not_cancel() -> None:
    """Masks belong to one task digest: a vector replayed into another attempt leaves noise, and its seeds do not open."""
    survivors, other = NAMES[:3], cohort(NAMES[:3], task="2" * 64)
    first = cohort(NAMES[:3])
    vectors = {name: np.full(1000, 5, np.uint32) for name in survivors}
    masked = {name: mask(vectors[name], PARTIES[name], first if name == "a" else other) for name in survivors}
    seeds = open_reveals(
        {name: unmask_seeds(PARTIES[name], [other], survivors) for name in survivors}, [other], survivors
    )
    total = add(masked, other, survivors).open(seeds, 1.0)
    assert np.abs(total - 15).min() > 0
    stale = {name: unmask_seeds(PARTIES[name], [first if name == "a" else other], survivors) for name in survivors}
    with pytest.raises(Refused):
        open_reveals(stale, [other], survivors)


def test_a_swapped_masking_key_is_found_by_its_owner_and_opens_nothing() -> None:
    intruder = MaskingKey(b"\x77" * 32)
    swapped = {**ROSTER, "b": intruder.public}
    with pytest.raises(Refused) as found:
        Party("b", KEYS["b"], swapped)
    assert code_of(found) == "ROSTER_KEYS"
    survivors = NAMES[:3]
    group = cohort(survivors)
    parties = {"a": Party("a", KEYS["a"], swapped), "b": PARTIES["b"], "c": PARTIES["c"]}
    with pytest.raises(Refused) as found:
        open_reveals({name: unmask_seeds(parties[name], [group], survivors) for name in survivors}, [group], survivors)
    assert code_of(found) == "SURVIVORS_CONFLICT"


@pytest.mark.parametrize("key", [bytes(32), bytes(31), (1).to_bytes(32, "little")])
def test_unusable_peer_keys_are_refused(key: bytes) -> None:
    party = Party("a", KEYS["a"], {**ROSTER, "b": key})
    with pytest.raises(Refused) as found:
        mask(np.zeros(4, np.uint32), party, cohort())
    assert code_of(found) == "ROSTER_KEYS"


def test_cohorts_of_one_task_each_group_once() -> None:
    for groups in ([cohort(), cohort()], [cohort(), cohort(group="slot/mri", task="2" * 64)], []):
        with pytest.raises(ValueError, match="one task"):
            unmask_seeds(PARTIES["a"], groups, NAMES[:5])
    with pytest.raises(ValueError, match="sorted"):
        cohort(("b", "a", "c"))


@pytest.mark.parametrize(
    ("site", "vector", "rule"),
    [
        ("b", np.zeros(5, np.uint32), "expected 4 uint32"),
        ("b", np.zeros(4, np.float32), "expected 4 uint32"),
        ("b", np.zeros((2, 2), np.uint32), "expected 4 uint32"),
        ("a", np.zeros(4, np.uint32), "added before"),
        ("h", np.zeros(4, np.uint32), "not of the cohort"),
    ],
)
def test_what_does_not_belong_in_a_sum_leaves_it_as_it_was(site: str, vector: np.ndarray, rule: str) -> None:
    survivors, group = NAMES[:3], cohort(NAMES[:3])
    masked = {name: mask(np.full(4, 7, np.uint32), PARTIES[name], group) for name in survivors}
    total = add(masked, group, "a")
    with pytest.raises(ValueError, match=rule):
        total.add(site, vector)
    assert total.sites == ("a",)
    for name in "cb":
        total.add(name, masked[name])
    seeds = open_reveals(
        {name: unmask_seeds(PARTIES[name], [group], survivors) for name in survivors}, [group], survivors
    )
    with pytest.raises(Refused, match="missing"):
        total.open({}, 1.0)
    for _ in range(2):  # a failed opening and a first one take nothing away
        assert np.array_equal(total.open(seeds, 1.0), np.full(4, 21.0))


def test_the_order_of_arrival_changes_no_bit() -> None:
    rng = np.random.default_rng(5)
    masked = {name: rng.integers(0, 2**32, 1000, np.uint32) for name in NAMES[:5]}
    orders = [rng.permutation(NAMES[:5]) for _ in range(4)]
    first, *others = [add(masked, cohort(), order)._total for order in orders]
    assert all(np.array_equal(first, other) for other in others)


def test_masking_is_fast_enough() -> None:
    """50 MB of masked numbers per second of processor time, four peers; reached: several hundred."""
    vector = np.zeros(1_000_000, np.uint32)
    mask(vector, PARTIES["a"], cohort())
    start = time.process_time()
    mask(vector, PARTIES["a"], cohort())
    assert 4 * vector.size / 1e6 / max(time.process_time() - start, 1e-9) > 50

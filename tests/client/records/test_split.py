"""The split is fixed by key and pseudonym alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.records.split import split_rows

KEY = b"k" * 32


@given(st.sets(st.text("abc123", min_size=1, max_size=6), min_size=1, max_size=20), st.integers(0, 25))
def test_partition(names: set[str], held_out: int) -> None:
    patients = sorted(names)
    members, held = split_rows(patients, KEY, held_out)
    assert sorted(members + held) == list(range(len(patients)))
    assert len(held) == min(held_out, len(patients) - 1)
    shuffled = patients[::-1]
    _, again = split_rows(shuffled, KEY, held_out)
    assert {patients[i] for i in held} == {shuffled[i] for i in again}


def test_new_patients_do_not_turn_held_out_ones_into_members_at_random() -> None:
    patients = [f"sub-{i}" for i in range(50)]
    before = {patients[i] for i in split_rows(patients, KEY, 10)[1]}
    more = [*patients, "sub-50"]
    after = {more[i] for i in split_rows(more, KEY, 10)[1]}
    assert len(before & after) >= 9


def test_another_key_gives_another_split() -> None:
    patients = [f"sub-{i}" for i in range(50)]
    assert split_rows(patients, KEY, 10) != split_rows(patients, b"l" * 32, 10)


@pytest.mark.parametrize(("key", "count"), [(b"short", 1), (KEY, -1)])
def test_refusals(key: bytes, count: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        split_rows(["a"], key, count)

"""Rows that no ledger would have written are refused when they are read, wherever they came from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privacy.accounts import reservation
from privacy.book import RESTORE_TYPE, Book, Head, Restoration, signed_part
from privacy.boundary.refusals import LedgerError
from privacy.chain import Link, canonical, extend
from privacy.identity import IdentityKey
from privacy.ledger import Ledger
from privacy.plan import DPPlan, TrainingStage
from privacy.spendfile import SpendFile

P, Q, A, B = "a" * 64, "b" * 64, "c" * 64, "d" * 64
KEY = IdentityKey(b"\x31" * 32)
PLAN = DPPlan(
    stages=(TrainingStage(name="core", sampling_rate=0.2, steps=5, rounds=3, spare_rounds=1, clip=1.0),), delta=1e-5
).calibrate(4.0)
RESERVE = reservation(P, PLAN, 100, deterministic=False, blocks=("all",), block_column="") | {
    "lifetime_delta": 1e-5,
    "orders": {"all": 4.0},
}
INTENT = {"plan_hash": P, "stage": "core", "round": 0, "digest": A}


def chain(*rows: tuple[str, dict[str, Any]]) -> list[Link]:
    links: list[Link] = []
    for kind, body in (("open", {"site": "north", "ledger": "x", "format": 1}), *rows):
        links.append(extend(links[-1] if links else None, kind, body, "2026-01-01T00:00:00+00:00"))
    return links


def fold(*rows: tuple[str, dict[str, Any]]) -> Book:
    book = Book()
    for link in chain(*rows):
        book.apply(link)
    return book


def restoration(rows: list[Link], **change: Any) -> tuple[str, dict[str, Any]]:
    """A restore row after these, signed by whoever wants to."""
    end = Head(rows[-1].seq, rows[-1].hash)
    body = {
        "after": str(end),
        "anchor": end.seq,
        "at": "2026-01-01T00:00:00+00:00",
        "backup": str(end),
        "charges": {P: {"core": 2}},
        "gap": 2,
        "heads": [],
        "ledger": "x",
        "lost": str(end),
        "officer": KEY.public.hex(),
    } | change
    return "restore", {**body, "signature": KEY.sign(RESTORE_TYPE, signed_part(body)).hex()}


def fault_of(call: Callable[[], object]) -> str:
    with pytest.raises(LedgerError) as found:
        call()
    return found.value.fault


def test_a_second_reservation_does_not_start_a_budget_again(tmp_path: Path) -> None:
    """Adding a row needs no trigger dropped and no hash changed: the chain holds, and the mirror is merely behind."""
    assert fault_of(lambda: fold(("reserve", RESERVE), ("intent", INTENT), ("reserve", RESERVE))) == "tampered"
    with SpendFile.open(tmp_path / "ledger.sqlite", "north") as file:
        for kind, body in (("reserve", RESERVE), ("intent", INTENT), ("reserve", RESERVE)):
            file.append(kind, body)
    assert fault_of(lambda: Ledger.open(tmp_path / "ledger.sqlite", "north")) == "tampered"


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1}, {"round": 3}, {"round": True}, {"round": 0.0}, {"round": None}, {"stage": "audit"},
        {"stage": ["core"]}, {"plan_hash": Q},
    ],
)  # fmt: skip
def test_an_intent_is_of_a_reserved_round(change: dict[str, Any]) -> None:
    assert fold(("reserve", RESERVE), ("intent", INTENT)).accounts[P].begun() == {"core": 1}
    assert fault_of(lambda: fold(("reserve", RESERVE), ("intent", INTENT | change))) == "tampered"


def test_no_rows_spend_more_than_was_reserved() -> None:
    rows = [("reserve", RESERVE), *[("intent", INTENT)] * 4]
    assert fold(*rows).accounts[P].remaining() == {"core": 0}
    assert fault_of(lambda: fold(*rows, ("intent", INTENT))) == "tampered"
    closed = [("reserve", RESERVE), ("close", {"plan_hash": P})]
    assert fault_of(lambda: fold(*closed, ("intent", INTENT))) == "tampered"
    assert fault_of(lambda: fold(("commit", {"plan_hash": P, "intent": 2, "answer": B}))) == "tampered"
    commit = {"plan_hash": P, "intent": 2, "answer": B}  # row 2 is the reservation
    assert fault_of(lambda: fold(("reserve", RESERVE), ("intent", INTENT), ("commit", commit))) == "tampered"


@pytest.mark.parametrize(
    "charges",
    [{P: {"core": -2}}, {P: {"core": 0}}, {P: {"core": 5}}, {P: {"core": True}}, {P: {"core": 1.0}}, {P: {"x": 1}},
     {Q: {"core": 1}}, {P: ["core"]}, "x"],
)  # fmt: skip
def test_a_charge_only_ever_takes_what_was_left(charges: Any) -> None:
    """A negative charge, however well it is signed, would give budget back."""
    before = [("reserve", RESERVE), ("intent", INTENT)]
    good = fold(*before, restoration(chain(*before)))
    assert good.accounts[P].remaining() == {"core": 1}
    assert fault_of(lambda: fold(*before, restoration(chain(*before), charges=charges))) == "tampered"


@pytest.mark.parametrize("gap", [-1, True, 1.0, None, "2"])
def test_a_gap_is_a_number_of_rows(gap: Any) -> None:
    assert fault_of(lambda: fold(("reserve", RESERVE), restoration(chain(("reserve", RESERVE)), gap=gap))) == "tampered"


def test_a_restoration_for_another_place_in_the_chain_is_refused() -> None:
    row = restoration(chain(("reserve", RESERVE)))
    assert fault_of(lambda: fold(("reserve", RESERVE), ("local", {"purpose": "x"}), row)) == "tampered"


def test_acknowledged_heads_are_those_that_were_lost() -> None:
    lost = Restoration(9, "", Head(3, A), 3, Head(7, A), (Head(7, A), Head(5, B)), 4, {}, KEY.public)
    assert [seq for seq in range(12) if lost.acknowledges(Head(seq, A))] == [4, 6, 7]
    assert [seq for seq in range(12) if lost.acknowledges(Head(seq, B))] == [4, 5, 6]


@pytest.mark.parametrize("kind", ["refund", "", "Reserve"])
def test_unknown_kinds_are_refused_and_not_guessed(kind: str) -> None:
    assert fault_of(lambda: fold((kind, {"plan_hash": P}))) == "foreign"


@pytest.mark.parametrize("sigma", [math.nan, math.inf, -1.0])
def test_events_that_are_no_events_are_refused_and_nan_is_never_written(sigma: float) -> None:
    (link,) = chain(("reserve", RESERVE))[1:]
    forged = link.body.replace(canonical(RESERVE["events"]["core"]["round"]), f"[[{sigma},0.2,5]]").replace(
        "nan", "NaN"
    )
    assert forged != link.body
    body = forged.replace("inf", "Infinity")
    assert fault_of(lambda: Book().apply(dataclasses.replace(link, body=body))) == "tampered"
    if not math.isfinite(sigma):
        with pytest.raises(ValueError, match="JSON"):
            chain(("reserve", {"sigma": sigma}))

"""Series and notes: bins, window, spikes, channels."""

from typing import Any

import pytest
import torch

from medgen_models.codecs.text import hash_encode
from medgen_models.schema import Schema


def events(*rows: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [dict(zip(("participant_id", "minute", "channel", "value"), row, strict=True)) for row in rows]


@pytest.mark.parametrize("name", ["vitals.csv", "vitals.parquet", "vitals.csv.gz"])
def test_means_per_bin(site: Any, name: str) -> None:
    site.participants("1", "2")
    site.table(
        name,
        events(
            ("1", 0, "hr", 50), ("1", 239, "hr", 150), ("1", 240, "hr", 200), ("1", 480, "hr", 0), ("1", 10, "map", 75)
        ),
    )
    members = site.load("vitals").members
    assert members.values["vitals"][0, 0].nan_to_num(9).tolist() == [[0.0, 0.5], [0.0, 9.0]]
    assert members.present_BVI[:, 0, 7].tolist() == [True, False]


def test_spikes_and_late_events_are_dropped_and_counted_not_refused(site: Any) -> None:
    site.participants("1")
    site.table(
        "vitals.csv", events(("1", 5, "hr", 900), ("1", 5, "hr", 100), ("1", -1, "hr", 100), ("1", 481, "hr", 100))
    )
    records = site.load("vitals")
    assert records.members.values["vitals"][0, 0, 0, 0] == 0.0
    assert records.counts == {
        "vitals: events beyond the public range, left out": 1,
        "vitals: events outside the window, left out": 2,
    }


def test_a_value_that_is_no_number_makes_the_patient_null(site: Any) -> None:
    site.participants("1", "2")
    site.table(
        "vitals.csv", events(("1", 5, "hr", "fast"), ("1", 9, "hr", "faster"), ("2", 5, "hr", 80), ("2", 6, "hr", ""))
    )
    records = site.load("vitals")
    assert [(p.patient, p.field, p.value) for p in records.problems if p.patient] == [("sub-1", "value", "fast")]
    assert records.members.visit_BV[:, 0].tolist() == [False, True]


def test_unknown_channels_are_named_once(site: Any) -> None:
    site.participants("1")
    site.table("vitals.csv", events(("1", 5, "spo2", 97), ("1", 6, "spo2", 97), ("1", 6, "icp", 9), ("1", 5, "hr", 80)))
    records = site.load("vitals", ignore=["icp"])
    assert [p.value for p in records.problems if p.file == "vitals.csv"] == ["spo2"]


def test_two_names_may_feed_one_channel_and_hours_may_be_the_unit(site: Any) -> None:
    site.participants("1")
    rows = events(("1", 0.5, "NIMAP", 20), ("1", 0.6, "ABP", 40), ("1", 7.9, "ABP", 100))
    site.table(
        "vitals.csv",
        [{"participant_id": r["participant_id"], "h": r["minute"], "c": r["channel"], "v": r["value"]} for r in rows],
    )
    source = {
        "reader": "series",
        "time_column": "h",
        "channel_column": "c",
        "value_column": "v",
        "minutes_per_unit": 60,
        "channels": {"NIMAP": "map", "ABP": "map"},
    }
    values = site.load("vitals", slots={"vitals": source}).members.values["vitals"][0, 0, :, 1]
    assert values.tolist() == pytest.approx([-0.4, 1.0])


CHANNELS = {"vitals": {"reader": "series", "channels": {"211": "hr"}}}


@pytest.mark.parametrize(
    "other",
    [
        ("A12", 5, "211", 90),
        ("009", 5, "", 90),
        ("009", 5, "rate", 90),
        ("009", "soon", "211", 90),
        ("009", 5, "211", "fast"),
    ],
    ids=["id that is no number", "no channel", "channel of a name", "time that is text", "value that is text"],
)
@pytest.mark.parametrize("name", ["vitals.csv", "vitals.parquet"])
def test_what_one_patient_holds_does_not_change_how_others_are_read(
    site: Any, name: str, other: tuple[Any, ...]
) -> None:
    """Types guessed from a column, or names chosen by what is there, would make one patient move everybody's numbers."""
    numbers = [("007", 5, 211, 100), ("008", 300, 211, 150)]
    site.participants("007", "008", other[0])
    frame = events(*numbers) if name.endswith("parquet") else events(*((i, t, str(c), v) for i, t, c, v in numbers))
    site.table(name, frame)
    alone = site.load("vitals", slots=CHANNELS).members
    site.table(name, events(*((i, str(t), str(c), str(v)) for i, t, c, v in [*numbers, other])))
    beside = site.load("vitals", slots=CHANNELS).members
    for patient in ("sub-007", "sub-008"):
        rows = [members.ids.index(patient) for members in (alone, beside)]
        before, after = (m.values["vitals"][row].nan_to_num(9) for m, row in zip((alone, beside), rows, strict=True))
        assert torch.equal(before, after)
        assert (before != 9).any()


def test_a_missing_column_is_named(site: Any) -> None:
    site.participants("1")
    site.volume("1", "T1w")
    site.table("vitals.csv", [{"participant_id": "1", "minute": 1, "value": 3}])
    assert "has column channel" in [p.rule for p in site.load("mri", "vitals").problems]


def test_notes_are_coded_and_joined(site: Any, two_visits: Schema) -> None:
    site.participants("1", "2")
    site.table(
        "notes.csv", [{"participant_id": "1", "text": "lives alone."}, {"participant_id": "1", "text": "Falls, often"}]
    )
    members = site.load("note", schema=two_visits).members
    assert torch.equal(members.values["note"][0, 0], hash_encode("lives alone. Falls, often", 1, 16))
    assert members.present_BVI[:, :, 8].tolist() == [[True, False], [False, False]]

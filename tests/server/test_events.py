"""Events survive a killed writer: a torn last line is no event."""

from pathlib import Path

from server.events import EventLog


def test_order_fields_and_a_torn_last_line(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run" / "events.jsonl")
    assert list(log.read()) == []
    log.write("round", stage="core", round=0)
    log.write("round", stage="core", round=1)
    with (tmp_path / "run" / "events.jsonl").open("a") as handle:
        handle.write('{"kind": "rou')
    assert [(event["kind"], event["round"]) for event in log.read()] == [("round", 0), ("round", 1)]

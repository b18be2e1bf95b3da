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


def test_an_event_after_a_torn_line_is_whole_and_readers_go_on_from_where_they_were(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write("started")
    events, position = log.read_after(0)
    assert [event["kind"] for event in events] == ["started"]
    with path.open("ab") as torn:
        torn.write(b'{"kind": "rou')
    assert log.read_after(position) == ([], position)  # it may yet be finished
    log.write("resumed")
    assert [event["kind"] for event in log.read_after(position)[0]] == ["resumed"]
    assert [event["kind"] for event in log.read()] == ["started", "resumed"]
